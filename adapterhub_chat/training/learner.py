"""Learners: one adapter's own numbers, optimizer and rows in a run; families of those that share one.

What a learner does depends on its own job alone, whatever is trained beside it. A family is a learner by
itself, or several with one shared adapter: they advance, are validated and stop together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import epochs
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.training.job import Job


@dataclass(frozen=True)
class Trained:
    """A finished adapter: the weights that were best on validation, and how they came about."""

    weights: AdapterWeights
    steps: int
    best_step: int
    best_loss: float
    tokens: int
    seconds: float
    stopped: str
    """`finished`, `early` (validation stopped improving), `interrupted` (Ctrl-C), or `diverged` (the
    loss was no longer a number; with `best_step` 0 nothing was learnt before)."""
    conflict: Mapping[str, float] = field(default_factory=dict)
    """Of a shared adapter: mean cosine between two tasks' gradients on it, by `task|task`."""


def schedule(progress: float, one_step: float, config: TrainConfig) -> float:
    """Return the share of the peak learning rate: linear warm-up, then down to zero or constant.

    `progress` is the share of the run before this step, `one_step` the share of one step.
    """
    if progress < config.warmup:
        return min(1.0, (progress + one_step) / max(config.warmup, one_step))
    if config.schedule == "constant":
        return 1.0
    over = (progress - config.warmup) / (1 - config.warmup)
    return 1 - over if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * over))


def total_steps(jobs: Sequence[Job], config: TrainConfig) -> int:
    """Return how many steps `epochs` or `max_steps` of `config` allow, whichever ends first."""
    tokens = sum(example.num_inputs for job in jobs for example in job.train)
    per_step = sum(job.config.rows_per_step for job in jobs) * config.row_length
    steps = max(1, math.ceil(tokens / per_step * config.epochs))
    return min(steps, config.max_steps) if config.max_steps else steps


class Learner:
    """One adapter in training: its numbers in fp32, its places in the bank, its optimizer."""

    def __init__(self, job: Job, start: AdapterWeights, bank: Bank, slots: Sequence[int]) -> None:
        """Start from `start`, in `slots` of the bank: a shared adapter has one for each of its tasks."""
        self.job, self.bank, self.slots = job, bank, tuple(slots)
        self.vector = torch.nn.Parameter(bank.vector(start))
        self.best: Tensor | None = None
        self.tokens = self.draws = 0
        self._start = start
        for slot in self.slots:
            bank.labels[slot] = start.labels
        self._scale = start.scale(next(iter(start.factors)))
        config = job.config
        self.optimizer: Any = torch.optim.AdamW(
            [self.vector],
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._streams: dict[int, Iterator[list[list[Encoded]]]] = {}
        self.show()

    def rows(self, each: int) -> list[list[Encoded]]:
        """Return the next `each` rows: the same ones in the same order in every run of this job."""
        if each not in self._streams:
            config, examples = self.job.config, self.job.train
            length, seed = config.row_length, config.seed
            self._streams[each] = epochs(examples, num_rows=each, length=length, seed=seed)
        self.draws += 1
        return next(self._streams[each])

    def step(self, gradient: Tensor, rate: float, mean_weight: float = 1.0) -> float:
        """Clip the gradient (P,), move along it; return its norm before clipping.

        `mean_weight` is how heavy the step's examples are: it counts after clipping, which would undo it.
        """
        config = self.job.config
        if config.orthogonal and self.job.under is not None:
            present = self.bank.weights(self.vector.detach(), self._start)
            slope = overlap_gradient(present, self.job.under)
            gradient.add_(self.bank.vector(slope), alpha=config.orthogonal)
        norm = float(torch.linalg.vector_norm(gradient))
        if norm > config.clip:
            gradient.mul_(config.clip / norm)
        if mean_weight != 1.0:
            gradient.mul_(mean_weight)
        self.vector.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        self.optimizer.step()
        self.vector.grad = None
        self.show()
        return norm

    def gradient(self, slot: int, out: Tensor) -> Tensor:
        """Fill `out` (P,) with the gradient that one of its slots collected in this process."""
        return self.bank.gradient(slot, self._scale, out)

    def weights(self) -> AdapterWeights:
        """Return a copy of the best numbers, of the present ones where nothing was ever the best."""
        return self.bank.weights(
            self.vector.detach() if self.best is None else self.best, self._start
        )

    def show(self) -> None:
        """Copy the numbers into the bank, where forwards see them."""
        for slot in self.slots:
            self.bank.put(slot, self.vector.detach(), self._scale)

    def keep(self) -> None:
        """Take the present numbers as the best."""
        self.best = self.vector.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run must find again, beside the counters."""
        found = {"vector": self.vector.detach(), **self.optimizer.state[self.vector]}
        return found if self.best is None else {**found, "best": self.best}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], draws: int, each: int) -> None:
        """Go on from `tensors`, after `draws` draws of `each` rows."""
        kept = {name: tensor.to(self.bank.device) for name, tensor in tensors.items()}
        self.vector.copy_(kept.pop("vector"))
        self.best = kept.pop("best", None)
        if kept:
            self.optimizer.state[self.vector] = kept
        for _ in range(draws):
            self.rows(each)
        self.show()


def overlap(new: AdapterWeights, old: AdapterWeights) -> Tensor:
    """Return the sum over modules of |A_old A_new^T|^2, the overlap of two adapters' input subspaces.

    Orthogonal-subspace protection (O-LoRA, arXiv 2310.14152, equation 8, squared instead of absolute).
    """
    pairs = [
        (old.factors[m][0].float(), a) for m, (a, _) in new.factors.items() if m in old.factors
    ]
    return sum(((its @ mine.T).square().sum() for its, mine in pairs), torch.zeros(()))


def overlap_gradient(new: AdapterWeights, old: AdapterWeights) -> AdapterWeights:
    """Return the gradient of `overlap` with respect to the new factors: 2 A_new A_old^T A_old for A."""
    found = {}
    for module, (a, b) in new.factors.items():
        if module in old.factors:
            its = old.factors[module][0].to(a)
            found[module] = (2 * (a @ its.T) @ its, torch.zeros_like(b))
    return replace(new.with_factors(found), head=None)
