"""Prompt templates: fields of an example put into the user's turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from adapterhub_chat.errors import DataError, UsageError

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


def primary_field(template: str) -> str:
    """Return the field that a bare text fills: the last one that the template requires."""
    named = placeholders(template)
    required = [name for name, needed in named.items() if needed]
    return (required or list(named) or ["text"])[-1]


def fields_of(template: str, given: str | Mapping[str, object], row: int = 0) -> dict[str, str]:
    """Return the fields that `given` means: a bare text fills the primary field, `text` stands for it.

    Raises UsageError when the primary field is missing; `row` names the input in the message.
    """
    main = primary_field(template)
    if isinstance(given, str):
        return {main: given}
    fields = {key: str(value) for key, value in given.items()}
    if "text" in fields:
        fields.setdefault(main, fields["text"])
    if main not in fields:
        listed = ", ".join(fields) or "no field"
        raise UsageError(f"input {row} has {listed}; the task needs {main!r} (or 'text')")
    return fields
