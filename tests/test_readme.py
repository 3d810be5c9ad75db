"""What README.md and docs/ say is so: commands parse, files exist, snippets run (on a pico model)."""

import ast
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub_chat import AdapterHub
from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.cli.app import VERBS as NAMES
from adapterhub_chat.cli.app import load_verb
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.task import load_task
from adapterhub_chat.training.run_file import read_run
from docs import draw_architecture

ROOT = Path(__file__).parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README = (ROOT / "README.md").read_text("utf-8")
VERBS = {name: load_verb(name) for name in NAMES}
HUB_ID = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """Return every `adapterhub-chat ...` of the README's shell blocks, as words."""
    lines = "".join(blocks("bash")).splitlines()
    parts = (part.strip() for line in lines for part in re.split(r"&&|\|", line))
    return [shlex.split(part)[1:] for part in parts if part.startswith("adapterhub-chat ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_line_parses(words):
    verb, *arguments = words
    VERBS[verb].make_context(verb, arguments)


def test_every_verb_is_in_the_table_and_every_verb_named_exists():
    table = set(re.findall(r"^\| `adapterhub-chat (\w+)", README, re.MULTILINE))
    assert table == set(VERBS)
    assert set(re.findall(r"adapterhub-chat (\w+)", README)) <= set(VERBS)


ELSEWHERE = {
    "README.md": {"--help"},
    "docs/merging.md": {"--adapters", "--methods"},
    "docs/performance.md": {"--enable-lora"},
    "docs/architecture.md": {"--help"},
    "docs/backbones.md": {"--markdown"},
    "docs/training.md": {"--cpu", "--help", "--num", "--steps"},
    "docs/transfer.md": {"--lines", "--pairs"},
}
"""Options that a page names of other programs: scripts of this repository, and peers."""


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_exists(page):
    known = {option for verb in VERBS.values() for p in verb.params for option in p.opts}
    text = PAGES[page].read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"[` ](--[a-z][a-z-]+)", prose))
    assert named - known == ELSEWHERE.get(page, set())


def test_the_first_screen_has_the_two_commands():
    first = "\n".join(README.splitlines()[:30])
    assert blocks("bash", first) == [
        "pip install -e . && adapterhub-chat demo\n",
        "pip install -e '.[dev]' && pytest\n",
    ]
    assert blocks("bash", first)[1].strip().split(" && ")[0] in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    text = PAGES[page].read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert all((PAGES[page].parent / link).exists() for link in links), links
    named = set(re.findall(r"\b((?:scripts|tasks|tests|docs)/[\w.-]*\w)", text))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_shown_task_is_the_file(tmp_path):
    pattern = r"<!-- file: (\S+) -->\n```toml\n(.*?)^```"
    shown = re.findall(pattern, README, re.DOTALL | re.MULTILINE)
    assert shown
    for name, text in shown:
        assert text == (ROOT / name).read_text("utf-8")
        folder = shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
        task = load_task(folder / Path(name).name)
        assert all(task.split(split) for split in ("train", "validation", "test"))


def test_the_other_toml_is_a_run(tmp_path):
    runs = [text for text in blocks("toml") if "[adapters." in text]
    assert len(runs) == len(blocks("toml")) - 1
    for number, text in enumerate(runs):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        run = read_run(path, [], [], {}, {})
        assert all(load_task(ROOT_TASK.get(e["task"], e["task"])) for e in run.adapters.values())


def test_the_runs_of_the_training_page_are_runs(tmp_path):
    shown = blocks("toml", PAGES["docs/training.md"].read_text("utf-8"))
    assert shown
    for number, text in enumerate([*shown, (ROOT / "docs" / "sharded.toml").read_text("utf-8")]):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        assert read_run(path, [], [], {}, {}).adapters


ROOT_TASK = {f"tasks/{p.name}": ROOT / "tasks" / p.name for p in (ROOT / "tasks").iterdir()}


def test_python_calls_what_the_hub_has():
    calls = [n for n in ast.walk(ast.parse("".join(blocks("python")))) if isinstance(n, ast.Call)]
    named = {ast.unparse(call.func): call for call in calls}
    of_hub = {name: call for name, call in named.items() if re.fullmatch(r"hub\.\w+", name)}
    assert {"hub.predict", "hub.chat", "hub.use", "hub.train", "hub.load"} <= of_hub.keys()
    for name, call in of_hub.items():
        given = {k.arg for k in call.keywords} - TrainConfig.model_fields.keys()
        method = getattr(AdapterHub, name.removeprefix("hub."))
        inspect.signature(method).bind(None, *call.args, **dict.fromkeys(given))


LABELS = '[labels]\nbad = "bad"\ngood = "good"\n'
TOY = '[data]\npath = "toy.csv"\n[columns]\ntext = "text"\nanswer = "answer"\n[prompt]\nmax_new_tokens = 2\n'


@pytest.fixture
def workplace(tmp_path, monkeypatch, pico_folder):
    """A folder with toy tasks under the names of the built-in ones, and a folder that PEFT saved."""
    (tmp_path / "tasks").mkdir()
    rows = "".join(
        f"film {i} {'good' if i % 2 else 'bad'},{'good' if i % 2 else 'bad'}\n" for i in range(99)
    )
    (tmp_path / "tasks" / "toy.csv").write_text(f"text,answer\n{rows}")
    for name, metric in (
        ("qa", "token_f1"),
        ("generation", "perplexity"),
        ("sentiment", "accuracy"),
    ):
        labels = LABELS if metric == "accuracy" else ""
        (tmp_path / "tasks" / f"{name}.toml").write_text(f'metric = "{metric}"\n{TOY}{labels}')
    base = AutoModelForCausalLM.from_pretrained(pico_folder)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "path" / "to" / "peft-folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_pico(snippet, pico_folder):
    """Return the snippet with the pico model's folder where it names a real model."""
    loads = "AdapterHub(backbone" in snippet or ".from_pretrained(" in snippet
    assert ("smollm2" in snippet or HUB_ID in snippet) == loads
    return snippet.replace('"smollm2-135m"', f'"{pico_folder}", dtype="fp32"').replace(
        HUB_ID, f'"{pico_folder}"'
    )


@pytest.mark.filterwarnings("ignore:adapter 'mine' is unverified")
def test_the_python_snippets_run(workplace, pico_folder, capsys):
    use, ask, train, *interop = (on_pico(snippet, pico_folder) for snippet in blocks("python"))
    AdapterHub(str(pico_folder), "adapters", dtype="fp32").train(
        ["qa", "generation", "sentiment"], max_steps=1, test_examples=0
    )
    names = {}
    exec(compile(use, "README.md", "exec"), names)
    assert len(names["answers"]) == 4
    assert capsys.readouterr().out.count("{'bad': ") == 2
    exec(compile(ask, "README.md", "exec"), names)
    assert "(TokenLogprob(token=" in capsys.readouterr().out
    exec(compile(train, "README.md", "exec"), names)
    assert [m.scores[0].metric for m in names["manifests"].values()] == [
        "token_f1",
        "perplexity",
        "accuracy",
    ]
    for snippet in interop:
        exec(compile(snippet, "README.md", "exec"), names)
    prompt = "film 1 good"
    with torch.no_grad():
        ids = names["hub"].backbone.tokenizer(prompt, return_tensors="pt").input_ids
        theirs = names["model"](ids).logits[0, -1]
    ours = names["hub"].next_token_logits([prompt], adapters=["qa"])[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-3)


def test_the_data_table_names_every_source_with_its_licence():
    told, names = dict.fromkeys((p.stem for p in (ROOT / "tasks").glob("[!_]*.py")), ""), []
    for row in README.partition("| task | data |")[2].partition("\n\n")[0].splitlines()[2:]:
        names = re.findall(r"`([\w-]+)`", row.split("|")[1]) or names  # an empty cell: as above
        for name in names:
            told[name] += row
    for name, text in told.items():
        for source in load_task(ROOT / "tasks" / f"{name}.py").sources:
            package, _, version = source.partition("==")
            (asset,) = (a for a in ASSETS.values() if a.archives[0].package == package)
            assert f"{package} {version}" in text
            assert asset.licence.partition(":")[0] in text


def test_the_tree_names_every_folder():
    (tree,) = blocks("text")
    named = {line.split()[0] for line in tree.splitlines()}
    ignored = (ROOT / ".gitignore").read_text().split()
    there = {f"{p.name}/" for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert there - set(ignored) <= named
    assert all((ROOT / name).exists() for name in named)


def test_the_sentence_of_a_verb_is_its_functions_docstring():
    for name, (_, sentence) in NAMES.items():
        assert VERBS[name].help.partition("\n")[0] == sentence


def test_the_architecture_page_is_drawn_from_the_docstrings():
    page = draw_architecture.PAGE.read_text("utf-8")
    assert draw_architecture.drawn(page) == page
    for module in re.findall(r"`(\w+/\w+\.(?:py|cpp|h))`", page):
        assert (ROOT / "adapterhub_chat" / module).is_file() or (ROOT / module).is_file(), module
