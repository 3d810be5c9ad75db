"""Sentences out of templates, in the notation of Home Assistant's intents (github.com/home-assistant/hassil).

    turn [on] (the lamp|{name})     [may be left out]  (one|of these)  (both;in any order)  {list}  <rule>

Each draw takes one way through the template at random: all by the generator that is handed in.
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
    """What the names in templates stand for."""

    rules: Mapping[str, str]
    lists: Mapping[str, Mapping[str, Any]]
    """Name -> `values` (texts, or `{"in": template}`), or a `range` of numbers, or anything: words."""
    words: Mapping[str, Sequence[str]]
    """Name -> what a user may call it, where the lists leave it to them."""

    def draw(self, template: str, chance: random.Random) -> str:
        """Return one sentence; raise DataError for a template that names what nobody knows."""
        return " ".join(self._choice(deque(TOKEN.findall(template)), chance).split())

    def _choice(self, tokens: deque[str], chance: random.Random) -> str:
        """Read alternatives up to a closing bracket, which stays; return one of them."""
        options, together = [""], False
        while tokens and tokens[0] not in (")", "]"):
            token = tokens.popleft()
            if token in ("|", ";"):
                together |= token == ";"
                options.append("")
            else:
                options[-1] += self._part(token, tokens, chance)
        if together:
            return " ".join(chance.sample(options, len(options)))
        return chance.choice(options)

    def _part(self, token: str, tokens: deque[str], chance: random.Random) -> str:
        if token in ("(", "["):
            inside = self._choice(tokens, chance)
            tokens.popleft()
            return inside if token == "(" or chance.random() < 0.5 else ""
        if token.startswith("<"):
            return self._named(token[1:-1], self.rules, token, chance)
        if token.startswith("{"):
            return self._value(token[1:-1].partition(":")[0], chance)
        return token

    def _value(self, name: str, chance: random.Random) -> str:
        known = self.lists.get(name, {})
        if values := known.get("values"):
            value = chance.choice(values)
            template = value["in"] if isinstance(value, Mapping) else str(value)
            return self._choice(deque(TOKEN.findall(template)), chance)
        if limits := known.get("range"):
            return str(chance.randrange(limits["from"], limits["to"] + 1, limits.get("step", 1)))
        return self._named(name, {n: chance.choice(w) for n, w in self.words.items()}, name, chance)

    def _named(self, name: str, table: Mapping[str, str], shown: str, chance: random.Random) -> str:
        if name not in table:
            raise DataError(f"no rule, list or word is called {shown!r}")
        return self._choice(deque(TOKEN.findall(table[name])), chance)
