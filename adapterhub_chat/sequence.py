"""Tasks one after another: a new adapter for each, or one that grows; and what was forgotten on the way.

A new adapter leaves the earlier ones as they are, so nothing can be forgotten. One that grows gets a new
block of ranks for each task, trained on top of its frozen earlier ones (O-LoRA, arXiv 2310.14152), with a
share of earlier examples and a penalty on overlapping input subspaces, if asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adapterhub_chat.jobs import Job
from adapterhub_chat.learner import Trained
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.template import Encoded
from adapterhub_chat.train import Event, OnState, RunState, train
from adapterhub_chat.weights import AdapterWeights, concatenate


@dataclass(frozen=True)
class Memory:
    """How a stage's state is kept and found again."""

    on_state: OnState = lambda _: None
    on_end: Callable[[RunState], None] = lambda _: None
    resume: RunState | None = None


def train_sequence(
    model: AdapterModel,
    jobs: Sequence[Job],
    *,
    grow: bool = False,
    replay: float = 0.0,
    on_event: Callable[[Event], None] = lambda _: None,
    memory: Callable[[str], Memory] = lambda _: Memory(),
) -> Iterator[tuple[str, Trained]]:
    """Yield each stage when it is finished; stop after one that was interrupted.

    With `grow`, a stage's weights are all blocks so far as one adapter; `replay` is the share of a stage's
    examples that earlier tasks give. `memory(job name)` keeps and gives back the state of a stage.
    """
    grown: AdapterWeights | None = None
    for number, job in enumerate(jobs):
        if grow:
            config = job.config.model_copy(update={"seed": job.config.seed + number})
            examples = _replayed(job, jobs[:number], replay)
            job = replace(job, under=grown, train=examples, config=config)
        kept = memory(job.name)
        (trained,) = train(
            model,
            [job],
            on_event=on_event,
            on_state=kept.on_state,
            on_end=kept.on_end,
            resume=kept.resume,
        ).values()
        if grow:
            blocks = [trained.weights] if grown is None else [grown, trained.weights]
            grown = concatenate(blocks)
            trained = replace(trained, weights=grown)
        yield job.name, trained
        if trained.stopped == "interrupted":
            return


def _replayed(job: Job, earlier: Sequence[Job], share: float) -> Sequence[Encoded]:
    """Return the job's examples and so many of the earlier jobs' that these make up `share` of all.

    Earlier jobs that have too few give what they have.
    """
    if not earlier or not share:
        return job.train
    each = round(len(job.train) * share / (1 - share) / len(earlier))
    generator = torch.Generator().manual_seed(job.config.seed)
    old = [
        other.train[i]
        for other in earlier
        for i in torch.randperm(len(other.train), generator=generator)[:each].tolist()
    ]
    return [*job.train, *old]


@dataclass(frozen=True)
class Ledger:
    """Who was how good at what, when: the record of a sequence.

    `matrix[i][j]` is the score on task j after stage i (None where nothing could be measured), and
    `start[j]` the backbone's. Differences are given so that more is better, whatever the metric.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    start: tuple[float, ...]
    matrix: tuple[tuple[float | None, ...], ...]

    @property
    def backward_transfer(self) -> float | None:
        """Mean of score(last stage) - score(own stage) over the earlier tasks (arXiv 1706.08840)."""
        last = len(self.matrix) - 1
        return _mean([self._gain(self.matrix[j][j], self.matrix[last][j], j) for j in range(last)])

    @property
    def forward_transfer(self) -> float | None:
        """Mean of score(stage before its own) - score(backbone) over the later tasks."""
        later = range(1, len(self.matrix))
        return _mean([self._gain(self.start[j], self.matrix[j - 1][j], j) for j in later])

    def as_json(self) -> dict[str, Any]:
        """Return the plain form, with the transfers worked out."""
        transfer = {"backward_transfer": self.backward_transfer}
        return {**asdict(self), **transfer, "forward_transfer": self.forward_transfer}

    def _gain(self, before: float | None, after: float | None, task: int) -> float | None:
        if before is None or after is None:
            return None
        return after - before if self.higher_is_better[task] else before - after


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
