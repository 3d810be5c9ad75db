"""What a message's text says without any model: shares of scripts and signs, and the words that are in it.

Words, pairs of words and runs of one to three characters are hashed into a vector of fixed length with
random signs (the hashing trick, arXiv 0902.2206): topics that few states tell apart, and scripts that the
backbone was not taught.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

SCRIPTS = (
    "LATIN",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "ARABIC",
    "GREEK",
    "DEVANAGARI",
)
"""First words of the Unicode names of letters: a language's first trace."""
OTHER_LETTER, DIGIT, SPACE, SIGN = range(len(SCRIPTS), len(SCRIPTS) + 4)
MARKS = {"?": 10.0, "\n": 10.0, "@": 10.0, "{}()[]=_;<>": 5.0, ".,!'\"": 5.0}
"""Signs whose share in a message is told, and its weight."""
NUM_LETTERS = SIGN + 1 + 6 + len(MARKS)
"""Numbers that `letters` returns."""
NUM_WORDS = 1024
"""Numbers that `words` returns, half of them for runs of characters."""
RUNS, LENGTH = (1, 2, 3), 2.0
"""Characters of a run; how long the vector is made, as neither few nor many words shall weigh more."""
_WORD = re.compile(r"\w+|[^\w\s]")
_SIGN_BIT = 1 << 20


def letters(text: str) -> list[float]:
    """Return shares of scripts, digits, blanks and signs, and a few habits: NUM_LETTERS numbers."""
    kinds = [0.0] * (SIGN + 1)
    for character in text:
        kinds[_kind(character)] += 1
    size = max(1, len(text))
    words = [c for c in text if c.isalpha()]
    return [
        *(count / size for count in kinds),
        sum(c.isupper() for c in words) / max(1, len(words)),
        math.log1p(len(text)) / 5,
        *(weight * sum(c in marks for c in text) / size for marks, weight in MARKS.items()),
        float(text[:1].isupper()),
        float(text.rstrip()[-1:] == "?"),
        float("\n" in text),
        min(10.0, len(text) / max(1, len(text.split()))) / 10,
    ]


@lru_cache(maxsize=20_000)
def _kind(character: str) -> int:
    if character.isalpha():
        script = unicodedata.name(character, "").partition(" ")[0]
        return SCRIPTS.index(script) if script in SCRIPTS else OTHER_LETTER
    return DIGIT if character.isdigit() else SPACE if character.isspace() else SIGN


def words(text: str) -> Tensor:
    """Return a text's hashed words and runs of characters, (NUM_WORDS,) float64."""
    low = f" {text.lower()} " if text.strip() else ""
    found = _WORD.findall(low)
    runs = (low[i : i + size] for size in RUNS for i in range(len(low) - size + 1))
    pairs = (f"{one} {other}" for one, other in pairwise(found))
    return torch.cat([_hashed(runs), _hashed([*found, *pairs])])


def _hashed(parts: Iterable[str]) -> Tensor:
    """Return the roots of the parts' counts, each at its hash's place and with its sign."""
    vector = [0.0] * (NUM_WORDS // 2)
    for part, count in Counter(parts).items():
        place = zlib.crc32(part.encode("utf-8", "surrogatepass"))
        sign = 1 if place & _SIGN_BIT else -1
        vector[place % len(vector)] += sign * math.sqrt(count)
    size = math.sqrt(sum(number * number for number in vector)) or 1.0
    return torch.tensor(vector, dtype=torch.float64) * (LENGTH / size)
