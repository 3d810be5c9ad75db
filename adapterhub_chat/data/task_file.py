"""Tasks without code: a TOML file that refers to the user's data.

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
from adapterhub_chat.data.readers import Row, _checked_rows, _file_misfits, _rows
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
        """The data files by split; a single file is split like a train file."""
        files_by_split: dict[Split, str | None] = {
            "train": self.path or self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {split: file for split, file in files_by_split.items() if file}


_DEFAULT_CONTRACT = PromptContract()


class _Prompt(_Section):
    template: str = _DEFAULT_CONTRACT.template
    system: str = _DEFAULT_CONTRACT.system
    stop: tuple[str, ...] = _DEFAULT_CONTRACT.stop
    max_new_tokens: PositiveInt = _DEFAULT_CONTRACT.max_new_tokens
    temperature: Annotated[float, Field(ge=0)] = _DEFAULT_CONTRACT.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = _DEFAULT_CONTRACT.top_p


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


_SPECIAL_COLUMNS = ("answer", "history", "group")
_HISTORY = TypeAdapter(tuple[Message, ...])


@dataclass(frozen=True, slots=True)
class TaskParts:
    """The content of a task file: the arguments of a Task except its name."""

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
    misfits += _cross_table_misfits(raw, path.parent)
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


def _cross_table_misfits(raw: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield misfits between tables; takes the raw tables, so that all misfits are listed together."""
    columns, prompt, labels, data = (
        value if isinstance(value := raw.get(key), dict) else {}
        for key in ("columns", "prompt", "labels", "data")
    )
    fields_of_template = placeholders(str(prompt.get("template", _DEFAULT_CONTRACT.template)))
    missing = [
        name for name, required in fields_of_template.items() if required and name not in columns
    ]
    if columns and missing:
        yield (
            f"prompt.template: no column for {', '.join(missing)}; [columns] has {', '.join(columns)}"
        )
    if columns and "answer" not in columns:
        yield "columns.answer: is missing"
    if isinstance(raw.get("metric"), str):
        yield from judge_misfits(raw["metric"], {k: str(v) for k, v in labels.items()})
    if len({"path", "train", "hub"} & data.keys()) != 1:
        yield "data: give one of path, train (with validation, test) or hub"
    hub_keys = {"config", "revision", "split"} & data.keys()
    if hub_keys and "hub" not in data:
        yield f"data: {', '.join(sorted(hub_keys))} only goes with hub"
    needed = _required_columns(columns, fields_of_template)
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
    needed = _required_columns(file.columns, placeholders(contract.template))
    examples = {
        split: [_example(row, file.columns) for row in _checked_rows(rows, needed, source)]
        for split, (source, rows) in sources.items()
    }
    splits = split_examples(examples, contract, **file.split.model_dump(), source=str(path))
    return replace(splits, parts={s: part[: data.limit] for s, part in splits.parts.items()})


def _required_columns(
    columns: Mapping[str, Any], required_by_field: Mapping[str, bool]
) -> list[str]:
    """Return the columns that every row must have."""
    return [str(c) for name, c in columns.items() if required_by_field.get(name, name == "answer")]


def _example(row: Row, columns: Mapping[str, str]) -> Example:
    """Return a row as an example; missing fields are left out, and `split_examples` reports them."""
    cells = {name: row.get(column) for name, column in columns.items()}
    answers = cells["answer"] if isinstance(cells["answer"], list) else [cells["answer"]]
    texts = tuple(_text(answer) for answer in answers if answer is not None)
    try:
        history = _HISTORY.validate_python(cells.get("history") or ())
    except ValidationError as error:
        history_misfits = explain(error, Message)
        raise DataError(join_misfits(f"history {cells['history']!r}", history_misfits)) from error
    return Example(
        fields={
            n: _text(v) for n, v in cells.items() if n not in _SPECIAL_COLUMNS and v is not None
        },
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
