"""Tasks: a sequence of examples plus a judge. A mixture of tasks is a task.

A task is a file: `tasks/NAME.py` with `def task() -> Task`, or, without code, `tasks/NAME.toml` that
points at the user's data (see task_file.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

from adapterhub_chat.data.metrics import judge_misfits
from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.data.readers import TABLES, Row, read_rows
from adapterhub_chat.data.splits import Splits, input_key, split_examples
from adapterhub_chat.data.task_file import TaskParts, read_task_file
from adapterhub_chat.errors import ConfigError, DataError, UnknownNameError
from adapterhub_chat.types import SPLITS, Example, PromptContract, Split


@dataclass(frozen=True, eq=False)
class Task:
    """Examples plus a judge: what an adapter learns, how it is asked, what counts as right."""

    name: str
    contract: PromptContract
    metric: str
    """A key of METRICS."""
    load: Callable[[], Splits]
    """Reads the data; called once, when the first split is asked for."""
    language: str = "en"
    about: str = ""
    licence: str = "unknown"
    sources: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    """Names of the tasks that a mixture is made of."""

    def __post_init__(self) -> None:
        """Refuse a metric that cannot judge these answers."""
        misfits = list(judge_misfits(self.metric, self.contract.labels))
        if misfits:
            raise ConfigError(f"task {self.name!r}", misfits)

    @cached_property
    def splits(self) -> Splits:
        """All splits, with the count of what was dropped."""
        return self.load()

    def split(self, split: Split) -> Sequence[Example]:
        """Return the examples of one split (none where the data leaves none for it)."""
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        return self.splits.parts.get(split, ())

    def contract_of(self, example: Example) -> PromptContract:
        """Return how the model is asked for `example`: its own contract in a mixture."""
        return example.contract or self.contract

    def data_hash(self) -> str:
        """Return the sha256 of all examples of all splits: the identity of the data."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for example in self.split(split):
                turns = [(turn.role, turn.content) for turn in example.history]
                answers = [example.answer, *example.references]
                content = [split, dict(example.fields), answers, turns, example.group]
                digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()


def mixture(name: str, tasks: Sequence[Task], weights: Sequence[float] | None = None) -> Task:
    """Return the task of all examples of `tasks`, each asked by its own contract.

    `weights` says how often each member's training examples are taken: 0.5 is half of them, 2 all
    of them twice. An input that members have in different splits stays in the most held-out one.
    Prompts that come without an example use the first member's contract.
    """
    shares = [1.0] * len(tasks) if weights is None else list(weights)
    if not tasks or len(shares) != len(tasks) or min(shares) < 0:
        raise ConfigError(f"mixture {name!r}", ["give one or more tasks, and one weight >= 0 each"])
    if len({task.metric for task in tasks}) > 1:
        metrics = ", ".join(f"{task.name}: {task.metric}" for task in tasks)
        raise DataError(f"mixture {name!r}: one metric must judge all members, not {metrics}")

    def load() -> Splits:
        parts: dict[Split, tuple[Example, ...]] = {}
        held_out: set[str] = set()
        for split in reversed(SPLITS):
            taken: list[Example] = []
            for task, share in zip(tasks, shares, strict=True):
                own = [replace(e, contract=task.contract_of(e)) for e in task.split(split)]
                free = [e for e in own if input_key(e, task.contract_of(e)) not in held_out]
                whole, rest = divmod(share if split == "train" else 1.0, 1)
                taken += free * int(whole) + free[: round(rest * len(free))]
            held_out |= {input_key(e, e.contract or tasks[0].contract) for e in taken}
            random.Random(name + split).shuffle(taken)
            parts[split] = tuple(taken)
        return Splits(parts)

    return Task(
        name=name,
        contract=tasks[0].contract,
        metric=tasks[0].metric,
        load=load,
        language=", ".join(dict.fromkeys(task.language for task in tasks)),
        about="Mixture of " + ", ".join(task.name for task in tasks),
        licence=", ".join(dict.fromkeys(task.licence for task in tasks)),
        sources=tuple(dict.fromkeys(source for task in tasks for source in task.sources)),
        members=tuple(task.name for task in tasks),
    )


# ---- task files ----------------------------------------------------------------------------------


def list_tasks() -> dict[str, Path]:
    """Return the task files by name: those of ./tasks come before the built-in ones."""
    here = Path(__file__).parent.parent
    folders = (Path("tasks"), here.parent / "tasks", here / "_shipped" / "tasks")
    found: dict[str, Path] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*"))):
        if path.suffix in _LOADERS and not path.stem.startswith("_"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load_task(name_or_path: str | Path) -> Task:
    """Return the task of that name (see `list_tasks`) or of a .py or .toml file."""
    path = Path(name_or_path)
    if path.suffix not in _LOADERS or not path.is_file():
        known = list_tasks()
        if str(name_or_path) not in known:
            cure = "Or give the path of a .py or .toml file."
            raise UnknownNameError("task", str(name_or_path), known, cure)
        path = known[str(name_or_path)]
    return _LOADERS[path.suffix](path)


def as_task(task: str | Path | Task) -> Task:
    """Return a task, loaded where it is a name or a path."""
    return task if isinstance(task, Task) else load_task(task)


def _load_python(path: Path) -> Task:
    name = f"{_package_of(path.parent.resolve())}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up there
    spec.loader.exec_module(module)
    made = module.task() if callable(getattr(module, "task", None)) else None
    if not isinstance(made, Task):
        raise ConfigError(str(path), ["the file must define `def task() -> Task`"])
    return made


def _package_of(folder: Path) -> str:
    """Return the name of a package that stands for `folder`, so that task files may import `._module`."""
    name = f"{__name__}s_{hashlib.sha256(bytes(folder)).hexdigest()[:12]}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


def _load_toml(path: Path) -> Task:
    parts = read_task_file(path)
    return Task(path.stem, **{name: getattr(parts, name) for name in TaskParts.__slots__})


_LOADERS: Mapping[str, Callable[[Path], Task]] = {".py": _load_python, ".toml": _load_toml}


ANSWERS = ("label", "answer")
"""Names that the column of the answers may have."""
VALIDATION, TEST = 0.3, 0.2
"""Shares of the labelled rows, which are few: what is judged on a tenth of them is judged by chance."""


def is_table(path: str | Path) -> bool:
    """Return whether a path names a table, such as a CSV, and no task file."""
    return Path(path).suffix in TABLES


def table_task(path: Path, like: Task) -> tuple[Task, list[Example]]:
    """Return the task of a table's labelled rows, asked as `like` is, and its rows without a label.

    Its columns are called as the fields of `like`'s prompt are, and `label` (or `answer`). Where no row has
    a label the task has no examples. Raises DataError for a file that cannot be read or lacks a column.
    """
    rows = read_rows(path)
    fields = placeholders(like.contract.template)
    answer = next((name for name in ANSWERS if name in rows[0]), None)
    lost = [name for name, required in fields.items() if required and name not in rows[0]]
    if lost or answer is None:
        wanted = ", ".join([*lost, *([] if answer else ["label (or answer)"])])
        raise DataError(f"{path} has no column {wanted}; it has {', '.join(rows[0])}")
    examples = [_example(row, [*fields], answer) for row in rows]
    examples = [e for e in examples if e.answer or e.fields]  # an empty line is no row
    known = [e for e in examples if e.answer]

    def load() -> Splits:
        if not known:
            return Splits(dict.fromkeys(SPLITS, ()))
        shares = {"validation": VALIDATION, "test": TEST}
        return split_examples(known, like.contract, **shares, source=str(path))

    about = f"The rows of {path.name}, asked as {like.name}."
    task = Task(path.stem, like.contract, like.metric, load, about=about, sources=(path.name,))
    return task, [e for e in examples if not e.answer]


def _example(row: Row, fields: list[str], answer: str) -> Example:
    texts = {name: said for name in fields if (said := _said(row.get(name)))}
    return Example(texts, _said(row.get(answer)).strip())


def _said(cell: object) -> str:
    """Return a cell as text; 0 and False are said, too."""
    return "" if cell is None else str(cell)
