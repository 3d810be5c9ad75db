"""Files from outside, read strictly: regular files of bounded size, and JSON that says one thing only."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_chat.errors import AdapterError

MAX_DEPTH = 16
"""Objects and lists inside each other."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Return a value from a stranger's file as a message may hold it: short, and on one line."""
    return _SHORT.repr(value)


@contextmanager
def opened(path: Path, most: int) -> Iterator[tuple[io.BufferedReader, int]]:
    """Give a regular file of at most `most` bytes, open for reading, and its size.

    Raises AdapterError for anything else. A link would lead out of the folder; a FIFO waits and a device
    acts when it is opened or read, so what is opened is looked at before a byte is read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise AdapterError(f"{path} cannot be read: it is not a regular file")
            if found.st_size > most:
                raise AdapterError(
                    f"{path} cannot be read: it has {found.st_size:,} bytes, at most {most:,} are allowed"
                )
            with open(handle, "rb", closefd=False) as file:
                yield file, found.st_size
        finally:
            os.close(handle)
    except OSError as error:
        link = error.errno == errno.ELOOP
        reason = "it is a link; put the file itself there (cp -L)" if link else error.strerror
        raise AdapterError(f"{path} cannot be read: {reason}") from error


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes; raise AdapterError for another."""
    with opened(path, most) as (file, size):
        return file.read(size)


def parse_json(data: bytes, values: int | None = None) -> Any:
    """Return the value of JSON in UTF-8; raise ValueError for all that readers disagree about.

    That is: a key twice in one object, NaN and Infinity (also as 1e999), a negative zero, and deep nesting.
    Nor may there be more than so many `values`, by their commas: those bound what is built.
    """
    if values is not None and data.count(b",") >= values:
        raise ValueError(f"it holds more than {values:,} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _is_deep(value):
        raise ValueError(f"it is nested too deeply: at most {MAX_DEPTH} levels are allowed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(key)} stands there {count} times")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)} is too large for a number")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        lists = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [child for children in lists for child in children]
    return bool(level)
