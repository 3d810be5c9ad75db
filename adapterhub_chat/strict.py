"""Files and JSON of strangers, read so that they can only be what they say, or be refused."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_chat.errors import AdapterError

SHOWN = 5
"""Names that a message lists."""


def read_regular(
    path: Path,
    limit: int,
    room: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
) -> memoryview:
    """Return a file's bytes in what `room(size)` gives; raise AdapterError when it is not simply a file.

    A link could lead anywhere and a pipe would never end; neither is followed or waited for.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise AdapterError(f"{path} is a link; an adapter consists of files") from error
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise AdapterError(f"{path} is not a regular file; an adapter consists of files")
    with os.fdopen(handle, "rb", buffering=0) as file:
        if status.st_size > limit:
            raise AdapterError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are read")
        view, place = room(status.st_size), 0
        while place < len(view) and (count := file.readinto(view[place:])):
            place += count
    if place != status.st_size:
        raise AdapterError(f"{path} changed while it was read; try again")
    return view


def parse_json(data: bytes | memoryview, what: object) -> Any:
    """Return what JSON says; raise AdapterError for what two readers could understand differently."""
    try:
        return json.loads(
            bytes(data).decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not valid JSON: {str(error)[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        raise ValueError(f"a key is there twice: {', '.join(map(repr, sorted(twice)[:SHOWN]))}")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def shown(value: object) -> str:
    """Return what a message shows of a foreign value: short, and without control characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
