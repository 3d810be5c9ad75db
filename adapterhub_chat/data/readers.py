"""Rows of CSV, TSV, JSON, JSON lines and parquet files."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub_chat.errors import DataError

Row = Mapping[str, Any]


def _file_misfits(file: Path, needed: list[str]) -> Iterator[str]:
    if file.suffix not in _READERS:
        yield f"unknown format {file.name!r}; known: {', '.join(_READERS)}"
    elif not file.is_file():
        yield f"no file {file}"
    elif file.suffix != ".parquet":  # opening one imports `datasets`: its columns are read later
        try:
            _checked_rows(_rows(file), needed, str(file), at_most=1)
        except DataError as error:
            yield str(error)


def _checked_rows(
    rows: Iterable[Row], needed: list[str], source: str, *, at_most: int | None = None
) -> list[Row]:
    """Return the rows, if there are any and the first one has the columns."""
    row_list = list(itertools.islice(rows, at_most))
    if not row_list:
        raise DataError(f"{source} holds no rows")
    if missing := [column for column in needed if column not in row_list[0]]:
        columns = ", ".join(map(str, row_list[0]))
        raise DataError(f"{source} has no column {', '.join(missing)}; it has {columns}")
    return row_list


# ---- rows of files -------------------------------------------------------------------------------


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a table in a file; raise DataError when it cannot be read or holds none."""
    if misfits := list(_file_misfits(file, [])):
        raise DataError("; ".join(misfits))
    return _checked_rows(_rows(file), [], str(file))


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


_READERS: Mapping[str, Callable[[Path], Iterable[Row]]] = {
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
TABLE_EXTENSIONS = (*_READERS,)
"""File name extensions of tables."""
