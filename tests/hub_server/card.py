"""The metadata block of a README.md, and the tags of a repository."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import yaml

MAX_DEPTH = 50
BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_card(text: str) -> dict[str, Any]:
    """Return the metadata, empty without a block; ValueError unless it is a plain mapping.

    Aliases are refused: a few lines of them unfold into more than a server can write out.
    """
    match = BLOCK.match(text)
    if not match:
        return {}
    depth = 0
    try:
        for event in yaml.parse(match[1], Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("Aliases are not supported.")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # the interpreter's own limit is changed by torch's compiler
                raise ValueError(f"The metadata is nested deeper than {MAX_DEPTH} levels.")
        card = yaml.safe_load(match[1])
        card = json.loads(json.dumps({} if card is None else card, default=str, allow_nan=False))
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ValueError(f"The metadata is no YAML: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("The metadata is no mapping.")
    return card


@functools.lru_cache(maxsize=100)
def card_json(text: str) -> str:
    """The metadata as JSON; empty for an unreadable card."""
    try:
        return json.dumps(read_card(text))
    except ValueError:
        return "{}"


def _listed(value: Any) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def tags_of(card: dict[str, Any]) -> list[str]:
    """Return the tags without duplicates."""
    tags = [
        tag for key in ("library_name", "pipeline_tag", "tags") for tag in _listed(card.get(key))
    ]
    for key in ("base_model", "license"):
        tags += [f"{key}:{value}" for value in _listed(card.get(key))]
    tags += [f"dataset:{value}" for value in _listed(card.get("datasets"))]
    tags += _listed(card.get("language"))
    relation = "adapter" if card.get("library_name") == "peft" else None
    relation = card.get("base_model_relation", relation)
    if isinstance(relation, str):
        tags += [f"base_model:{relation}:{base}" for base in _listed(card.get("base_model"))]
    return list(dict.fromkeys(tags))
