"""The rules of the layout: floors, doors and sizes of the package, read off its source by one `ast` walk."""

import ast
import builtins
import collections.abc
import importlib
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import adapterhub_chat
from docs.draw_architecture import FLOORS

ROOT = Path(__file__).parent.parent
PACKAGE = "adapterhub_chat"
FACE = ROOT / PACKAGE / "__init__"
MODULES = {
    ".".join(p.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(
        ".__init__"
    ): p.read_text("utf-8")
    for p in sorted((ROOT / PACKAGE).rglob("*.py"))
    if "_shipped" not in p.parts and p.stem != "__main__" and p.parent / p.stem != FACE
}
TASKS = {p.stem: p.read_text("utf-8") for p in sorted((ROOT / "tasks").glob("*.py"))}

FLOOR = {package: number for number, names in enumerate(FLOORS) for package in names.split()}
FLOOR[""] = FLOOR["api"]  # the public face; it imports a module when a name of it is asked for
GROUND = FLOORS[0].split()

# Third-party library -> the modules that may import it. torch may be anywhere above the ground floor.
DOORS = {
    "accelerate": "training.distributed",
    "cmaes": "merge.weight_search",
    "datasets": "data.readers data.task_file",
    "filelock": "assets.fetch files pool.transaction",
    "gguf": "export.gguf_adapter",
    "huggingface_hub": "remote.client remote.limits",
    "numpy": "artifact.guard artifact.prototype artifact.safetensors_header data.metrics "
    "merge.weight_search model.e5s1",
    "psutil": "model.devices",
    "pydantic": "artifact.manifest artifact.prototype cli.options config data.task_file pool.lockfile "
    "remote.signing validation",
    "pydantic_core": "validation",
    "rich": "cli.output",
    "safetensors": "artifact.folder training.checkpoint",
    "tokenizers": "model.e5s1",
    "torch": " ".join(module for module in MODULES if module.partition(".")[0] not in GROUND),
    "transformers": "export.merged_model inference.stateful_decoder model.attention model.backbone "
    "model.e5s1 model.encoders model.masks model.resolve",
    "typer": "cli.app cli.bench cli.chat_session cli.demo cli.merge cli.options "
    "cli.pool cli.predict cli.remote cli.rollback cli.route cli.train cli.transfer",
    "yaml": "artifact.card",
}
LAZY = {
    ("data.readers", "datasets"),
    ("data.task_file", "datasets"),
    ("cli.app", "importlib.import_module"),  # a verb's module, when the verb is called
    (
        "model.quantization",
        "importlib.import_module",
    ),  # bitsandbytes, whose own import takes seconds
    ("training.run_log", "importlib.import_module"),
    ("bench.mixed", "importlib.import_module"),  # peft, the peer
    ("report.plots", "importlib.import_module"),
    ("remote.signing", "importlib.import_module"),
    ("bench.swap", "importlib.import_module"),  # peft, the peer
    ("bench.train", "importlib.import_module"),  # peft, the peer
}
"""The doors of heavy or optional libraries: what may be imported inside a function."""
IMPORT_CALLS = {"__import__", "importlib.import_module", "import_module"}
NO_IMPORT = {"adapters", "tasks"}
"""Folders of the repository; `adapters` is another library's import name."""
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_MODULE, MAX_FUNCTION, MAX_METHODS = 400, 60, 25
"""Lines of a module without its docstrings, of a function's body, and methods of a class but AdapterHub."""
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


def package_imports(source: str) -> set[str]:
    """Return the package's modules that `source` imports; "" stands for the public face."""
    parts = (name.split(".")[1:] for name in imports(ast.parse(source)) if name.startswith(PACKAGE))
    return {_module_of(part) for part in parts}


def _module_of(path: list[str]) -> str:
    """Return the longest beginning of a dotted path that is a module."""
    beginnings = (".".join(path[:length]) for length in range(len(path), 0, -1))
    return next((beginning for beginning in beginnings if beginning in MODULES), "")


def code_lines(source: str) -> int:
    """Count the lines that belong to no docstring."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    texts = [
        n for n in nodes if isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    ]
    return len(source.splitlines()) - sum((n.end_lineno or 0) - n.lineno + 1 for n in texts)


def misfits(module: str, source: str) -> Iterator[str]:
    """Yield every rule that one module breaks."""
    tree = ast.parse(source)
    yield from _layer_misfits(module, source)
    yield from _door_misfits(module, tree)
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        for name in imports(function):
            if {(module, name), (module, name.partition(".")[0])}.isdisjoint(LAZY):
                yield f"hidden: {name} is imported inside {function.name}"
        if (lines := (function.end_lineno or 0) - function.body[0].lineno + 1) > MAX_FUNCTION:
            yield f"size: {function.name} has {lines} lines"
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        methods = [part for part in node.body if isinstance(part, Function)]
        if len(methods) > MAX_METHODS and node.name != "AdapterHub":
            yield f"size: {node.name} has {len(methods)} methods"
    if (lines := code_lines(source)) > MAX_MODULE:
        yield f"size: {module} has {lines} lines"
    if module.rpartition(".")[2] in DRAWERS:
        yield f"name: {module} says nothing"
    if unfinished := UNFINISHED.search(source):
        yield f"unfinished: {unfinished[0]}"


def _layer_misfits(module: str, source: str) -> Iterator[str]:
    package = module.partition(".")[0]
    if package not in FLOOR:
        yield f"layer: {module} stands on no floor"
        return
    for other in package_imports(source):
        imported = other.partition(".")[0]
        beside = imported == package or (imported in GROUND and package in GROUND)
        if not beside and FLOOR[imported] >= FLOOR[package]:
            yield f"layer: {module} imports {other or PACKAGE}"


def _door_misfits(module: str, tree: ast.AST) -> Iterator[str]:
    for name in imports(tree):
        library = name.partition(".")[0]
        if name.startswith("."):
            yield "relative: an import names the package"
        elif library in NO_IMPORT:
            yield f"import: {library} is a folder of the repository"
        elif library not in STANDARD and module not in DOORS.get(library, "").split():
            yield f"door: {library} is not imported by {module}"


def definitions(source: str) -> Iterator[str]:
    """Yield the public names that a module defines."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | Function):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def homonyms(sources: Mapping[str, str]) -> dict[tuple[int, str], list[str]]:
    """Return the public names that two modules of one floor define, with those modules."""
    modules: dict[tuple[int, str], list[str]] = {}
    for module, source in sources.items():
        floor = FLOOR[module.partition(".")[0]]
        for name in dict.fromkeys(definitions(source)):
            modules.setdefault((floor, name), []).append(module)
    return {key: those for key, those in modules.items() if len(those) > 1}


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Return the modules of an import cycle, none where there is none."""
    try:
        TopologicalSorter({m: package_imports(source) for m, source in sources.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    assert not list(misfits(module, MODULES[module]))


def test_every_package_has_a_floor_and_a_sentence_and_every_door_is_used():
    assert {module.partition(".")[0] for module in MODULES} <= FLOOR.keys()
    assert all(ast.get_docstring(ast.parse(source)) for source in MODULES.values())
    for library in DOORS.keys() - {"torch"}:
        for module in DOORS[library].split():
            names = imports(ast.parse(MODULES[module]))
            assert library in {name.partition(".")[0] for name in names}, (library, module)


def test_there_is_no_import_cycle():
    assert not cycle(MODULES)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_file_imports_only_the_ground_floor_assets_and_data(task):
    source = TASKS[task]
    packages = {module.partition(".")[0] for module in package_imports(source)}
    assert packages <= {*GROUND, "assets", "data"}
    libraries = {name.partition(".")[0] for name in imports(ast.parse(source))}
    assert libraries <= STANDARD | {"", "datasets", "yaml"}


def test_the_public_names_are_sorted_and_true():
    assert adapterhub_chat.__all__ == sorted(adapterhub_chat._MODULES)
    for name in adapterhub_chat.__all__:
        defined = importlib.import_module(f"{PACKAGE}.{adapterhub_chat._MODULES[name]}")
        assert getattr(adapterhub_chat, name) is vars(defined)[name]
        assert name in definitions(MODULES[adapterhub_chat._MODULES[name]])
    assert set(adapterhub_chat.__all__) <= set(dir(adapterhub_chat))
    with pytest.raises(AttributeError, match="'nothing'"):
        adapterhub_chat.nothing  # noqa: B018 - it raises


def test_no_public_name_is_defined_in_two_modules_of_one_floor():
    assert not homonyms(MODULES)


def test_all_types_in_public_signatures_can_be_imported_from_the_root():
    known = {
        *dir(builtins),
        *vars(typing),
        *vars(collections.abc),
        "Path",
        "torch",
        "Tensor",
        "device",
    }
    tree = ast.parse(MODULES["api"])
    hub = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "AdapterHub")
    methods = [n for n in hub.body if isinstance(n, Function)]
    named = set()
    for method in methods:
        if method.name.startswith("_") and method.name != "__init__":
            continue
        arguments = [*method.args.args, *method.args.kwonlyargs]
        for annotation in filter(None, [method.returns, *(a.annotation for a in arguments)]):
            named |= {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    assert {"TrainSpec", "Manifest", "Sequence"} <= named
    assert named - known <= set(adapterhub_chat.__all__)


# ---- the rules themselves can be broken ----------------------------------------------------------

LONG = "def f():\n" + "    x = 1\n" * 61
DOCUMENTED = "def f(\n" + "    x=1,\n" * 61 + "):\n    return x\n"


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("types", "from adapterhub_chat.data.task import Task", "layer"),
        ("data.task", "from adapterhub_chat.lora.bank import Bank", "layer"),  # of one floor
        ("model.backbone", "from adapterhub_chat.training import loop", "layer"),
        ("training.loop", "import adapterhub_chat.transfer.run", "layer"),
        ("pool.pool", "from adapterhub_chat import AdapterHub", "layer"),
        ("artifact.card", "if TYPE_CHECKING:\n    from adapterhub_chat.api import X", "layer"),
        ("brandnew", "", "layer"),
        ("model.backbone", "from .lora import Bank", "relative"),
        ("api", "import adapters", "import"),
        ("api", "from tasks.qa import task", "import"),
        ("model.features", "import transformers", "door"),
        ("errors", "from torch import Tensor", "door"),
        ("training.loop", "import peft", "door"),
        ("pool.pool", "from huggingface_hub import HfApi", "door"),
        ("data.task_file", "import yaml", "door"),
        ("training.loop", "def f():\n    import json", "hidden"),
        (
            "api",
            "class A:\n    def f(self):\n        from adapterhub_chat.errors import X",
            "hidden",
        ),
        ("api", "async def f():\n    import json", "hidden"),
        ("data.task", "def f():\n    return importlib.import_module('json')", "hidden"),
        ("api", "def f():\n    return __import__('json')", "hidden"),
        ("api", LONG, "size"),
        ("api", "x = 1\n" * 401, "size"),
        ("api", "class A:\n" + "".join(f"    def f{n}(self): ...\n" for n in range(26)), "size"),
        ("data.utils", "", "name"),
        ("api", "# TODO: later", "unfinished"),
        ("api", "def f():\n    raise NotImplementedError", "unfinished"),
    ],
)
def test_a_rule_sees_its_misfit(module, source, rule):
    assert rule in {misfit.partition(":")[0] for misfit in misfits(module, source)}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("api", "from adapterhub_chat.evaluation import scoring"),
        ("pool.pool", "from adapterhub_chat.artifact.card import render_card"),
        ("errors", "from adapterhub_chat.types import Mix"),
        ("data.readers", "def f():\n    import datasets"),
        ("training.run_log", "def f():\n    return importlib.import_module('json')"),
        ("lora.kernels", "import torch\nfrom torch.nn import functional"),
        ("api", DOCUMENTED),
        ("api", "x = 1\n" * 399 + '"""Two\nlines."""\n'),
        ("api", "class AdapterHub:\n" + "    def f(self): ...\n" * 26),
    ],
)
def test_a_rule_lets_pass_what_is_fine(module, source):
    assert not list(misfits(module, source))


def test_a_cycle_is_seen():
    looped = {
        "pool.pool": "from adapterhub_chat.artifact.card import x",
        "artifact.card": "import adapterhub_chat.pool.pool",
    }
    assert set(cycle(looped)) == {"pool.pool", "artifact.card"}
    assert not cycle({"pool.pool": looped["pool.pool"], "artifact.card": "import json"})


def test_a_name_of_two_modules_is_seen():
    twice = {"pool.pool": "KEPT = 1", "pool.names": "def KEPT(): ...", "model.source": "KEPT = 2"}
    assert homonyms(twice) == {(FLOOR["pool"], "KEPT"): ["pool.pool", "pool.names"]}


# ---- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list", "--help"],
        ["list", "--pool", "{pool}"],
        ["list", "--pool", str(ROOT / "adapters")],  # with prototypes in their manifests
        ["show", "qa", "--pool", str(ROOT / "adapters")],
    ],
)
def test_help_and_list_import_neither_torch_nor_transformers(arguments, tmp_path):
    words = [word.format(pool=tmp_path) for word in arguments]
    command = [sys.executable, "-X", "importtime", "-m", PACKAGE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert {"torch", "transformers"}.isdisjoint(imported)
