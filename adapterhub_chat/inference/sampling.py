"""Sampling: the rules by which one row chooses its next token, and when its text ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.errors import UsageError

COLD = 1e-5
"""Temperatures that would only overflow."""
MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is decoded."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; below COLD there is no difference."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are no part of it."""
    ignore_eos: bool = False
    seed: int | None = None
    """Equal prompts with equal seeds give equal texts, whatever is decoded beside them."""
    strip: bool = False
    """Leave out white space at both ends."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 among all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens seen before (1909.05858)."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many likeliest ones; None reports nothing."""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning, all in one message."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k} must be at least 1, or 0 for no limit")
        if not 0 < self.repetition_penalty < math.inf:
            found.append(f"repetition_penalty={self.repetition_penalty} must be a positive number")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            found.append(f"logprobs={self.logprobs} must lie between 0 and {MOST_LOGPROBS}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            found.append(f"seed={self.seed} must fit into 64 bits")
        if "" in self.stop:
            found.append("stop must not hold an empty text: it would end every answer at once")
        if found:
            raise UsageError("; ".join(found))

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        greedy = self.temperature < COLD
        return greedy and self.repetition_penalty == 1.0 and self.logprobs is None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log-probability under the model, beside the likeliest ones."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


def generator_of(sampling: Sampling) -> torch.Generator:
    """Return a row's own generator: seeded by the request, else anew."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def pick(
    logits: Tensor, sampling: Sampling, seen: Sequence[int], generator: torch.Generator
) -> int:
    """Choose the next token from (V,) logits; `seen` are the tokens of prompt and text so far."""
    scores = logits.float().cpu()
    if sampling.repetition_penalty != 1.0:
        scores = _penalized(scores, sampling.repetition_penalty, seen)
    if sampling.temperature < COLD:
        return int(scores.argmax())
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -math.inf
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[index[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def logprob_of(logits: Tensor, token: int, likeliest: int) -> TokenLogprob:
    """Return what the model itself, before any rule, thought of a token: from (V,) logits."""
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(likeliest)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


def _penalized(scores: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    index = torch.tensor(sorted(set(seen)), dtype=torch.long)
    own = scores[index]
    scores = scores.clone()
    scores[index] = torch.where(own > 0, own / penalty, own * penalty)
    return scores
