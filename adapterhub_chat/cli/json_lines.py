"""JSON lines as input and output: all bad lines are listed, and output files appear complete."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from adapterhub_chat.errors import AdapterHubError, DataError, UsageError
from adapterhub_chat.files import replaced_file


def read_lines(source: str) -> list[dict[str, Any]]:
    """Return the JSON object of each line of a file, or of standard input for `-`.

    Raises DataError naming every line that holds none.
    """
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"--input {source}: {error.strerror or error}") from error
    rows = [_json_object(line) for line in raw.rstrip().splitlines()]
    bad_lines = [str(number) for number, row in enumerate(rows, 1) if row is None]
    if bad_lines:
        remaining = f" and {len(bad_lines) - 10} more" if len(bad_lines) > 10 else ""
        location = f"--input {source}, line {', '.join(bad_lines[:10])}{remaining}"
        raise DataError(f'{location}: not a JSON object like {{"text": ...}}')
    return [row for row in rows if row is not None]


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


@contextmanager
def open_output(output: str) -> Iterator[TextIO]:
    """Yield standard output for `-`, else a file that replaces `output` when all is written."""
    if output == "-":
        yield sys.stdout
        return
    target = Path(output)
    is_special = target.exists() and not target.is_file()  # a pipe or a device: written directly
    try:
        with (
            nullcontext(target) if is_special else replaced_file(target) as path,
            path.open("w", encoding="utf-8") as file,
        ):
            yield file
    except OSError as error:
        if isinstance(error, AdapterHubError):
            raise
        raise UsageError(f"--output {output}: {error.strerror or error}") from error
