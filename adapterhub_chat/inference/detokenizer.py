"""Detokenizer: a row's tokens as text, piece by piece, each as soon as it cannot change any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub_chat.inference.sampling import Sampling

CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded with them: their text may depend on those before."""


class Detokenizer:
    """The text of one row."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        end_ids: frozenset[int],
        *,
        streaming: bool = True,
    ) -> None:
        """Begin with an empty text; unless `streaming`, tokens are decoded at the end only, if possible.

        A token of `end_ids` ends the text and is no part of it.
        """
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason = ""
        """Why the text is complete ("stop", "length", ...); empty until it is."""
        self._tokenizer, self._sampling, self._end_ids = tokenizer, sampling, end_ids
        self._decodes_each = streaming or bool(sampling.stop)
        self._fixed_text, self._num_fixed = "", 0
        """Text of the first `_num_fixed` tokens, which does not change any more."""

    def append(self, token: int) -> str:
        """Add a token; return the text that can no longer change."""
        sampling = self._sampling
        is_eos = token in self._end_ids and not sampling.ignore_eos
        if not is_eos:
            self.ids.append(token)
        if not self._decodes_each and not is_eos and len(self.ids) < sampling.max_new_tokens:
            return ""
        text = self._full_text()
        cut = min((text.find(s) for s in sampling.stop if s in text), default=-1)
        if is_eos or cut >= 0:
            self.finish_reason = "stop"
        elif len(self.ids) >= sampling.max_new_tokens:
            self.finish_reason = "length"
        if cut < 0:
            cut = len(text) if self.finish_reason else stable_length(text, sampling.stop)
        return self._extend(text[:cut])

    def finish(self, reason: str) -> str:
        """End the text here, for `reason`; return the piece that was held back."""
        self.finish_reason = reason
        return self._extend(self._full_text())

    def _extend(self, text: str) -> str:
        """Extend the text to `text`; return the new piece."""
        text = text.strip() if self._sampling.strip else text
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _full_text(self) -> str:
        """Return the text of all tokens; only the last ones are decoded."""
        start = max(0, self._num_fixed - CONTEXT_TOKENS)
        before = self._decode(self.ids[start : self._num_fixed])
        after = self._decode(self.ids[start:])
        # a tokenizer's words may change with what follows them: then all is decoded anew
        extends = after.startswith(before)
        text = self._fixed_text + after[len(before) :] if extends else self._decode(self.ids)
        if not after.endswith("\ufffd"):
            self._fixed_text, self._num_fixed = text, len(self.ids)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def stable_length(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters that cannot change: not half a letter, nor the beginning of a stop."""
    complete = text.rstrip("\ufffd")
    beginnings = (stop[:n] for stop in stops for n in range(1, len(stop)))
    return len(complete) - max((len(b) for b in beginnings if complete.endswith(b)), default=0)
