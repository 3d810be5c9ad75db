"""Request, its Ticket while it waits and runs, and its Completion."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from adapterhub_chat.inference.sampling import GREEDY, Sampling, TokenLogprob
from adapterhub_chat.types import NO_ADAPTER, Mix


@dataclass(frozen=True, slots=True)
class Request:
    """One row to decode: prompt token ids, a mix of adapters, and sampling."""

    prompt: tuple[int, ...]
    mix: Mix = NO_ADAPTER
    sampling: Sampling = GREEDY
    deadline: float | None = None
    """Seconds after submission at which it ends with the text so far."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of a request."""

    text: str
    ids: tuple[int, ...]
    reason: str
    """"stop", "length", "cancelled" or "deadline"."""
    prompt_tokens: int
    reused_tokens: int
    """Tokens of the prompt taken from the prefix cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    first_token_seconds: float = 0.0
    """From submission to the first token."""
    seconds: float = 0.0
    """From submission to the end."""


class Driver(Protocol):
    """Makes steps until a condition holds: an Engine."""

    def drive(self, until: Callable[[], bool]) -> None:
        """Make steps, or wait while another thread makes them, until `until()` holds."""
        ...


@dataclass(eq=False)
class Ticket:
    """A submitted request: cancel it, or wait for its result."""

    request: Request
    engine: Driver
    on_text: Callable[[str], None] | None = None
    submitted: float = field(default_factory=time.monotonic)
    """Time of `time.monotonic`."""
    cancelled: bool = False
    completion: Completion | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has a completion or an error."""
        return self.completion is not None or self.error is not None

    def cancel(self) -> None:
        """End it before its next token, with the text so far."""
        self.cancelled = True

    def result(self) -> Completion:
        """Return the completion once it is there, driving the engine; raise the request's error, if any."""
        self.engine.drive(lambda: self.done)
        if self.error is not None:
            raise self.error
        assert self.completion is not None
        return self.completion

    @property
    def end_reason(self) -> str:
        """Why it must end now ("cancelled", "deadline"); empty if it may go on."""
        deadline = self.request.deadline
        if self.cancelled:
            return "cancelled"
        late = deadline is not None and time.monotonic() - self.submitted > deadline
        return "deadline" if late else ""
