"""Requests: what is asked, the ticket for it, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from adapterhub_chat.inference.sampling import GREEDY, Sampling, TokenLogprob
from adapterhub_chat.types import NO_ADAPTER, Mix


@dataclass(frozen=True, slots=True)
class Request:
    """One row: prompt ids, who answers, and how."""

    prompt: tuple[int, ...]
    mix: Mix = NO_ADAPTER
    sampling: Sampling = GREEDY
    deadline: float | None = None
    """Seconds from its submission after which it ends with what there is."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request."""

    text: str
    ids: tuple[int, ...]
    reason: str
    """"stop", "length", "cancelled" or "deadline"."""
    prompt_tokens: int
    reused_tokens: int
    """Tokens of the prompt that an earlier request had computed."""
    logprobs: tuple[TokenLogprob, ...] = ()
    first_token_seconds: float = 0.0
    seconds: float = 0.0


class Driver(Protocol):
    """What makes requests go on."""

    def drive(self, until: Callable[[], bool]) -> None:
        """Work, or wait for whoever works, until `until()` holds."""
        ...


@dataclass(eq=False)
class Ticket:
    """A submitted request."""

    request: Request
    engine: Driver
    on_text: Callable[[str], None] | None = None
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    completion: Completion | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.completion is not None or self.error is not None

    def cancel(self) -> None:
        """End it before its next token, with what there is."""
        self.cancelled = True

    def result(self) -> Completion:
        """Wait for the end, driving the engine; raise what went wrong."""
        self.engine.drive(lambda: self.done)
        if self.error is not None:
            raise self.error
        assert self.completion is not None
        return self.completion

    @property
    def end_reason(self) -> str:
        """Why it should not go on ("cancelled", "deadline"), or an empty string."""
        limit = self.request.deadline
        if self.cancelled:
            return "cancelled"
        late = limit is not None and time.monotonic() - self.submitted > limit
        return "deadline" if late else ""
