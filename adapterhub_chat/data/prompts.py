"""Prompt templates: rendering the fields of an example into the user turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from adapterhub_chat.errors import DataError, UsageError

_PLACEHOLDER = re.compile(r"\{\{(\w+\??)\}\}|\{(\w+)(\?)?\}")


@lru_cache
def placeholders(template: str) -> Mapping[str, bool]:
    """Return the fields that `template` names, and whether each is required."""
    required_by_name: dict[str, bool] = {}
    for _, name, optional in _PLACEHOLDER.findall(template):
        if name:
            required_by_name[name] = required_by_name.get(name, False) or not optional
    return required_by_name


def render_prompt(template: str, fields: Mapping[str, object]) -> str:
    """Return `template` with its fields filled in, stripped.

    `{name}` is required. `{name?}` is optional; a line whose fields are all optional and missing or empty is
    left out. `{{name}}` is a literal `{name}`; other braces, and all braces in the fields, are literal.
    """
    missing = [n for n, required in placeholders(template).items() if required and n not in fields]
    if missing:
        raise DataError(
            f"the prompt needs the field {', '.join(missing)}; given: {', '.join(fields) or 'none'}"
        )

    def put(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] else str(fields.get(match[2], ""))

    lines = (line for line in template.split("\n") if not _is_left_out(line, fields))
    return _PLACEHOLDER.sub(put, "\n".join(lines)).strip()


def _is_left_out(line: str, fields: Mapping[str, object]) -> bool:
    fields_of_line = placeholders(line)
    return bool(fields_of_line) and not any(
        required or fields.get(n) for n, required in fields_of_line.items()
    )


def primary_field(template: str) -> str:
    """Return the field that a plain text fills: the template's last required one."""
    fields_of_template = placeholders(template)
    required = [name for name, needed in fields_of_template.items() if needed]
    return (required or list(fields_of_template) or ["text"])[-1]


def fields_of(template: str, value: str | Mapping[str, object], row: int = 0) -> dict[str, str]:
    """Return an input as fields: a plain text, or the field `text`, fills the primary field.

    Raises UsageError when the primary field is missing; `row` names the input in the message.
    """
    primary = primary_field(template)
    if isinstance(value, str):
        return {primary: value}
    fields = {key: str(field) for key, field in value.items()}
    if "text" in fields:
        fields.setdefault(primary, fields["text"])
    if primary not in fields:
        listed = ", ".join(fields) or "no field"
        raise UsageError(f"input {row} has {listed}; the task needs {primary!r} (or 'text')")
    return fields
