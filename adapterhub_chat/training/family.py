"""Learners that advance together because they share one adapter: their steps, counters and conflicts."""

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
"""Steps between two comparisons of the tasks' gradients on a shared adapter."""

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes of a run."""


@dataclass(frozen=True)
class StepRows:
    """One learner's rows in one step."""

    learner: Learner
    rows: Sequence[Sequence[Encoded]]
    weight: float
    """Share of the learner's loss in the family's loss."""

    @property
    def mean_weight(self) -> float:
        """Mean weight of the answers' tokens; tokens of weight zero are not counted."""
        counts = [
            (example.weight, sum(map(len, example.continuations)))
            for row in self.rows
            for example in row
            if example.weight > 0
        ]
        num_tokens = sum(count for _, count in counts)
        return sum(weight * count for weight, count in counts) / num_tokens if num_tokens else 1.0


@dataclass
class Counters:
    """A family's progress. The field names are keys of saved states."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    misses: int = 0
    """Validations since the last improvement."""
    over: bool = False
    """Whether all steps are done."""
    stopped: str = ""
    """Why training stopped; empty while it goes on."""
    seconds: float = 0.0
    cosines: dict[str, list[float]] = field(default_factory=dict)
    """Sum and number of the cosines between two tasks' gradients, by `task|task`."""


class Family:
    """A single learner, or several learners with one shared adapter."""

    def __init__(self, members: Sequence[Learner], shared: Learner | None = None) -> None:
        """Join `members`, each with its own examples, and the learner of the adapter that they share."""
        self.members, self.shared = tuple(members), shared
        self.config = (shared or members[0]).job.config
        self.num_steps = total_steps([member.job for member in members], self.config)
        self.counters = Counters()

    @property
    def learners(self) -> tuple[Learner, ...]:
        """All learners, the shared one last."""
        return self.members if self.shared is None else (*self.members, self.shared)

    @property
    def eval_every(self) -> int:
        """Steps between two validations."""
        return self.config.eval_every or max(1, self.num_steps // 8)

    @property
    def has_validation(self) -> bool:
        """Whether any member has validation examples."""
        return any(member.job.validation for member in self.members)

    @property
    def validation_due(self) -> bool:
        """Whether to validate after the last step: every `eval_every` steps, and at the end."""
        counters = self.counters
        if counters.stopped:
            return False
        return counters.over or (self.has_validation and counters.step % self.eval_every == 0)

    def progress(self, elapsed: float) -> float:
        """Return the finished share of the run: by steps or by seconds, whichever is larger."""
        max_seconds = self.config.max_minutes * 60
        by_time = elapsed / max_seconds if max_seconds else 0.0
        return min(1.0, max(self.counters.step / self.num_steps, by_time))

    def draw(self) -> list[StepRows]:
        """Return the rows of the next step: a fixed number, distributed over the members.

        With a shared adapter a member is drawn for each row, with probability size ** (1 / temperature).
        """
        if self.shared is None:
            (member,) = self.members
            return [StepRows(member, member.next_rows(member.job.config.rows_per_step), 1.0)]
        num_rows = sum(member.job.config.rows_per_step for member in self.members)
        sizes = torch.tensor([float(len(member.job.train)) for member in self.members])
        seed = (self.config.seed * 1_000_003 + self.counters.step) % 2**63
        generator = torch.Generator().manual_seed(seed)
        probabilities = (sizes.double().log() / self.config.temperature).softmax(0)
        chosen = torch.multinomial(probabilities, num_rows, replacement=True, generator=generator)
        groups = []
        for member, count in zip(self.members, chosen.bincount(minlength=len(sizes)), strict=True):
            rows = [row for _ in range(int(count)) for row in member.next_rows(1)]
            if rows:
                groups.append(StepRows(member, rows, len(rows) / num_rows))
        return groups

    def update(
        self,
        groups: Sequence[StepRows],
        losses: Sequence[float],
        all_reduce: AllReduce,
        elapsed: float,
        next_end: float,
    ) -> dict[str, dict[str, float]]:
        """Step every learner that had rows; return each one's loss, gradient norm and rate, by name.

        The step began `elapsed` seconds into the run; another step of the same length would end at
        `next_end` seconds. No step is begun that would end after the time limit. A loss that is not finite
        stops the family.
        """
        if not all(math.isfinite(loss) for loss in losses):
            self.counters.stopped = "diverged"  # its rows do not affect other families' gradients
            return {}
        progress, step_share = self.progress(elapsed), 1 / self.num_steps
        metrics: dict[str, dict[str, float]] = {}
        mean_loss = sum(group.weight * loss for group, loss in zip(groups, losses, strict=True))
        scratch = self.members[0].bank.scratch
        if self.shared is not None:
            gradient = self._shared_gradient(groups, all_reduce, scratch)
            name = self.shared.job.name
            metrics[name] = self._step(self.shared, gradient, progress, step_share, mean_loss)
        for group, loss in zip(groups, losses, strict=True):
            learner = group.learner
            gradient = all_reduce(learner.gradient(learner.slots[0], scratch))
            metrics[learner.job.name] = self._step(
                learner, gradient, progress, step_share, loss, group.mean_weight
            )
            learner.num_tokens += sum(example.num_inputs for row in group.rows for example in row)
        if self.shared is not None:
            self.shared.num_tokens = sum(member.num_tokens for member in self.members)
        self.counters.step += 1
        self.counters.over = self.progress(next_end) >= 1
        return metrics

    def record_validation(self, loss: float) -> None:
        """Record the mean validation loss (NaN without one); keep the present numbers if it is the best."""
        better = loss < self.counters.best_loss or not self.has_validation
        self.counters.misses = 0 if better else self.counters.misses + 1
        if better:
            self.keep_best(loss)

    def keep_best(self, loss: float) -> None:
        """Keep every learner's present numbers as the best ones, with their validation loss."""
        self.counters.best_loss, self.counters.best_step = loss, self.counters.step
        for learner in self.learners:
            learner.keep_best()

    def interrupt(self) -> None:
        """Stop; a family that was never validated keeps its present numbers."""
        if not self.counters.stopped:
            self.counters.stopped = "interrupted"
            if not self.counters.best_step and self.counters.step:
                self.keep_best(math.nan)

    def check_stop(self, elapsed: float) -> bool:
        """Stop at the end of the run or when validation no longer improves; return whether it stopped."""
        counters, patience = self.counters, self.config.patience
        if not counters.stopped and counters.over:
            counters.stopped = "finished"
        elif not counters.stopped and patience and counters.misses >= patience:
            counters.stopped = "early"
        if counters.stopped in ("", "finished"):
            auxiliaries = (member.job.auxiliary for member in self.members)
            reasons = (auxiliary.stopped for auxiliary in auxiliaries if auxiliary)
            counters.stopped = next(filter(None, reasons), counters.stopped)
        counters.seconds = elapsed
        return bool(counters.stopped)

    def results(self) -> dict[str, Trained]:
        """Return every learner's result by name."""
        counters = self.counters
        cosines = {pair: total / number for pair, (total, number) in counters.cosines.items()}
        return {
            learner.job.name: Trained(
                weights=learner.weights(),
                steps=counters.step,
                best_step=counters.best_step,
                best_loss=counters.best_loss,
                tokens=learner.num_tokens,
                seconds=counters.seconds,
                stopped=counters.stopped,
                conflict=cosines if learner is self.shared else {},
            )
            for learner in self.learners
        }

    def shared_slot(self, member: Learner) -> int:
        """Return the shared adapter's slot for the rows of `member`."""
        assert self.shared is not None
        return self.shared.slots[self.members.index(member)]

    def counters_json(self) -> dict[str, Any]:
        """Return all counters that a resumed run needs, in JSON's own types."""
        counts = {x.job.name: [x.num_tokens, x.num_draws] for x in self.learners}
        return {**asdict(self.counters), "learners": counts}

    def restore(
        self, counters: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Continue from `counters` (see `counters_json`) and each learner's `tensors`."""
        counts = counters["learners"]
        self.counters = Counters(**{k: v for k, v in counters.items() if k != "learners"})
        for learner in self.learners:
            num_tokens, num_draws = counts[learner.job.name]
            num_rows = 1 if self.shared else learner.job.config.rows_per_step
            learner.restore(tensors[learner.job.name], num_draws, num_rows)
            learner.num_tokens = num_tokens

    @staticmethod
    def _step(
        learner: Learner,
        gradient: Tensor,
        progress: float,
        step_share: float,
        loss: float,
        mean_weight: float = 1.0,
    ) -> dict[str, float]:
        rate = schedule(progress, step_share, learner.job.config)
        norm = learner.step(gradient, rate, mean_weight)
        peak = learner.job.config.learning_rate
        return {"loss": loss, "gradient_norm": norm, "learning_rate": peak * rate}

    def _shared_gradient(
        self, groups: Sequence[StepRows], all_reduce: AllReduce, scratch: Tensor
    ) -> Tensor:
        """Return the sum of the tasks' gradients on the shared adapter.

        Every CONFLICT_EVERY steps the cosine between each two of them is recorded.
        """
        assert self.shared is not None
        total = torch.zeros_like(scratch)
        gradients: dict[str, Tensor] = {}
        for group in groups:
            gradient = self.shared.gradient(self.shared_slot(group.learner), scratch)
            total += gradient
            if self.counters.step % CONFLICT_EVERY == 0:
                gradients[group.learner.job.name] = all_reduce(gradient.clone())
        for (task, g), (other, h) in combinations(gradients.items(), 2):
            cosine = float(functional.cosine_similarity(g, h, dim=0))
            pair = self.counters.cosines.setdefault(f"{task}|{other}", [0.0, 0])
            pair[0] += cosine
            pair[1] += 1
        return all_reduce(total)
