"""Writing: a row's tokens as text, piece by piece, as soon as it cannot change any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub_chat.inference.sampling import Sampling

KEPT = 6
"""Tokens before the new ones that are decoded with them: what they look like may depend on those before."""


class Detokenizer:
    """The text of one row."""

    def __init__(self, tokenizer: Any, sampling: Sampling, *, silent: bool = False) -> None:
        """Start with nothing written; when `silent`, no text is made before the end, as far as possible."""
        self.text = ""
        self.ids: list[int] = []
        self.ended = ""
        """Why the text is complete ("stop", "length"), empty as long as it is not."""
        self._tokenizer, self._sampling = tokenizer, sampling
        self._silent = silent and not sampling.stop
        self._raw, self._decoded = "", 0  # text of the first `_decoded` tokens, for good

    def take(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        rules = self._sampling
        end = token == self._tokenizer.eos_token_id and not rules.ignore_eos
        if not end:
            self.ids.append(token)
        if self._silent and not end and len(self.ids) < rules.max_new_tokens:
            return ""
        full = self._whole()
        cut = min((full.find(s) for s in rules.stop if s in full), default=-1)
        if end or cut >= 0:
            self.ended = "stop"
        elif len(self.ids) >= rules.max_new_tokens:
            self.ended = "length"
        if cut < 0:
            cut = len(full) if self.ended else certain(full, rules.stop)
        return self._show(full[:cut])

    def close(self, reason: str) -> str:
        """End the text where it stands, for `reason`; return what was held back."""
        self.ended = reason
        return self._show(self._whole())

    def _show(self, text: str) -> str:
        shown = text.strip() if self._sampling.strip else text
        piece = shown[len(self.text) :]
        self.text += piece
        return piece

    def _whole(self) -> str:
        """Return the text of all tokens; only the last ones are decoded."""
        start = max(0, self._decoded - KEPT)
        before = self._decode(self.ids[start : self._decoded])
        after = self._decode(self.ids[start:])
        # a tokenizer's words may change with what follows them: then all is decoded anew
        known = after.startswith(before)
        whole = self._raw + after[len(before) :] if known else self._decode(self.ids)
        if not after.endswith("\ufffd"):
            self._raw, self._decoded = whole, len(self.ids)
        return whole

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def certain(text: str, stops: Sequence[str]) -> int:
    """Return how many characters cannot change any more: half a letter or half a stop still may."""
    whole = text.rstrip("\ufffd")
    halves = (stop[:n] for stop in stops for n in range(1, len(stop)))
    return len(whole) - max((len(half) for half in halves if whole.endswith(half)), default=0)
