"""The command line through its real entry point: what goes in, what comes out, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pico import TOYS, snapshot, toy_task, write_task

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.app import app, load_verb
from adapterhub_chat.cli.json_lines import open_output
from adapterhub_chat.cli.options import HubOptions
from adapterhub_chat.config import EngineOptions, TrainConfig
from adapterhub_chat.data.task import load_task
from adapterhub_chat.errors import PoolError
from adapterhub_chat.training.run_log import RunLog

QUICK = ("--max-steps", 2, "--rows-per-step", 1, "--row-length", 128, "--learning-rate", 0.02)
PATIENCE = 300
"""Seconds that a process may take on a busy machine."""


def printed(name, pool="adapters"):
    """A pool member's manifest as it is printed: without the long rows of prototypes' numbers."""
    found = manifest(name, pool)
    if found["routing"]:
        for own in (found["routing"], found["routing"]["glance"]):
            assert len(own.pop("numbers")) > 100
    return found


def manifest(name, pool="adapters"):
    return json.loads((Path(pool) / name / "adapterhub.json").read_text())


# ---- help ----------------------------------------------------------------------------------------

VERBS = (
    *("demo", "train", "eval", "predict", "chat", "list", "show", "rollback", "verify", "bench"),
    *(
        "merge",
        "export",
        "transfer",
        "flatten",
        "route",
        "push",
        "pull",
        "search",
        "adopt",
        "keygen",
    ),
)


def test_other_numbers_of_shots_want_a_report(run):
    refused = run("transfer", "--source", "a", "--target", "b", "--also", "4")
    assert refused.code != 0
    assert "give --report FOLDER" in refused.err


def test_a_transfer_from_the_command_line(run, here):
    write_task(here / "tasks", "tweets", toy_task())
    (here / "texts.csv").write_text("text\na good flight\na bad flight\n")
    how = ("--target", "tasks/tweets.toml", "--shots", 4, "--max-steps", 2)
    done = run(
        "transfer", "--source", "sentiment", *how, "--also", 0, "--method", "maxent", "--json",
        "--unlabelled", "texts.csv", "--report", "report", "--name", "made",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert (found["chosen"], found["baseline"]) == ("maxent", "target")
    assert {c["method"] for c in found["candidates"]} == {"backbone", "source", "target", "maxent"}
    assert set(found["by_shots"]) == {"0", "4"}
    assert found["by_shots"]["0"]["backbone"].keys() == {"value", "verdict"}
    assert found["effective"] > 0
    assert found["clipped"] == 0
    assert found["manifest"]["name"] == "made"
    assert {"report.md", "weights.png"} <= {p.name for p in (here / "report").iterdir()}
    told = run("transfer", "--source", "sentiment", *how, "--method", "stack", "--name", "T")
    assert told.code == 0, told.err
    assert "T (stack) is in adapters" in told.out
    plain = run("flatten", "T", "--json")
    assert plain.json["name"] == "T-flat"
    assert not plain.json["stack"]


def test_sources_are_ranked_from_the_command_line(run):
    found = run("transfer", "--rank", "--target", "sentiment", "--source", "sentiment", "--json")
    assert found.json["target"] == "sentiment"
    (one,) = found.json["sources"]
    assert one["adapter"] == "sentiment"
    refused = run("transfer", "--rank", "--target", "qa")
    assert refused.code != 0
    assert "qa has free answers" in refused.err


def test_help_names_every_verb(run):
    shown = run("--help", backbone=False)
    assert shown.code == 0
    assert all(f" {verb} " in shown.out for verb in VERBS)
    assert {c.name or c.callback.__name__ for c in app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_a_help_page(run, verb):
    shown = run(verb, "--help", backbone=False)
    assert shown.code == 0
    assert "Usage: " in shown.out
    if verb not in (
        "predict",
        "chat",
    ):  # JSON lines and talk: the one has no other form, the other none
        assert "--json" in shown.out


def test_every_setting_is_explained_with_its_default(run):
    shown = " ".join(run("train", "--help", backbone=False).out.replace("│", " ").split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert f"[default: ({field.default})]" in shown


# ---- train ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["joint", "sequence"])
def test_train_makes_measured_adapters(run, here, how):
    args = ("qa", "sentiment", "--how", how, "--test-examples", 3, "--pool", "new", *QUICK)
    done = run("train", *args, "--run-dir", "log")
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("qa", "sentiment", "token_f1", "accuracy"))
    assert "qa: 2 steps, best at 2, finished; saved to new" in done.err
    assert "fp32 on cpu" in done.err.replace("float32", "fp32")
    for name in ("qa", "sentiment"):
        made = manifest(name, "new")
        assert made["training"]["how"] == how
        assert made["training"]["tasks"] == [name]
        assert made["scores"][0]["n"] == 3
    events = [json.loads(line) for line in Path("log/metrics.jsonl").read_text().splitlines()]
    assert {e["adapter"] for e in events} == {"qa", "sentiment"}
    assert run("verify", "qa", "--pool", "new").code == 0


def test_train_json_prints_only_the_manifests(run):
    done = run("train", "qa", "--name", "mine", "--json", "--test-examples", 0, *QUICK)
    assert (done.code, done.err) == (0, "")
    assert done.json == {"mine": printed("mine")}
    assert [p.name for p in Path("runs").iterdir()]  # the run log's own folder, by time


def test_train_from_a_file(run, pico_folder):
    Path("run.toml").write_text(f"""
        backbone = {json.dumps(str(pico_folder))}
        pool = "from-file"
        how = "sequence"
        test_examples = 2
        dtype = "fp32"
        device = "cpu"
        [settings]
        max_steps = 1
        rank = 4
        row_length = 128
        [adapters.first]
        task = "qa"
        [adapters.second]
        task = "tasks/sentiment.toml"
        rank = 2
        seed = 9
    """)
    done = run("train", "--config", "run.toml", "--alpha", 3, backbone=False)
    assert done.code == 0, done.err
    first, second = (manifest(n, "from-file")["training"] for n in ("first", "second"))
    assert (first["how"], first["tasks"], second["tasks"]) == ("sequence", ["qa"], ["sentiment"])
    assert [t["settings"]["rank"] for t in (first, second)] == [4, 2]
    assert [t["settings"]["alpha"] for t in (first, second)] == [3, 3]
    assert [t["settings"]["seed"] for t in (first, second)] == [0, 9]
    assert manifest("first", "from-file")["scores"][0]["n"] == 2


OTHER_VALUES = {
    "rank": 2,
    "alpha": 3.5,
    "rslora": True,
    "targets": "q_proj,v_proj",
    "learning_rate": 0.25,
    "schedule": "constant",
    "warmup": 0.5,
    "weight_decay": 0.125,
    "clip": 0.5,
    "epochs": 0.01,
    "max_steps": 2,
    "max_minutes": 30.0,
    "rows_per_step": 3,
    "row_length": 96,
    "eval_every": 1,
    "eval_examples": 2,
    "patience": 1,
    "train_examples": 6,
    "seed": 11,
    "layers": "1:",
    "temperature": 2.0,
    "orthogonal": 0.5,
}


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_is_a_flag_that_reaches_the_run(run, name):
    value = OTHER_VALUES[name]
    default = TrainConfig.model_fields[name].default
    assert value != default
    flag = f"--{name.replace('_', '-')}"
    given = [flag] if value is True else [flag, value]
    quick = [] if name == "max_steps" else ["--max-steps", 1]
    mode = {"temperature": ["--how", "shared"], "orthogonal": ["--how", "sequence", "--grow"]}
    more = [*quick, *given, *mode.get(name, []), "--test-examples", 0, "--json"]
    done = run("train", "sentiment", *more)
    assert done.code == 0, done.err
    adapter = "grown" if name == "orthogonal" else "sentiment"
    settings = done.json[adapter]["training"]["settings"]
    asked = {name: value, "max_steps": OTHER_VALUES["max_steps"] if not quick else 1}
    assert settings == TrainConfig(**asked).model_dump()


def test_bars_are_drawn_without_validation_too(run):
    done = run("train", "sentiment", "--eval-examples", 0, "--test-examples", 2, *QUICK)
    assert done.code == 0, done.err
    assert "train sentiment" in done.err
    assert "finished, best validation unknown" in " ".join(done.err.split())
    assert "answer sentiment" in done.err
    assert manifest("sentiment")["training"]["validation_loss"] is None


def test_a_switch_can_be_turned_off_again(run, here):
    Path("run.toml").write_text('[settings]\nrslora = true\n[adapters.a]\ntask = "qa"')
    args = ("--config", "run.toml", "--no-rslora", "--test-examples", 0, "--json", *QUICK)
    assert run("train", *args).json["a"]["training"]["settings"]["rslora"] is False


def test_invalid_settings_are_listed_together_and_change_no_file(run, here):
    Path("run.toml").write_text("""
        how = "both"
        pol = "typo"
        [settings]
        rank = 0
        rnak = 8
        schedule = "square"
        [adapters.a]
        epochs = -1
    """)
    before = snapshot(here)
    failed = run("train", "--config", "run.toml")
    assert failed.code == 2
    assert failed.out == ""
    for wanted in (
        "error: run.toml: 7 problems",
        "how: input should be 'joint', 'sequence' or 'shared'; got 'both'",
        "pol: no such key; allowed: adapters, backbone, checkpointing, device",
        "settings.rank: input should be greater than or equal to 1; got 0",
        "settings.rnak: no such key; allowed: alpha, clip",
        "settings.schedule: input should be 'cosine', 'linear' or 'constant'; got 'square'",
        'adapters.a needs a task, as in task = "qa"',
        "adapters.a.epochs: input should be greater than 0",
    ):
        assert wanted in failed.err
    assert snapshot(here) == before


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_an_adapter_that_learns_nothing_gives_exit_code_1(run, here):
    before = snapshot(here / "adapters")
    done = run(
        "train",
        "sentiment",
        "--max-steps",
        4,
        "--learning-rate",
        1e30,
        "--clip",
        1e30,
        "--warmup",
        0,
    )
    assert done.code == 1
    assert "note: adapter 'sentiment' is not saved: diverged before it learnt anything" in done.err
    assert snapshot(here / "adapters") == before


# ---- eval ----------------------------------------------------------------------------------------


def test_eval_json_has_the_promised_shape(run):
    done = run(
        "eval", "--adapter", "sentiment", "--adapter", "backbone", "--task", "sentiment", "--json"
    )
    assert (done.code, done.err) == (0, "")
    assert list(done.json) == ["scores"]
    keys = {"adapter", "task", "metric", "value", "low", "high", "backbone_value", "n"}
    assert all(keys <= set(s) for s in done.json["scores"])
    assert [s["adapter"] for s in done.json["scores"]] == ["sentiment", "backbone"]
    first, second = done.json["scores"]
    assert first["low"] <= first["value"] <= first["high"]
    assert first["backbone_value"] == second["value"] == second["backbone_value"]
    assert first["n"] == len(load_task("sentiment").split("test"))


def test_eval_defaults_to_all_adapters_on_their_training_tasks(run):
    done = run("eval", "--limit", 3, "--json")
    found = {(s["adapter"], s["task"], s["metric"], s["n"]) for s in done.json["scores"]}
    assert found == {
        ("sentiment", "sentiment", "accuracy", 3),
        ("qa", "qa", "token_f1", 3),
        ("generation", "generation", "perplexity", 3),
    }
    table = run("eval", "--limit", 3)
    assert table.code == 0
    assert all(word in table.out for word in ("perplexity", "generation", "95 % interval"))


def test_one_refused_adapter_does_not_end_eval(run, here):
    weights = here / "adapters" / "qa" / "adapter_model.safetensors"
    numbers = bytearray(weights.read_bytes())
    numbers[-4] ^= 1  # the last bit of the last number
    weights.write_bytes(numbers)
    done = run("eval", "--limit", 2, "--json")
    assert done.code == 1
    assert {score["adapter"] for score in done.json["scores"]} == {"sentiment", "generation"}
    assert "is not the file that adapterhub.json describes" in done.json["refused"]["qa"]
    assert "refused" in done.err
    shutil.rmtree(here / "adapters" / "generation")
    shutil.rmtree(here / "adapters" / "sentiment")
    assert run("eval", "--limit", 2).code == 2


def test_eval_stores_scores_only_with_save(run, here):
    args = ("eval", "--adapter", "qa", "--limit", 2, "--json")
    before = snapshot(here)
    measured = run(*args).json["scores"]
    assert snapshot(here) == before
    assert run(*args, "--save").json["scores"] == measured
    assert manifest("qa")["scores"] == measured
    assert " 2 |" in Path("adapters/qa/README.md").read_text()


# ---- route ---------------------------------------------------------------------------------------


def test_route_answers_json_lines_in_order(run, here):
    rows = [
        {"text": "Which film 3?"},
        {"text": " "},
        {"question": "Which song 4?"},
        {"text": "x" * 999},
    ]
    Path("in.jsonl").write_text(json_lines(rows), encoding="utf-8")
    piped = run("route", "--json", stdin=json_lines(rows))
    assert (piped.code, piped.err) == (0, "")
    assert len(piped.rows) == len(rows)
    for row in piped.rows:
        assert {"adapter", "mix", "confidence", "abstained", "reason", "scores"} == set(row)
        assert 0 <= row["confidence"] <= 1
        assert list(row["mix"]) == ([] if row["abstained"] else [row["adapter"]])
    assert piped.rows[1]["abstained"]
    assert piped.rows[1]["adapter"] == "backbone"
    assert run("route", "--json", "--input", "in.jsonl").out == piped.out
    assert run("route", "--input", "in.jsonl", "--output", "out.jsonl").out == ""
    assert Path("out.jsonl").read_text(encoding="utf-8") == piped.out
    alone = run("route", "--json", "Which film 3?").rows
    assert alone[0]["adapter"] == piped.rows[0]["adapter"]
    assert alone[0]["confidence"] == pytest.approx(piped.rows[0]["confidence"], abs=1e-4)


def test_route_tells_a_person_why(run):
    shown = run("route", "Which film 3?", "--adapter", "qa", "--adapter", "sentiment")
    assert shown.code == 0
    assert "Which film 3?" in shown.out
    assert "generation" not in shown.out


def test_route_learns_from_tasks_and_keeps_it(run):
    before = manifest("qa")
    own = before.pop("routing")
    assert len(own["numbers"]) > 1000
    learnt = run("route", "--learn", "qa", "--task", "sentiment", "--json").json["learnt"]
    after = manifest("qa")
    other = after.pop("routing")
    assert learnt == {"qa": other["count"]}
    assert other["numbers"] != own["numbers"]
    assert after == before
    assert run("route", "--learn", "qa", "--learn", "generation").code == 0
    assert manifest("qa")["routing"]["count"] == own["count"]
    shown = run("show", "qa", "--json", backbone=False).json["routing"]
    assert not {"numbers"} & {*shown, *shown["glance"]}


@pytest.mark.parametrize(
    ("args", "stdin", "wanted"),
    [
        (("--json",), '{"text": 3}\n{"text": "fine"}\n{}', "line 3 has no text"),
        (("--json",), "no JSON", "line 1: not a JSON object"),
        (("--adapter", "nobody", "Hello"), "", "unknown adapter 'nobody'"),
        (("--task", "qa", "Hello"), "", "--task goes with --learn"),
        (("--learn", "qa", "Hello"), "", "leave out those of the command line"),
        (("--learn", "nobody"), "", "unknown adapter 'nobody'"),
    ],
)
def test_route_says_what_does_not_fit(run, args, stdin, wanted):
    failed = run("route", *args, stdin=stdin)
    assert failed.code == 2
    assert wanted in failed.err
    assert failed.out == ""


# ---- predict -------------------------------------------------------------------------------------

FILMS = ["good film", "bad plot", "a “quoted” song\u2028on two lines", "你好 🙂"]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_predict_answers_json_lines_in_order_from_anywhere_to_anywhere(run, here):
    rows = [{"text": text, "id": i} for i, text in enumerate(FILMS * 3)]
    Path("in.jsonl").write_text(json_lines(rows), encoding="utf-8")
    piped = run("predict", "--adapter", "sentiment", stdin=json_lines(rows))
    assert (piped.code, piped.err) == (0, "")
    assert len(piped.rows) == len(rows)
    for row in piped.rows:
        assert set(row) == {"output", "label", "scores", "adapter"}
        assert row["adapter"] == "sentiment"
        assert set(row["scores"]) == {"bad", "good"}
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["scores"], key=row["scores"].get)
    alone = [
        run("predict", "--adapter", "sentiment", stdin=json_lines([r])).rows[0] for r in rows[:4]
    ]
    for together, single in zip(piped.rows, alone * 3, strict=True):
        assert together["label"] == single["label"]
        assert together["scores"] == pytest.approx(single["scores"], abs=1e-5)
    assert run("predict", "--adapter", "sentiment", "--input", "in.jsonl").out == piped.out
    done = run("predict", "--adapter", "sentiment", "--input", "in.jsonl", "--output", "out.jsonl")
    assert (done.code, done.out) == (0, "")
    assert Path("out.jsonl").read_text(encoding="utf-8") == piped.out
    assert not [p for p in here.iterdir() if "part" in p.name]


def test_predict_accepts_fields_and_another_task(run):
    free = run("predict", "--adapter", "qa", stdin=json_lines([{"question": "Which song?"}]))
    assert (free.rows[0]["label"], free.rows[0]["scores"]) == (None, {})
    assert free.rows == run("predict", "--adapter", "qa", stdin='{"text": "Which song?"}').rows
    args = ("--adapter", "backbone", "--task", "sentiment")
    bare = run("predict", *args, stdin='{"text": "good film"}')
    assert bare.rows[0]["adapter"] == "backbone"
    assert set(bare.rows[0]["scores"]) == {"bad", "good"}


def test_engine_flags_reach_the_options_of_the_hub(run, monkeypatch):
    hubs, open_hub = [], HubOptions.open
    monkeypatch.setattr(HubOptions, "open", lambda *args: hubs.append(open_hub(*args)) or hubs[-1])
    flags = ("--rows", 2, "--adapter-bytes", 10**9, "--ram-bytes", 0, "--prefix-bytes", 0)
    done = run("predict", "--adapter", "qa", *flags, stdin='{"text": "a"}')
    assert (done.code, len(done.rows)) == (0, 1)
    wanted = EngineOptions(rows=2, adapter_bytes=10**9, ram_bytes=0, prefix_bytes=0)
    assert hubs[0].model.options == wanted
    assert run("predict", "--adapter", "qa", stdin='{"text": "a"}').rows == done.rows
    assert hubs[1].model.options == EngineOptions()


def test_engine_flags_out_of_range_are_listed_together(run):
    failed = run("eval", "--rows", 0, "--cache-bytes", -1)
    assert (failed.code, failed.out) == (2, "")
    assert "rows: input should be greater than or equal to 1; got 0" in failed.err
    assert "cache_bytes: input should be greater than or equal to 0; got -1" in failed.err


@pytest.mark.parametrize("verb", ["demo", "eval", "predict", "chat"])
def test_every_field_of_the_engine_options_has_a_flag(verb):
    flags = {option for parameter in load_verb(verb).params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in EngineOptions.model_fields} <= flags


def test_predict_of_empty_input_gives_empty_output(run, here):
    assert run("predict", "--adapter", "qa", stdin="\n \n").out == ""
    assert run("predict", "--adapter", "qa", "--output", "out.jsonl", stdin="").code == 0
    assert Path("out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("stdin", "wanted"),
    [
        (
            b'{"text": "a"}\nnonsense\n{"text": "b"}\n[1]\n\n"x"\n',
            "line 2, 4, 5, 6: not a JSON object",
        ),
        (b'{"text": "caf\xe9"}\n', "line 1: not a JSON object"),
        (b'{"text": "a"}\n' + b"{" * 100_000, "line 2: not a JSON object"),
        (b"1\n" * 15, "line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 5 more: not"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "input 2 has txt; the task needs 'text'"),
        (b'{"text": "\\ud800"}\n', "input 1: "),
    ],
)
def test_predict_names_bad_lines_and_leaves_the_old_output(run, here, stdin, wanted):
    Path("out.jsonl").write_text("old")
    failed = run("predict", "--adapter", "sentiment", "--output", "out.jsonl", stdin=stdin)
    assert (failed.code, failed.out) == (2, "")
    assert wanted in failed.err
    assert Path("out.jsonl").read_text() == "old"
    assert {p.name for p in here.iterdir()} == {"adapters", "tasks", "out.jsonl"}


def test_predict_says_where_it_cannot_read_or_write(run, here):
    asked = ("predict", "--adapter", "qa")
    missing = run(*asked, "--input", "no/such.jsonl")
    assert (missing.code, "--input no/such.jsonl: No such file" in missing.err) == (2, True)
    for output in ("no/such/folder.jsonl", "tasks", "tasks/qa.toml/x.jsonl"):
        failed = run(*asked, "--output", output, stdin='{"text": "a"}')
        assert (failed.code, f"--output {output}: " in failed.err) == (2, True)
    assert {p.name for p in here.iterdir()} == {"adapters", "tasks"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_predict_on_a_full_disk_and_to_a_device(run):
    failed = run("predict", "--adapter", "qa", "--output", "/dev/full", stdin='{"text": "a"}')
    assert (failed.code, "No space left on device" in failed.err) == (2, True)
    assert (
        run("predict", "--adapter", "qa", "--output", os.devnull, stdin='{"text": "a"}').code == 0
    )
    assert not Path(os.devnull).is_file()
    assert not Path(f"{os.devnull}.part").exists()


def test_an_unfinished_output_leaves_no_file(tmp_path):
    def fail(error):
        with open_output(str(tmp_path / "out")) as file:
            file.write("half")
            raise error

    for error in (PoolError("an OSError too, but not the output's"), KeyboardInterrupt()):
        with pytest.raises(type(error), match=f"^{error}$"):
            fail(error)
        assert not list(tmp_path.iterdir())


# ---- list, show, verify --------------------------------------------------------------------------


def test_list_shows_the_pool(run):
    found = run("list", "--json", backbone=False)
    assert found.code == 0
    assert found.json == {"adapters": {n: printed(n) for n in sorted(TOYS)}, "damaged": {}}
    table = run("list", backbone=False).out
    assert all(word in table for word in ("sentiment", "accuracy", "generation", "perplexity"))
    empty = run("list", "--pool", "nowhere", backbone=False)
    assert (empty.code, empty.out) == (0, "")
    assert "there are no adapters in nowhere" in empty.err
    assert not Path("nowhere").exists()


def test_list_shows_damaged_and_plain_peft_adapters(run):
    Path("adapters/qa/adapterhub.json").write_text('{"name": "qa"}')
    Path("adapters/generation/adapterhub.json").unlink()
    found = run("list", "--json", backbone=False).json
    assert found["adapters"] == {"generation": None, "sentiment": printed("sentiment")}
    assert "backbone: is missing" in found["damaged"]["qa"]
    shown = run("list", backbone=False)
    assert shown.code == 0
    assert "unverified" in shown.out
    assert "damaged: " in shown.err


def test_show_gives_the_card_or_the_manifest(run):
    assert run("show", "qa", "--json", backbone=False).json == printed("qa")
    card = run("show", "qa", backbone=False).out
    assert card.strip() == Path("adapters/qa/README.md").read_text().strip()
    Path("adapters/qa/adapterhub.json").unlink()
    assert run("show", "qa", "--json", backbone=False).json == {"status": "unverified"}
    assert "nothing about it is verified" in run("show", "qa", backbone=False).out


def test_rollback_exchanges_the_two_versions(run):
    first = manifest("qa")
    assert run("train", "qa", "--max-steps", "1", "--seed", "7", "--test-examples", "0").code == 0
    second = manifest("qa")
    assert second["sha256"] != first["sha256"]
    done = run("rollback", "qa", "--json", backbone=False)
    told = {"adapter": "qa", "sha256": first["sha256"], "created": first["created"]}
    assert (done.code, done.json, manifest("qa")) == (0, told, first)
    again = run("rollback", "qa", backbone=False)
    assert second["sha256"][:12] in again.out
    assert manifest("qa") == second
    assert run("verify", "qa").code == 0


def test_verify_exit_code_is_0_only_when_ok(run, other_folder):
    good = run("verify", "qa", "--json")
    assert (good.code, good.json) == (0, {"ok": True, "status": "exact", "problems": []})
    assert run("verify", "qa").out.strip() == "qa: exact"
    assert run("verify", "adapters/qa", "--json").json["ok"]
    args = ("--backbone", other_folder, "--dtype", "fp32", "--device", "cpu")
    foreign = run("verify", "qa", *args, "--json", backbone=False)
    assert (foreign.code, foreign.json["ok"], foreign.json["status"]) == (1, False, "refused")
    assert any("weights" in problem for problem in foreign.json["problems"])
    weights = Path("adapters/qa/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    broken = run("verify", "qa", "--json")
    assert (broken.code, broken.json["ok"]) == (1, False)
    assert any("sha256" in problem for problem in broken.json["problems"])
    assert "refused" in run("verify", "qa").out
    Path("adapters/generation/adapterhub.json").unlink()
    plain = run("verify", "generation", "--json")
    assert (plain.code, plain.json["status"]) == (0, "unverified")


# ---- chat ----------------------------------------------------------------------------------------


def test_chat_obeys_piped_lines(run):
    lines = ["/list", "good film", "/use sentiment", "/mix sentiment=0.5 qa=0.5", "Hello", "/jump"]
    done = run("chat", "--adapter", "qa", stdin="\n".join([*lines, "/reset", "/quit", "never"]))
    assert done.code == 0
    assert "* qa\n" in done.out
    assert "  backbone\n" in done.out
    prompts = [
        line.partition("> ")[0] for line in done.out.splitlines() if line.startswith(("qa>", "s"))
    ]
    assert "error: unknown command /jump" in done.out
    assert "sentiment=0.5 qa=0.5> " in done.out
    assert prompts
    assert "never" not in done.out
    assert run("chat", stdin="/help").code == 0  # the end of the input ends it too


def test_chat_answers_as_the_hub_does(run, pico_folder):
    hub = AdapterHub(str(pico_folder), "adapters", dtype="fp32", device="cpu")
    (wanted,) = hub.chat([[{"role": "user", "content": "good film"}]], ["sentiment"])
    out = run("chat", "--adapter", "sentiment", stdin="good film\n").out
    assert f"sentiment> {wanted}\n" in out


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_an_interrupted_run_is_resumed_as_it_was_ordered(run, here, monkeypatch):
    """Ctrl-C after a few steps, then --resume: the adapter that an undisturbed run gives."""
    order = ("qa", "--max-steps", 9, "--rows-per-step", 1, "--row-length", 64, "--epochs", 99)
    more = ("--patience", 0, "--test-examples", 0, "--save-steps", 2, "--save-minutes", 0)
    assert run("train", *order, *more, "--pool", "whole", "--run-dir", "a").code == 0
    log = RunLog.__call__

    def press(self, event):
        log(self, event)
        if event.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "__call__", press)
    assert run("train", *order, *more, "--pool", "again", "--run-dir", "b").code == 130
    assert manifest("qa", "again")["training"]["stopped"] == "interrupted"
    monkeypatch.setattr(RunLog, "__call__", log)
    done = run("train", "--resume", "--run-dir", "b", backbone=False)
    assert done.code == 0, done.err
    assert manifest("qa", "again")["sha256"] == manifest("qa", "whole")["sha256"]
    assert manifest("qa", "again")["training"]["steps"] == 9
    assert not (here / "b" / "state" / "run").exists()
    late = run("train", "--resume", "--run-dir", "b", backbone=False)
    assert (late.code, "the run in b has finished" in late.err) == (2, True)


def test_an_impossible_resume_is_an_error(run, here):
    assert "--resume needs --run-dir" in run("train", "--resume", backbone=False).err
    missing = run("train", "--resume", "--run-dir", "nowhere", backbone=False)
    assert (missing.code, "nowhere holds no run to resume" in missing.err) == (2, True)
    (here / "r").mkdir()
    (here / "r" / "run.json").write_text('{"rank": 3}')
    wrong = run("train", "--resume", "--run-dir", "r", backbone=False)
    assert "rank: no such key" in wrong.err
    more = run(
        "train", "qa", "--resume", "--run-dir", "r", "--rank", 3, "--pool", "p", backbone=False
    )
    assert "leave out a task, pool, rank" in more.err


def test_a_sweep_on_the_command_line(run, here):
    quick = ("--max-steps", 2, "--rows-per-step", 1, "--row-length", 64, "--test-examples", 0)
    done = run("train", "qa", "--sweep", "rank=2,4", "--sweep", "learning_rate=0.1,1e-9", *quick)
    assert done.code == 0, done.err
    assert "Settings tried, by validation loss" in done.out
    assert done.out.count("kept") == 1
    wrong = run("train", "qa", "--sweep", "rank=0", "--sweep", "speed=1", "--sweep", "alpha")
    assert wrong.code == 2
    for part in ("--sweep.rank: input", "--sweep.speed: no such key", "'alpha' is no sweep"):
        assert part in wrong.err


def test_shared_and_grown_runs_print_their_tables(run, here):
    quick = ("--max-steps", 6, "--rows-per-step", 1, "--row-length", 64, "--test-examples", 3)
    shared = run("train", "qa", "sentiment", "--how", "shared", *quick)
    assert shared.code == 0, shared.err
    assert "qa and sentiment" in shared.out
    grown = run("train", "qa", "sentiment", "--how", "sequence", "--grow", "--run-dir", "g", *quick)
    assert grown.code == 0, grown.err
    assert "backward transfer" in grown.out
    assert (here / "g" / "ledger.png").exists()


# ---- demo, bench ---------------------------------------------------------------------------------


def test_demo_runs_the_main_job(run, monkeypatch):
    monkeypatch.setattr(
        "adapterhub_chat.cli.demo.DEMO_SETTINGS", {"max_steps": 2, "rows_per_step": 1}
    )
    done = run("demo", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert list(found["adapters"]) == ["qa", "generation", "sentiment"]
    for name, row in found["adapters"].items():
        assert {"task", "metric", "score", "backbone_score"} <= set(row)
        assert row["task"] == name
        score = manifest(name, "runs/demo")["scores"][0]
        assert (row["score"], row["backbone_score"]) == (score["value"], score["backbone_value"])
    assert [r["adapter"] for r in found["mixed_batch"]] == [*found["adapters"], "backbone"]
    assert all(set(r) == {"adapter", "prompt", "output"} for r in found["mixed_batch"])
    assert found["seconds"] > 0
    assert (found["dtype"], found["device"]) == ("float32", "cpu")


def test_demo_prints_what_a_newcomer_needs(run, monkeypatch):
    monkeypatch.setattr("adapterhub_chat.cli.demo.DEMO_SETTINGS", {"max_steps": 1})
    done = run("demo", "--pool", "mine")
    assert done.code == 0, done.err
    assert "larger budget" in " ".join(done.err.split())
    for word in ("Hot swap", "One mixed batch", "adapterhub-chat chat --pool mine --adapter qa"):
        assert word in done.out


def test_bench_rejects_unknown_kinds(run):
    failed = run("bench", "speed", backbone=False)
    assert (
        failed.code,
        "'speed': allowed are kernels, mixed, pool, swap, train" in failed.err,
    ) == (
        2,
        True,
    )


def test_bench_takes_peers_where_they_are_measured(run):
    failed = run("bench", "kernels", "--peers", "there", backbone=False)
    assert (failed.code, "only bench mixed measures other engines" in failed.err) == (2, True)
    failed = run("bench", "mixed", "--peers", "nowhere", backbone=False)
    assert (failed.code, "make it with scripts/install_peers nowhere" in failed.err) == (2, True)
    failed = run("bench", "kernels", "--dtype", "fp32", backbone=False)
    assert (failed.code, "only bench train and bench swap take another" in failed.err) == (2, True)
    failed = run("bench", "swap", "--graphs", backbone=False)
    assert (failed.code, "only bench mixed decodes" in failed.err) == (2, True)
    failed = run("bench", "train", "--dtype", "int3", backbone=False)
    assert (failed.code, "dtype='int3': allowed are" in failed.err) == (2, True)


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (("eval", "--adapter", "nobody"), "unknown adapter 'nobody'; known: generation, qa, sent"),
        (("eval", "--adapter", "qa", "--task", "nothing"), "unknown task 'nothing'; known: "),
        (("eval", "--pool", "empty"), "nothing to evaluate"),
        (("eval", "--adapter", "backbone"), "does not say what it was trained on; name tasks"),
        (("predict", "--adapter", "nobody"), "unknown adapter 'nobody'"),
        (("predict", "--adapter", "backbone"), "has no prompt contract; name a task"),
        (("chat", "--adapter", "nobody"), "unknown adapter 'nobody'"),
        (("show", "nobody"), "unknown adapter 'nobody'"),
        (("verify", "nobody"), "unknown adapter 'nobody'"),
        (("rollback", "nobody"), "unknown adapter 'nobody'"),
        (
            ("rollback", "qa"),
            "adapter 'qa' has no earlier version in the pool adapters: one is kept",
        ),
        (("train", "nothing"), "unknown task 'nothing'; known: "),
        (("train", "no/such.toml"), "unknown task 'no/such.toml'"),
        (("train",), "nothing to train: name tasks"),
        (("train", "qa", "qa"), "two adapters are called qa"),
        (
            ("train", "qa", "--how", "both"),
            "how: input should be 'joint', 'sequence' or 'shared'; got 'both'",
        ),
        (
            ("train", "qa", "--rank", "0"),
            "settings.rank: input should be greater than or equal to 1",
        ),
        (("train", "qa", "--config", "no.toml"), "no.toml: cannot be read: No such file"),
        (
            ("train", "qa", "--targets", "q_prj"),
            "no linear layer named q_prj; allowed are all-linear",
        ),
        (("train", "qa", "--name", "backbone"), "'backbone' is a reserved word"),
        (("train", "qa", "--quantize", "int2"), "quantize: input should be 'nf4' or 'int8'"),
        (("list", "--pool", "tasks/qa.toml"), "tasks/qa.toml is a file, not a folder"),
        (("train", "qa", "--pool", "tasks/qa.toml"), "tasks/qa.toml is a file, not a folder"),
        (("train", "tasks/empty.toml"), "empty.csv holds no rows"),
        (("train", "tasks/label.toml"), "label 'maybe' is not one of bad, good"),
        (("train", "tasks/wrong.toml"), "wrong.toml: 3 problems"),
    ],
)
def test_errors_print_one_message_and_change_no_file(run, here, args, wanted):
    (here / "tasks/empty.csv").write_text("text,answer\n")
    (here / "tasks/label.csv").write_text("text,answer\na,good\nb,maybe\n")
    for name in ("empty", "label"):
        (here / f"tasks/{name}.toml").write_text(
            f'metric = "accuracy"\n[data]\npath = "{name}.csv"\n[columns]\ntext = "text"\n'
            'answer = "answer"\n[labels]\nbad = "bad"\ngood = "good"\n'
        )
    (here / "tasks/wrong.toml").write_text(
        'metric = "speed"\nabuot = "x"\n[data]\npath = "no.csv"\n[columns]\ntext = "t"\nanswer = "a"'
    )
    before = snapshot(here)
    failed = run(*args, backbone=args[0] not in ("list", "show", "rollback"))
    assert (failed.code, failed.out) == (2, "")
    assert failed.err.splitlines()[-1 - failed.err.count("\n  - ")].startswith("error: ")
    assert wanted in failed.err
    assert "Traceback" not in failed.err
    assert snapshot(here) == before


@pytest.mark.parametrize("verb", ["train qa", "eval", "predict --adapter qa", "chat", "verify qa"])
def test_an_unknown_backbone_error_lists_the_packaged_ones(run, here, verb):
    before = snapshot(here)
    failed = run(*verb.split(), "--backbone", "./no-such-model", backbone=False)
    assert failed.code == 2
    assert "unknown backbone './no-such-model'; known: " in failed.err
    assert "smollm2-135m" in failed.err
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--dtype", "fp8"), "dtype='fp8': allowed are"),
        (("--device", "abacus"), "device='abacus' cannot be used here"),
        (("--quantize", "int2"), "quantize='int2': allowed are None, 'nf4' and 'int8'"),
    ],
)
def test_precision_and_device_are_checked(run, pico_folder, flags, wanted):
    failed = run("eval", "--backbone", pico_folder, *flags, backbone=False)
    assert (failed.code, wanted in failed.err) == (2, True)


@pytest.mark.parametrize(
    "args",
    [("train", "--rang", "8"), ("jump", "-x"), ("eval", "--limit", "-1"), ("train", "--rank", "x")],
)
def test_options_that_do_not_exist_exit_with_2(run, args):
    failed = run(*args, backbone=False)
    assert (failed.code, failed.out) == (2, "")
    assert "Traceback" not in failed.err
    assert args[-1] in failed.err or args[-2] in failed.err


def test_messages_keep_brackets_and_backslashes_and_stay_on_their_line(run, here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    name = r"[bold]a\[1, 2]" + "long" * 30
    failed = run("show", name, backbone=False)
    assert repr(name) in failed.err
    assert len(failed.err.strip().splitlines()) == 1


# ---- real processes ------------------------------------------------------------------------------


@contextmanager
def process(*args):
    """`python -m adapterhub_chat ARGS` as a process of its own, ended with the block."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    started = subprocess.Popen(
        [sys.executable, "-m", "adapterhub_chat", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_a_separate_process_reads_standard_input(here, pico_folder):
    base = ("--backbone", pico_folder, "--dtype", "fp32", "--device", "cpu")
    asked = '{"text": "good film"}\n{"text": "bad film"}\n'
    with process("predict", "--adapter", "sentiment", *base) as good:
        out, err = good.communicate(asked, timeout=PATIENCE)
    assert (good.returncode, err) == (0, "")
    assert [json.loads(line)["adapter"] for line in out.splitlines()] == ["sentiment"] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_real_ctrl_c_keeps_the_best_and_says_so(here, pico_folder):
    log = here / "log" / "metrics.jsonl"
    with process(
        *("train", "sentiment", "--name", "mine", "--run-dir", "log", "--pool", "adapters"),
        *("--epochs", 1e6, "--max-steps", 10**6, "--eval-every", 3, "--patience", 0),
        *("--eval-examples", 4, "--rows-per-step", 1, "--row-length", 128),
        *("--backbone", pico_folder, "--dtype", "fp32", "--device", "cpu"),
    ) as training:
        until = time.monotonic() + PATIENCE
        while not (log.exists() and "validation" in log.read_text()):
            assert training.poll() is None, training.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        training.send_signal(signal.SIGINT)
        _, err = training.communicate(timeout=PATIENCE)
    assert training.returncode == 130
    assert "interrupted: the best so far of mine is saved, not measured" in " ".join(err.split())
    assert "Traceback" not in err
    made = manifest("mine")
    assert made["training"]["stopped"] == "interrupted"
    assert made["training"]["best_step"] > 0
    assert made["scores"] == []
    hub = AdapterHub(str(pico_folder), here / "adapters", dtype="fp32", device="cpu")
    assert hub.verify("mine").status == "exact"
    assert not list((here / "adapters").glob(".tmp*"))
