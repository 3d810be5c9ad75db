"""Sentences from templates, in the notation of Home Assistant's intents (github.com/home-assistant/hassil).

    turn [on] (the lamp|{name})     [may be left out]  (one|of these)  (both;in any order)  {list}  <rule>

Each draw takes a random path through the template, by the given generator.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_chat.errors import DataError

TOKEN = re.compile(r"[()\[\]|;]|<[^<>]+>|\{[^{}]+\}|[^()\[\]|;<{]+")


@dataclass(frozen=True)
class Grammar:
    """The definitions of the names in templates."""

    rules: Mapping[str, str]
    lists: Mapping[str, Mapping[str, Any]]
    """Name -> `values` (texts, or `{"in": template}`), or a `range` of numbers; else `words` define it."""
    words: Mapping[str, Sequence[str]]
    """Name -> examples of words, for lists that users define themselves."""

    def draw(self, template: str, generator: random.Random) -> str:
        """Return one sentence; raise DataError for an unknown name in the template."""
        return " ".join(self._choice(deque(TOKEN.findall(template)), generator).split())

    def _choice(self, tokens: deque[str], generator: random.Random) -> str:
        """Read alternatives up to a closing bracket, which is not consumed; return one of them."""
        options, together = [""], False
        while tokens and tokens[0] not in (")", "]"):
            token = tokens.popleft()
            if token in ("|", ";"):
                together |= token == ";"
                options.append("")
            else:
                options[-1] += self._part(token, tokens, generator)
        if together:
            return " ".join(generator.sample(options, len(options)))
        return generator.choice(options)

    def _part(self, token: str, tokens: deque[str], generator: random.Random) -> str:
        if token in ("(", "["):
            inside = self._choice(tokens, generator)
            tokens.popleft()
            return inside if token == "(" or generator.random() < 0.5 else ""
        if token.startswith("<"):
            return self._named(token[1:-1], self.rules, token, generator)
        if token.startswith("{"):
            return self._value(token[1:-1].partition(":")[0], generator)
        return token

    def _value(self, name: str, generator: random.Random) -> str:
        known = self.lists.get(name, {})
        if values := known.get("values"):
            value = generator.choice(values)
            template = value["in"] if isinstance(value, Mapping) else str(value)
            return self._choice(deque(TOKEN.findall(template)), generator)
        if limits := known.get("range"):
            return str(generator.randrange(limits["from"], limits["to"] + 1, limits.get("step", 1)))
        return self._named(
            name, {n: generator.choice(w) for n, w in self.words.items()}, name, generator
        )

    def _named(
        self, name: str, table: Mapping[str, str], shown: str, generator: random.Random
    ) -> str:
        if name not in table:
            raise DataError(f"no rule, list or word is called {shown!r}")
        return self._choice(deque(TOKEN.findall(table[name])), generator)
