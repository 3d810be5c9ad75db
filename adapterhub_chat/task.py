"""Tasks: a sequence of examples plus a judge. A mixture of tasks is a task.

A task is a file: `tasks/NAME.py` with `def task() -> Task`, or, without code, `tasks/NAME.toml`
that points at the user's data (csv, tsv, json, jsonl, parquet or a Hub data set):

    metric = "accuracy"                             # a key of METRICS
    about = "..."                                   # also: language, licence, sources

    [data]
    path = "reviews.csv"                            # or train = ..., validation = ..., test = ...
    # hub = "user/dataset", config = "...", split = { train = "train", test = "validation" }
    # limit = 1000                                  # at most so many of each split, at random

    [columns]                                       # field = column; besides `answer` there may be
    text = "review"                                 # `history` (earlier turns) and `group`
    answer = "label"                                # (what must stay in one split)

    [prompt]                                        # PromptContract: system, stop, temperature, ...
    template = "Review: {text}"

    [labels]                                        # value of the answer -> words the model says
    0 = "negative"
    1 = "positive"

    [split]                                         # shares, where the data has no such split
    validation = 0.1
    test = 0.1
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import itertools
import json
import random
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from adapterhub_chat.config import explain
from adapterhub_chat.errors import ConfigError, DataError, UnknownNameError, join_misfits
from adapterhub_chat.metrics import METRICS
from adapterhub_chat.types import SPLITS, Example, Message, PromptContract, Split

# ---- the prompt ----------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{(\w+\??)\}\}|\{(\w+)(\?)?\}")


@lru_cache
def placeholders(template: str) -> Mapping[str, bool]:
    """Return the fields that `template` names, and whether each must be given."""
    found: dict[str, bool] = {}
    for _, name, optional in _PLACEHOLDER.findall(template):
        if name:
            found[name] = found.get(name, False) or not optional
    return found


def render_prompt(template: str, fields: Mapping[str, object]) -> str:
    """Return `template` with the fields put in, stripped.

    `{name}` must be given. `{name?}` may be missing; a line that names nothing but missing or empty
    fields of that kind drops out. `{{name}}` stands for a literal `{name}`; other braces, and all
    braces in the fields, stand for themselves.
    """
    missing = [n for n, required in placeholders(template).items() if required and n not in fields]
    if missing:
        raise DataError(
            f"the prompt needs the field {', '.join(missing)}; given: {', '.join(fields) or 'none'}"
        )

    def put(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] else str(fields.get(match[2], ""))

    lines = (line for line in template.split("\n") if not _drops_out(line, fields))
    return _PLACEHOLDER.sub(put, "\n".join(lines)).strip()


def _drops_out(line: str, fields: Mapping[str, object]) -> bool:
    named = placeholders(line)
    return bool(named) and not any(required or fields.get(n) for n, required in named.items())


# ---- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Splits:
    """The examples of a task, cleaned and parted; in each part in a fixed random order."""

    parts: Mapping[Split, tuple[Example, ...]]
    duplicates: int = 0
    """Examples dropped because their input was there already."""
    contradictions: int = 0
    """Examples dropped because one input came with several labels."""


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

    def __post_init__(self) -> None:
        """Refuse a metric that cannot judge these answers."""
        misfits = list(_judge_misfits(self.metric, self.contract.labels))
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


def _judge_misfits(metric: str, labels: Mapping[str, str]) -> Iterator[str]:
    if metric not in METRICS:
        yield f"metric: unknown metric {metric!r}; known: {', '.join(sorted(METRICS))}"
    elif METRICS[metric].kind == "label" and len(labels) < 2:
        yield f"labels: {metric} chooses between labels; give two or more"
    elif METRICS[metric].kind != "label" and labels:
        yield f"labels: {metric} judges free text, so there can be no labels"
    if len(set(labels.values())) < len(labels):
        yield "labels: two labels have the same words"


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
    )


# ---- the splits ----------------------------------------------------------------------------------


def input_key(example: Example, contract: PromptContract) -> str:
    """Return what the model reads of an example, without case and layout: equal keys, equal inputs.

    The template's words take no part, so a task that is asked in new words keeps its splits.
    """
    turns = [message.content for message in example.history]
    fields = [example.fields.get(name, "") for name in sorted(placeholders(contract.template))]
    return "\x1f".join(" ".join(text.casefold().split()) for text in [*turns, *fields] if text)


def split_of(key: str, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Return the split in which `key` lies, whatever else is in the data."""
    place = int.from_bytes(_digest(key)[:8]) / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def split_examples(
    examples: Iterable[Example] | Mapping[Split, Iterable[Example]],
    contract: PromptContract,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    source: str = "examples",
) -> Splits:
    """Clean the examples and part them by the hash of their group or input.

    Splits that the source has are kept; a missing one is cut off its train split. One input stays
    once, and only in the most held-out of the source's splits. If it came with several labels, all
    of its examples go; with several free answers, the most frequent one is taught and all of them
    are accepted.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ConfigError(source, ["split: validation and test are shares with a sum below 1"])
    given = examples if isinstance(examples, Mapping) else {"train": examples}
    shares = {
        "validation": 0.0 if "validation" in given else validation,
        "test": 0.0 if "test" in given else test,
    }
    parts: dict[Split, dict[str, Example]] = {split: {} for split in SPLITS}
    total = contradictions = 0
    for split in reversed(SPLITS):
        listed = list(given.get(split, ()))
        _check(listed, contract, source)
        unique, clashing = _unique(listed, contract)
        total, contradictions = total + len(listed), contradictions + clashing
        for key, example in unique.items():
            if not any(key in part for part in parts.values()):
                to = split_of(example.group or key, **shares) if split == "train" else split
                parts[to][key] = example
    kept = sum(len(part) for part in parts.values())
    if not kept:
        raise DataError(f"{source}: no examples ({contradictions} had contradicting labels)")
    return Splits(
        {s: tuple(part[key] for key in sorted(part, key=_digest)) for s, part in parts.items()},
        duplicates=total - kept - contradictions,
        contradictions=contradictions,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _unique(examples: list[Example], contract: PromptContract) -> tuple[dict[str, Example], int]:
    """Return one example for each input, and how many went because their labels clash."""
    same: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        same[input_key(example, contract)].append(example)
    clashing = {
        key: len(group)
        for key, group in same.items()
        if contract.labels and len({example.answer for example in group}) > 1
    }
    unique = {key: _merged(group) for key, group in same.items() if key not in clashing}
    return unique, sum(clashing.values())


def _merged(same: list[Example]) -> Example:
    """Return the one with the most frequent answer, with everybody's references."""
    if len(same) == 1:
        return same[0]
    count = Counter(e.answer for e in same)
    same = sorted(same, key=lambda e: (-count[e.answer], e.group, e.answer, [*e.fields.values()]))
    accepted = tuple(dict.fromkeys(answer for example in same for answer in example.accepted))
    return replace(same[0], references=accepted if len(accepted) > 1 else same[0].references)


def _check(examples: list[Example], contract: PromptContract, source: str) -> None:
    misfits = [
        f"example {number}: {misfit}"
        for number, example in enumerate(examples, 1)
        for misfit in _misfits(example, contract)
    ]
    if misfits:
        more = [f"and {len(misfits) - 10} more"] if len(misfits) > 10 else []
        raise DataError(join_misfits(source, misfits[:10] + more))


def _misfits(example: Example, contract: PromptContract) -> Iterator[str]:
    for name, required in placeholders(contract.template).items():
        if required and not example.fields.get(name, "").strip():
            yield f"field {name!r} is {'empty' if name in example.fields else 'missing'}"
    if not example.answer.strip():
        yield "the answer is empty"
    elif contract.labels and example.answer not in contract.labels:
        yield f"label {example.answer!r} is not one of {', '.join(contract.labels)}"


# ---- task files ----------------------------------------------------------------------------------


def list_tasks() -> dict[str, Path]:
    """Return the task files by name: those of ./tasks come before the built-in ones."""
    here = Path(__file__).parent
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


def _load_python(path: Path) -> Task:
    name = f"{__name__}s.{path.stem}"
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Data(_Section):
    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    split: dict[Split, str] = {"train": "train"}
    limit: PositiveInt | None = None

    @property
    def files(self) -> dict[Split, str]:
        """The data files by split; a single file is cut up like a train split."""
        named: dict[Split, str | None] = {
            "train": self.path or self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {split: file for split, file in named.items() if file}


_ASKED = PromptContract()


class _Prompt(_Section):
    template: str = _ASKED.template
    system: str = _ASKED.system
    stop: tuple[str, ...] = _ASKED.stop
    max_new_tokens: PositiveInt = _ASKED.max_new_tokens
    temperature: Annotated[float, Field(ge=0)] = _ASKED.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = _ASKED.top_p


class _Shares(_Section):
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.1


class _TaskFile(_Section):
    metric: str
    data: _Data
    columns: dict[str, str]
    about: str = ""
    language: str = "en"
    licence: str = "unknown"
    sources: tuple[str, ...] = ()
    prompt: _Prompt = _Prompt()
    labels: dict[str, str] = {}
    split: _Shares = _Shares()


_NOT_FIELDS = ("answer", "history", "group")
_HISTORY = TypeAdapter(tuple[Message, ...])
Row = Mapping[str, Any]


def _load_toml(path: Path) -> Task:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not TOML: {error}"]) from error
    misfits: list[str] = []
    try:
        file = _TaskFile.model_validate(raw)
    except ValidationError as error:
        misfits = explain(error, _TaskFile)
    misfits += _disagreements(raw, path.parent)
    if misfits:
        raise ConfigError(str(path), misfits)
    contract = PromptContract(**file.prompt.model_dump(), labels=file.labels)
    return Task(
        name=path.stem,
        contract=contract,
        metric=file.metric,
        load=partial(_read, file, contract, path),
        language=file.language,
        about=file.about,
        licence=file.licence,
        sources=file.sources or tuple(filter(None, [file.data.hub, *file.data.files.values()])),
    )


def _disagreements(raw: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield what fits by itself but not together; takes raw tables, to say it beside the rest."""
    columns, prompt, labels, data = (
        value if isinstance(value := raw.get(key), dict) else {}
        for key in ("columns", "prompt", "labels", "data")
    )
    asked = placeholders(str(prompt.get("template", _ASKED.template)))
    lost = [name for name, required in asked.items() if required and name not in columns]
    if columns and lost:
        yield (
            f"prompt.template: no column for {', '.join(lost)}; [columns] has {', '.join(columns)}"
        )
    if columns and "answer" not in columns:
        yield "columns.answer: is missing"
    if isinstance(raw.get("metric"), str):
        yield from _judge_misfits(raw["metric"], {k: str(v) for k, v in labels.items()})
    if len({"path", "train", "hub"} & data.keys()) != 1:
        yield "data: give one of path, train (with validation, test) or hub"
    extra = {"config", "revision", "split"} & data.keys()
    if extra and "hub" not in data:
        yield f"data: {', '.join(sorted(extra))} only goes with hub"
    needed = _needed(columns, asked)
    for key in ("path", *SPLITS):
        if isinstance(data.get(key), str):
            yield from (f"data.{key}: {m}" for m in _file_misfits(folder / data[key], needed))


def _file_misfits(file: Path, needed: list[str]) -> Iterator[str]:
    if file.suffix not in _READERS:
        yield f"unknown format {file.name!r}; known: {', '.join(_READERS)}"
    elif not file.is_file():
        yield f"no file {file}"
    elif file.suffix != ".parquet":  # opening one imports `datasets`: its columns are read later
        try:
            _examined(_rows(file), needed, str(file), at_most=1)
        except DataError as error:
            yield str(error)


def _read(file: _TaskFile, contract: PromptContract, path: Path) -> Splits:
    data = file.data
    sources: dict[Split, tuple[str, Iterable[Row]]] = (
        {s: (f"Hub data set {data.hub}/{name}", _hub(data, name)) for s, name in data.split.items()}
        if data.hub
        else {s: (f, _rows(path.parent / f)) for s, f in data.files.items()}
    )
    needed = _needed(file.columns, placeholders(contract.template))
    examples = {
        split: [_example(row, file.columns) for row in _examined(rows, needed, source)]
        for split, (source, rows) in sources.items()
    }
    splits = split_examples(examples, contract, **file.split.model_dump(), source=str(path))
    return replace(splits, parts={s: part[: data.limit] for s, part in splits.parts.items()})


def _needed(columns: Mapping[str, Any], asked: Mapping[str, bool]) -> list[str]:
    """Return the columns that every row must have."""
    return [str(c) for name, c in columns.items() if asked.get(name, name == "answer")]


def _examined(
    rows: Iterable[Row], needed: list[str], source: str, *, at_most: int | None = None
) -> list[Row]:
    """Return the rows, if there are any and the first one has the columns."""
    listed = list(itertools.islice(rows, at_most))
    if not listed:
        raise DataError(f"{source} holds no rows")
    if lost := [column for column in needed if column not in listed[0]]:
        there = ", ".join(map(str, listed[0]))
        raise DataError(f"{source} has no column {', '.join(lost)}; it has {there}")
    return listed


def _example(row: Row, columns: Mapping[str, str]) -> Example:
    """Return a row as an example; what it lacks is left out, for `split_examples` to say so."""
    cells = {name: row.get(column) for name, column in columns.items()}
    answers = cells["answer"] if isinstance(cells["answer"], list) else [cells["answer"]]
    texts = tuple(_text(answer) for answer in answers if answer is not None)
    try:
        history = _HISTORY.validate_python(cells.get("history") or ())
    except ValidationError as error:
        listed = explain(error, Message)
        raise DataError(join_misfits(f"history {cells['history']!r}", listed)) from error
    return Example(
        fields={n: _text(v) for n, v in cells.items() if n not in _NOT_FIELDS and v is not None},
        answer=texts[0] if texts else "",
        references=texts if len(texts) > 1 else (),
        history=history,
        group=_text(cells.get("group") or ""),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- rows of files -------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[Row]:
    try:
        for number, row in enumerate(_READERS[file.suffix](file), 1):
            if not isinstance(row, Mapping) or None in row:
                raise DataError(f"{file}, row {number} is not one value for each column: {row}")
            yield row
    except (ValueError, csv.Error) as error:  # bad JSON, bad UTF-8, bad quotes
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}") from error


def _table(file: Path, delimiter: str) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter=delimiter, strict=True)


def _json(file: Path) -> Iterator[Row]:
    yield from json.loads(file.read_text(encoding="utf-8-sig"))


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _parquet(file: Path) -> Iterable[Row]:
    import datasets

    rows: Iterable[Row] = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", streaming=True
    )
    return rows


def _hub(data: _Data, split: str) -> Iterable[Row]:
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(
            data.hub, data.config, split=split, revision=data.revision
        )
    except (OSError, ValueError) as error:
        raise DataError(f"Hub data set {data.hub!r}, split {split!r}: {error}") from error
    return rows


_READERS: Mapping[str, Callable[[Path], Iterable[Row]]] = {
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
_LOADERS: Mapping[str, Callable[[Path], Task]] = {".py": _load_python, ".toml": _load_toml}
