"""Strict reading of untrusted files: regular files of bounded size, and unambiguous JSON."""

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
"""Maximal nesting of objects and lists."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


def short_repr(value: Any) -> str:
    """Return a short one-line representation of an untrusted value, for messages."""
    return _SHORT.repr(value)


@contextmanager
def open_regular_file(path: Path, max_bytes: int) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a regular file of at most `max_bytes` bytes for reading; yield it and its size.

    Raises AdapterError for anything else. A symbolic link could lead out of the folder, a FIFO would block
    and a device may act on a read, so the file's type is checked before a byte is read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{path} cannot be read: it is not a regular file")
            if status.st_size > max_bytes:
                raise AdapterError(
                    f"{path} cannot be read: it has {status.st_size:,} bytes, at most {max_bytes:,} "
                    "are allowed"
                )
            with open(handle, "rb", closefd=False) as file:
                yield file, status.st_size
        finally:
            os.close(handle)
    except OSError as error:
        link = error.errno == errno.ELOOP
        reason = "it is a link; put the file itself there (cp -L)" if link else error.strerror
        raise AdapterError(f"{path} cannot be read: {reason}") from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes; raise AdapterError otherwise."""
    with open_regular_file(path, max_bytes) as (file, size):
        return file.read(size)


def parse_json(data: bytes, max_values: int | None = None) -> Any:
    """Parse JSON in UTF-8; raise ValueError for content on which parsers disagree.

    That is: duplicate keys, NaN and Infinity (also as 1e999), a negative zero, and deep nesting. More than
    `max_values` values, counted by commas before parsing, are refused too.
    """
    if max_values is not None and data.count(b",") >= max_values:
        raise ValueError(f"it holds more than {max_values:,} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _is_too_deep(value):
        raise ValueError(f"it is nested too deeply: at most {MAX_DEPTH} levels are allowed")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short_repr(key)} stands there {count} times")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _parse_int(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{short_repr(text)} is too large for a number")
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        lists = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [child for children in lists for child in children]
    return bool(level)
