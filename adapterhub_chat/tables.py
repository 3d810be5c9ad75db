"""A table as a task: rows that are asked and judged as another task's examples are, some without a label."""

from __future__ import annotations

from pathlib import Path

from adapterhub_chat.errors import DataError
from adapterhub_chat.prompt import placeholders
from adapterhub_chat.splits import Splits, split_examples
from adapterhub_chat.task import Task
from adapterhub_chat.task_file import TABLES, Row, read_rows
from adapterhub_chat.types import SPLITS, Example

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
