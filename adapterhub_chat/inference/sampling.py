"""Sampling: how a row's next token is chosen from its logits, and when its text ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.errors import UsageError

MIN_TEMPERATURE = 1e-5
"""Lower temperatures count as 0: the logits would overflow."""
MAX_LOGPROBS = 20
"""Alternatives whose log-probabilities are reported, at most."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is decoded."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; so is anything below MIN_TEMPERATURE."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are no part of it."""
    ignore_eos: bool = False
    seed: int | None = None
    """Equal prompts with equal seeds give equal texts, whatever else is in the batch."""
    strip: bool = False
    """Remove white space at both ends."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 among all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens seen before (1909.05858)."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many likeliest tokens; None reports nothing."""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning, all in one message."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature={self.temperature} must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be at least 1, or 0 for no limit")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(
                f"repetition_penalty={self.repetition_penalty} must be a positive number"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            problems.append(f"logprobs={self.logprobs} must lie between 0 and {MAX_LOGPROBS}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            problems.append(f"seed={self.seed} must fit into 64 bits")
        if "" in self.stop:
            problems.append("stop must not hold an empty text: it would end every answer at once")
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is the argmax of the logits and no log-probabilities are reported."""
        greedy = self.temperature < MIN_TEMPERATURE
        return greedy and self.repetition_penalty == 1.0 and self.logprobs is None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's log-probability under the model, and those of the likeliest tokens."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), the likeliest first."""


def make_generator(sampling: Sampling) -> torch.Generator:
    """Return a generator for one row, seeded by `sampling.seed`, or at random without one."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def sample_token(
    logits: Tensor, sampling: Sampling, tokens: Sequence[int], generator: torch.Generator
) -> int:
    """Return the next token, from logits (V,); `tokens` are those of prompt and text so far."""
    scores = logits.float().cpu()
    if sampling.repetition_penalty != 1.0:
        scores = _penalized(scores, sampling.repetition_penalty, tokens)
    if sampling.temperature < MIN_TEMPERATURE:
        return int(scores.argmax())
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -math.inf
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        excluded = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[index[excluded]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def token_logprob(logits: Tensor, token: int, num_likeliest: int) -> TokenLogprob:
    """Return a token's log-probability from logits (V,), before temperature, penalty or cuts."""
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(num_likeliest)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


def _penalized(scores: Tensor, penalty: float, tokens: Sequence[int]) -> Tensor:
    index = torch.tensor(sorted(set(tokens)), dtype=torch.long)
    repeated = scores[index]
    scores = scores.clone()
    scores[index] = torch.where(repeated > 0, repeated / penalty, repeated * penalty)
    return scores
