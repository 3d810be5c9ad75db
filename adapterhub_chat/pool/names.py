"""What an adapter of a pool may be called."""

from __future__ import annotations

import re

from adapterhub_chat.errors import UsageError
from adapterhub_chat.types import AUTO, BACKBONE

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
RESERVED = (BACKBONE, AUTO)


def check_name(name: str) -> str:
    """Return `name` when it can name an adapter, else raise UsageError."""
    if name in RESERVED:
        raise UsageError(f"{name!r} is a reserved word; choose another name for the adapter")
    if not ADAPTER_NAME.fullmatch(name):
        raise UsageError(
            f"adapter name {name!r}: allowed are 1 to 96 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name
