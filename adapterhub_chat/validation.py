"""Sentences for pydantic's errors, and strict reading of settings from a table."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from adapterhub_chat.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


SHOWN = 100
"""Maximum number of misfits in one message."""


def read_settings(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Return `values` as a `model`; raise one ConfigError that lists every misfit in `source`."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(source, explain(error, model)) from error


# ---- misfits in sentences ------------------------------------------------------------------------

_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING_KEY = {"missing", "missing_argument", "missing_keyword_only_argument"}


def explain(error: ValidationError, model: type) -> list[str]:
    """Return one sentence for each misfit of `model` (a pydantic model or dataclass), SHOWN at most."""
    details = error.errors(include_url=False)
    more = [f"and {len(details) - SHOWN} more"] if len(details) > SHOWN else []
    return [*(_sentence(detail, model) for detail in details[:SHOWN]), *more]


def _printable(part: int | str) -> str:
    """Return a key of a file as at most 60 printable characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(part))
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(detail: ErrorDetails, model: type) -> str:
    where = ".".join(_printable(part) for part in detail["loc"])
    *path, last = detail["loc"] or ("",)
    allowed = sorted(_fields_at(model, path))
    if detail["type"] in _UNKNOWN_KEY:
        close = get_close_matches(str(last), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{where}: no such key; allowed: {', '.join(allowed)}{hint}"
    if detail["type"] in _MISSING_KEY:
        return f"{where}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    value_text = repr(detail["input"])
    value_text = value_text if len(value_text) <= 60 else value_text[:57] + "..."
    return f"{where}: {message[:1].lower()}{message[1:]}; got {value_text}"


def _fields_at(model: type, path: list[int | str]) -> Mapping[str, Any]:
    """Return the fields of the model at `path` inside `model`; none where there is no model."""
    fields: Mapping[str, Any] = getattr(model, "__pydantic_fields__", {})
    for part in path:
        field = fields.get(str(part))
        options = _options(field.annotation) if field else ()
        inner = (getattr(option, "__pydantic_fields__", {}) for option in options)
        fields = next((f for f in inner if f), {})
    return fields


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
