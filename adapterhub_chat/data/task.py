"""Tasks: examples with a prompt contract and a metric. A mixture of tasks is a task.

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
from adapterhub_chat.data.readers import TABLE_EXTENSIONS, Row, read_rows
from adapterhub_chat.data.splits import Splits, input_key, split_examples
from adapterhub_chat.data.task_file import TaskParts, read_task_file
from adapterhub_chat.errors import ConfigError, DataError, UnknownNameError
from adapterhub_chat.types import SPLITS, Example, PromptContract, Split


@dataclass(frozen=True, eq=False)
class Task:
    """Examples, the contract that prompts for them, and the metric that scores the answers."""

    name: str
    contract: PromptContract
    metric: str
    """A key of METRICS."""
    load: Callable[[], Splits]
    """Reads the data; called once, on first use."""
    language: str = "en"
    about: str = ""
    licence: str = "unknown"
    sources: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    """Names of the tasks that a mixture is made of."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a metric that cannot score these answers."""
        misfits = list(judge_misfits(self.metric, self.contract.labels))
        if misfits:
            raise ConfigError(f"task {self.name!r}", misfits)

    @cached_property
    def splits(self) -> Splits:
        """All splits, with the numbers of dropped examples."""
        return self.load()

    def split(self, split: Split) -> Sequence[Example]:
        """Return the examples of one split, which may be empty."""
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        return self.splits.parts.get(split, ())

    def contract_of(self, example: Example) -> PromptContract:
        """Return the contract of `example`: its own in a mixture, else the task's."""
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
    """Return the task of all examples of `tasks`, each with the contract of its task.

    `weights` are the shares of each member's training examples: 0.5 takes half of them, 2 all of them twice.
    An input that occurs in different splits stays in the most held-out one. Prompts without an example use
    the first member's contract.
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
            selected: list[Example] = []
            for task, share in zip(tasks, shares, strict=True):
                with_contracts = [
                    replace(e, contract=task.contract_of(e)) for e in task.split(split)
                ]
                allowed = [
                    e for e in with_contracts if input_key(e, task.contract_of(e)) not in held_out
                ]
                num_copies, remainder = divmod(share if split == "train" else 1.0, 1)
                selected += allowed * int(num_copies) + allowed[: round(remainder * len(allowed))]
            held_out |= {input_key(e, e.contract or tasks[0].contract) for e in selected}
            random.Random(name + split).shuffle(selected)
            parts[split] = tuple(selected)
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
    """Return the task files by name; files of ./tasks take precedence over built-in ones."""
    package_root = Path(__file__).parent.parent
    folders = (Path("tasks"), package_root.parent / "tasks", package_root / "_shipped" / "tasks")
    paths: dict[str, Path] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*"))):
        if path.suffix in _LOADERS and not path.stem.startswith("_"):
            paths.setdefault(path.stem, path)
    return dict(sorted(paths.items()))


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
    task = module.task() if callable(getattr(module, "task", None)) else None
    if not isinstance(task, Task):
        raise ConfigError(str(path), ["the file must define `def task() -> Task`"])
    return task


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


ANSWER_COLUMNS = ("label", "answer")
"""Possible names of the column of answers."""
VALIDATION_SHARE, TEST_SHARE = 0.3, 0.2
"""Shares of the labelled rows. They are larger than the default since labelled rows are few."""


def is_table(path: str | Path) -> bool:
    """Return whether a path names a table, such as a CSV, rather than a task file."""
    return Path(path).suffix in TABLE_EXTENSIONS


def table_task(path: Path, like: Task) -> tuple[Task, list[Example]]:
    """Return the task of a table's labelled rows, with the contract of `like`, and its unlabelled rows.

    Its columns are the fields of `like`'s prompt, and `label` (or `answer`). If no row has a label, the task
    has no examples. Raises DataError for a file that cannot be read or lacks a column.
    """
    rows = read_rows(path)
    fields = placeholders(like.contract.template)
    answer_column = next((name for name in ANSWER_COLUMNS if name in rows[0]), None)
    missing = [name for name, required in fields.items() if required and name not in rows[0]]
    if missing or answer_column is None:
        missing_columns = ", ".join([*missing, *([] if answer_column else ["label (or answer)"])])
        raise DataError(f"{path} has no column {missing_columns}; it has {', '.join(rows[0])}")
    examples = [_example(row, [*fields], answer_column) for row in rows]
    examples = [e for e in examples if e.answer or e.fields]  # an empty line is no row
    labelled = [e for e in examples if e.answer]

    def load() -> Splits:
        if not labelled:
            return Splits(dict.fromkeys(SPLITS, ()))
        shares = {"validation": VALIDATION_SHARE, "test": TEST_SHARE}
        return split_examples(labelled, like.contract, **shares, source=str(path))

    about = f"The rows of {path.name}, asked as {like.name}."
    task = Task(path.stem, like.contract, like.metric, load, about=about, sources=(path.name,))
    return task, [e for e in examples if not e.answer]


def _example(row: Row, fields: list[str], answer: str) -> Example:
    texts = {name: cell_text for name in fields if (cell_text := _cell_text(row.get(name)))}
    return Example(texts, _cell_text(row.get(answer)).strip())


def _cell_text(cell: object) -> str:
    """Return a cell as text, "" for None; 0 and False are texts."""
    return "" if cell is None else str(cell)
