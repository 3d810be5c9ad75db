"""Features of a message's text without any model: shares of scripts and symbols, and hashed n-grams.

Words, pairs of words and n-grams of one to three characters are hashed into a vector of fixed length with
random signs (the hashing trick, arXiv 0902.2206). They separate topics that the hidden states do not, and
scripts that the backbone was not trained on.
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
"""First words of the Unicode names of letters; a coarse sign of the language."""
OTHER_LETTER, DIGIT, SPACE, SYMBOL = range(len(SCRIPTS), len(SCRIPTS) + 4)
SYMBOL_WEIGHTS = {"?": 10.0, "\n": 10.0, "@": 10.0, "{}()[]=_;<>": 5.0, ".,!'\"": 5.0}
"""Symbols whose share in a message is a feature, and the weight of that feature."""
NUM_CHARACTER_FEATURES = SYMBOL + 1 + 6 + len(SYMBOL_WEIGHTS)
"""Length of what `character_features` returns."""
NUM_NGRAM_FEATURES = 1024
"""Length of what `ngram_features` returns; half of it is for n-grams of characters."""
NGRAM_LENGTHS, NGRAM_NORM = (1, 2, 3), 2.0
"""Lengths of the character n-grams, and the norm of each half of the vector for messages of any length."""
_WORD = re.compile(r"\w+|[^\w\s]")
_SIGN_BIT = 1 << 20


def character_features(text: str) -> list[float]:
    """Return NUM_CHARACTER_FEATURES numbers: shares of kinds of characters, case and length."""
    counts = [0.0] * (SYMBOL + 1)
    for character in text:
        counts[_kind(character)] += 1
    length = max(1, len(text))
    letters = [c for c in text if c.isalpha()]
    return [
        *(count / length for count in counts),
        sum(c.isupper() for c in letters) / max(1, len(letters)),
        math.log1p(len(text)) / 5,
        *(
            weight * sum(c in symbols for c in text) / length
            for symbols, weight in SYMBOL_WEIGHTS.items()
        ),
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
    return DIGIT if character.isdigit() else SPACE if character.isspace() else SYMBOL


def ngram_features(text: str) -> Tensor:
    """Return a text's hashed words and character n-grams, (NUM_NGRAM_FEATURES,) float64."""
    lowered = f" {text.lower()} " if text.strip() else ""
    words = _WORD.findall(lowered)
    pairs = (f"{first} {second}" for first, second in pairwise(words))
    ngrams = (
        lowered[i : i + length]
        for length in NGRAM_LENGTHS
        for i in range(len(lowered) - length + 1)
    )
    return torch.cat([_hashed(ngrams), _hashed([*words, *pairs])])


def _hashed(parts: Iterable[str]) -> Tensor:
    """Return the square roots of the parts' counts, added up with signs at the parts' hashes."""
    vector = [0.0] * (NUM_NGRAM_FEATURES // 2)
    for part, count in Counter(parts).items():
        code = zlib.crc32(part.encode("utf-8", "surrogatepass"))
        sign = 1 if code & _SIGN_BIT else -1
        vector[code % len(vector)] += sign * math.sqrt(count)
    norm = math.sqrt(sum(number * number for number in vector)) or 1.0
    return torch.tensor(vector, dtype=torch.float64) * (NGRAM_NORM / norm)
