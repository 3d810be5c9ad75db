"""What a long job reports while it runs: events, sweep candidates, the ledger of a sequence; callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One setting of a sweep and its result."""

    adapter: str
    settings: Mapping[str, Any]
    validation_loss: float
    best_step: int
    stopped: str
    kept: bool


@dataclass(frozen=True)
class Ledger:
    """The scores on all tasks after each stage of a sequence.

    `matrix[i][j]` is the score on task j after stage i (None if it could not be measured), `start[j]` that of
    the bare backbone. In the transfers below, larger is better whatever the metric.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    start: tuple[float, ...]
    matrix: tuple[tuple[float | None, ...], ...]

    @property
    def backward_transfer(self) -> float | None:
        """Mean over the earlier tasks of score(last stage) - score(the task's stage) (arXiv 1706.08840)."""
        last = len(self.matrix) - 1
        return _mean([self._gain(self.matrix[j][j], self.matrix[last][j], j) for j in range(last)])

    @property
    def forward_transfer(self) -> float | None:
        """Mean over the later tasks of score(the stage before the task's) - score(backbone)."""
        later = range(1, len(self.matrix))
        return _mean([self._gain(self.start[j], self.matrix[j - 1][j], j) for j in later])

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values, with both transfers."""
        return {
            **asdict(self),
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
        }

    def _gain(self, before: float | None, after: float | None, task: int) -> float | None:
        if before is None or after is None:
            return None
        return after - before if self.higher_is_better[task] else before - after


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Event:
    """A step, a validation or the end of one adapter's training."""

    adapter: str
    kind: str
    """`step`, `validation` or `stop`."""
    step: int
    total: int
    values: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Listeners:
    """Progress callbacks."""

    on_event: Callable[[Event], None] = lambda _: None
    on_judged: Callable[[str, int], None] = lambda _what, _n: None
    on_sweep: Callable[[Sequence[Candidate]], None] = lambda _: None
    on_ledger: Callable[[Ledger], None] = lambda _: None
    on_refused: Callable[[str, str], None] = lambda _name, _reason: None
    """Called with the name of each refused adapter of the pool and the reason; the others are used."""


SILENT = Listeners()
