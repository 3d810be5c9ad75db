"""Tasks without code: a TOML file that points at the user's data.

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

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from adapterhub_chat.data.metrics import judge_misfits
from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.data.readers import Row, _examined, _file_misfits, _rows
from adapterhub_chat.data.splits import Splits, split_examples
from adapterhub_chat.errors import ConfigError, DataError, join_misfits
from adapterhub_chat.types import SPLITS, Example, Message, PromptContract, Split
from adapterhub_chat.validation import explain


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


@dataclass(frozen=True, slots=True)
class TaskParts:
    """What a task file says: the arguments of a Task besides its name."""

    contract: PromptContract
    metric: str
    load: Callable[[], Splits]
    language: str
    about: str
    licence: str
    sources: tuple[str, ...]


def read_task_file(path: Path) -> TaskParts:
    """Return the task of a TOML file; raise one ConfigError with every misfit."""
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
    return TaskParts(
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
        yield from judge_misfits(raw["metric"], {k: str(v) for k, v in labels.items()})
    if len({"path", "train", "hub"} & data.keys()) != 1:
        yield "data: give one of path, train (with validation, test) or hub"
    extra = {"config", "revision", "split"} & data.keys()
    if extra and "hub" not in data:
        yield f"data: {', '.join(sorted(extra))} only goes with hub"
    needed = _needed(columns, asked)
    for key in ("path", *SPLITS):
        if isinstance(data.get(key), str):
            yield from (f"data.{key}: {m}" for m in _file_misfits(folder / data[key], needed))


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


def _hub(data: _Data, split: str) -> Iterable[Row]:
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(
            data.hub, data.config, split=split, revision=data.revision
        )
    except (OSError, ValueError) as error:
        raise DataError(f"Hub data set {data.hub!r}, split {split!r}: {error}") from error
    return rows
