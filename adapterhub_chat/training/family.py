"""Learners that share one adapter: joint parts, their counters and their conflicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.training.learner import Learner, Trained, schedule, total_steps

CONFLICT_EVERY = 5
"""Steps between two looks at how the tasks' gradients on a shared adapter agree."""

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over the processes of a run."""


@dataclass(frozen=True)
class StepRows:
    """A learner's rows in one step."""

    learner: Learner
    rows: Sequence[Sequence[Encoded]]
    weight: float
    """Share of its loss in the family's."""

    @property
    def mean_weight(self) -> float:
        """Mean weight of its answers' tokens, those of no weight apart; the loss is a mean by weight."""
        counts = [
            (example.weight, sum(map(len, example.continuations)))
            for row in self.rows
            for example in row
            if example.weight > 0
        ]
        tokens = sum(count for _, count in counts)
        return sum(weight * count for weight, count in counts) / tokens if tokens else 1.0


@dataclass
class Counters:
    """Where a family stands."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    misses: int = 0
    over: bool = False
    stopped: str = ""
    seconds: float = 0.0
    cosines: dict[str, list[float]] = field(default_factory=dict)
    """Sum and number of the cosines between two tasks' gradients, by `task|task`."""


class Family:
    """A learner by itself, or learners with one shared adapter."""

    def __init__(self, members: Sequence[Learner], shared: Learner | None = None) -> None:
        """Join `members`, each with examples of its own, and the adapter that they share."""
        self.members, self.shared = tuple(members), shared
        self.config = (shared or members[0]).job.config
        self.total = total_steps([m.job for m in members], self.config)
        self.now = Counters()

    @property
    def learners(self) -> tuple[Learner, ...]:
        """All of them, the shared one last."""
        return self.members if self.shared is None else (*self.members, self.shared)

    @property
    def eval_every(self) -> int:
        """Steps between two validations."""
        return self.config.eval_every or max(1, self.total // 8)

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return any(m.job.validation for m in self.members)

    @property
    def validation_due(self) -> bool:
        """Whether the last step calls for a validation: every so many steps, and at the end."""
        if self.now.stopped:
            return False
        return self.now.over or (self.validates and self.now.step % self.eval_every == 0)

    def progress(self, elapsed: float) -> float:
        """Return the share of the run that is over, by steps or by the clock, whichever is further."""
        limit = self.config.max_minutes * 60
        return min(1.0, max(self.now.step / self.total, elapsed / limit if limit else 0.0))

    def draw(self) -> list[StepRows]:
        """Return the rows of the next step: a fixed number, shared out between the members."""
        if self.shared is None:
            (member,) = self.members
            return [StepRows(member, member.rows(member.job.config.rows_per_step), 1.0)]
        budget = sum(m.job.config.rows_per_step for m in self.members)
        sizes = torch.tensor([float(len(m.job.train)) for m in self.members])
        seed = (self.config.seed * 1_000_003 + self.now.step) % 2**63
        generator = torch.Generator().manual_seed(seed)
        chances = (sizes.double().log() / self.config.temperature).softmax(0)  # size ** (1 / T)
        chosen = torch.multinomial(chances, budget, replacement=True, generator=generator)
        parts = []
        for member, count in zip(self.members, chosen.bincount(minlength=len(sizes)), strict=True):
            rows = [row for _ in range(int(count)) for row in member.rows(1)]
            if rows:
                parts.append(StepRows(member, rows, len(rows) / budget))
        return parts

    def learn(
        self,
        parts: Sequence[StepRows],
        losses: Sequence[float],
        total: Sum,
        elapsed: float,
        next_end: float,
    ) -> dict[str, dict[str, float]]:
        """Step every learner that had rows; return what each did, by name, for the log.

        The step began after `elapsed` seconds; another one as long would end after `next_end`. One that
        the clock has no room for is not begun.
        """
        if not all(math.isfinite(loss) for loss in losses):
            self.now.stopped = "diverged"  # its rows touch nobody else's gradient
            return {}
        before, one = self.progress(elapsed), 1 / self.total
        told: dict[str, dict[str, float]] = {}
        mean = sum(part.weight * loss for part, loss in zip(parts, losses, strict=True))
        scratch = self.members[0].bank.scratch
        if self.shared is not None:
            gradient = self._shared_gradient(parts, total, scratch)
            told[self.shared.job.name] = self._step(self.shared, gradient, before, one, mean)
        for part, loss in zip(parts, losses, strict=True):
            learner = part.learner
            gradient = total(learner.gradient(learner.slots[0], scratch))
            told[learner.job.name] = self._step(
                learner, gradient, before, one, loss, part.mean_weight
            )
            learner.tokens += sum(e.num_inputs for row in part.rows for e in row)
        if self.shared is not None:
            self.shared.tokens = sum(m.tokens for m in self.members)
        self.now.step += 1
        self.now.over = self.progress(next_end) >= 1
        return told

    def judge(self, loss: float) -> None:
        """Take the mean validation loss (NaN without one); keep everybody's numbers when it is the best."""
        better = loss < self.now.best_loss or not self.validates
        self.now.misses = 0 if better else self.now.misses + 1
        if better:
            self.keep(loss)

    def keep(self, loss: float) -> None:
        """Take all present numbers as the best."""
        self.now.best_loss, self.now.best_step = loss, self.now.step
        for learner in self.learners:
            learner.keep()

    def interrupt(self) -> None:
        """Stop; what was never validated keeps what it has learnt by now."""
        if not self.now.stopped:
            self.now.stopped = "interrupted"
            if not self.now.best_step and self.now.step:
                self.keep(math.nan)

    def finish(self, elapsed: float) -> bool:
        """Stop when the run is over or validation no longer improves; say whether it stands still."""
        now, patience = self.now, self.config.patience
        if not now.stopped and now.over:
            now.stopped = "finished"
        elif not now.stopped and patience and now.misses >= patience:
            now.stopped = "early"
        if now.stopped in ("", "finished"):
            alarms = (m.job.auxiliary.stopped for m in self.members if m.job.auxiliary)
            now.stopped = next(filter(None, alarms), now.stopped)
        now.seconds = elapsed
        return bool(now.stopped)

    def results(self) -> dict[str, Trained]:
        """Return every learner's result by name."""
        now = self.now
        cosines = {pair: total / number for pair, (total, number) in now.cosines.items()}
        return {
            learner.job.name: Trained(
                weights=learner.weights(),
                steps=now.step,
                best_step=now.best_step,
                best_loss=now.best_loss,
                tokens=learner.tokens,
                seconds=now.seconds,
                stopped=now.stopped,
                conflict=cosines if learner is self.shared else {},
            )
            for learner in self.learners
        }

    def shared_slot(self, member: Learner) -> int:
        """Return the slot in which the shared adapter stands beside `member`."""
        assert self.shared is not None
        return self.shared.slots[self.members.index(member)]

    def numbers(self) -> dict[str, Any]:
        """Return the counters that a resumed run must find again, JSON's own types."""
        counts = {x.job.name: [x.tokens, x.draws] for x in self.learners}
        return {**asdict(self.now), "learners": counts}

    def restore(
        self, numbers: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Go on from what `numbers` and each learner's `tensors` gave."""
        counts = numbers["learners"]
        self.now = Counters(**{k: v for k, v in numbers.items() if k != "learners"})
        for learner in self.learners:
            tokens, draws = counts[learner.job.name]
            each = 1 if self.shared else learner.job.config.rows_per_step
            learner.restore(tensors[learner.job.name], draws, each)
            learner.tokens = tokens

    @staticmethod
    def _step(
        learner: Learner,
        gradient: Tensor,
        before: float,
        one: float,
        loss: float,
        mean_weight: float = 1.0,
    ) -> dict[str, float]:
        rate = schedule(before, one, learner.job.config)
        norm = learner.step(gradient, rate, mean_weight)
        peak = learner.job.config.learning_rate
        return {"loss": loss, "gradient_norm": norm, "learning_rate": peak * rate}

    def _shared_gradient(self, parts: Sequence[StepRows], total: Sum, scratch: Tensor) -> Tensor:
        """Return the sum of the tasks' gradients on the shared adapter; now and then, compare them."""
        assert self.shared is not None
        whole = torch.zeros_like(scratch)
        found: dict[str, Tensor] = {}
        for part in parts:
            own = self.shared.gradient(self.shared_slot(part.learner), scratch)
            whole += own
            if self.now.step % CONFLICT_EVERY == 0:
                found[part.learner.job.name] = total(own.clone())
        for (one, g), (other, h) in combinations(found.items(), 2):
            cosine = float(functional.cosine_similarity(g, h, dim=0))
            pair = self.now.cosines.setdefault(f"{one}|{other}", [0.0, 0])
            pair[0] += cosine
            pair[1] += 1
        return total(whole)
