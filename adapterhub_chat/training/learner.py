"""Learner: the numbers, optimizer and rows of one adapter in training; the learning-rate schedule.

A learner depends on its own job alone, not on the other adapters of the run.
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
    """A trained adapter: the weights that were best on validation, and statistics of the training."""

    weights: AdapterWeights
    steps: int
    best_step: int
    best_loss: float
    tokens: int
    seconds: float
    stopped: str
    """`finished`, `early` (validation stopped improving), `interrupted` (Ctrl-C), `diverged` (the loss was
    not finite; with `best_step` 0 nothing was learnt before), or an auxiliary loss's reason."""
    conflict: Mapping[str, float] = field(default_factory=dict)
    """For a shared adapter: mean cosine between two tasks' gradients on it, by `task|task`."""


def schedule(progress: float, step_share: float, config: TrainConfig) -> float:
    """Return the factor of the peak learning rate: linear warm-up, then decay to zero or constant.

    `progress` is the finished share of the run before this step, `step_share` the share of one step.
    """
    if progress < config.warmup:
        return min(1.0, (progress + step_share) / max(config.warmup, step_share))
    if config.schedule == "constant":
        return 1.0
    decay = (progress - config.warmup) / (1 - config.warmup)
    return 1 - decay if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * decay))


def total_steps(jobs: Sequence[Job], config: TrainConfig) -> int:
    """Return the number of steps: the smaller of what `epochs` and `max_steps` of `config` allow."""
    num_tokens = sum(example.num_inputs for job in jobs for example in job.train)
    tokens_per_step = sum(job.config.rows_per_step for job in jobs) * config.row_length
    steps = max(1, math.ceil(num_tokens / tokens_per_step * config.epochs))
    return min(steps, config.max_steps) if config.max_steps else steps


class Learner:
    """One adapter in training: its fp32 numbers, its slots in the bank, its optimizer."""

    def __init__(self, job: Job, start: AdapterWeights, bank: Bank, slots: Sequence[int]) -> None:
        """Start from `start`, in `slots` of the bank; a shared adapter has one slot for each of its tasks."""
        self.job, self.bank, self.slots = job, bank, tuple(slots)
        self.vector = torch.nn.Parameter(bank.vector(start))
        self.best: Tensor | None = None
        self.num_tokens = self.num_draws = 0
        self._start = start
        for slot in self.slots:
            bank.set_num_labels(slot, start.labels)
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
        self.write_bank()

    def next_rows(self, num_rows: int) -> list[list[Encoded]]:
        """Return the next `num_rows` rows: the same rows in the same order in every run of this job."""
        if num_rows not in self._streams:
            config, examples = self.job.config, self.job.train
            length, seed = config.row_length, config.seed
            self._streams[num_rows] = epochs(examples, num_rows=num_rows, length=length, seed=seed)
        self.num_draws += 1
        return next(self._streams[num_rows])

    def step(self, gradient: Tensor, rate: float, mean_weight: float = 1.0) -> float:
        """Clip the gradient (P,) in place and make one optimizer step; return the norm before clipping.

        `rate` is the factor of the peak learning rate. `mean_weight` is the mean weight of the step's
        examples; the gradient is multiplied by it after clipping, which would undo it.
        """
        config = self.job.config
        if config.orthogonal and self.job.frozen is not None:
            present = self.bank.weights(self.vector.detach(), self._start)
            penalty = overlap_gradient(present, self.job.frozen)
            gradient.add_(self.bank.vector(penalty), alpha=config.orthogonal)
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
        self.write_bank()
        return norm

    def gradient(self, slot: int, out: Tensor) -> Tensor:
        """Fill `out` (P,) with the gradient that a slot of this learner collected in this process."""
        return self.bank.gradient(slot, self._scale, out)

    def weights(self) -> AdapterWeights:
        """Return a copy of the best numbers, or of the present ones if none were kept as the best."""
        return self.bank.weights(
            self.vector.detach() if self.best is None else self.best, self._start
        )

    def write_bank(self) -> None:
        """Copy the numbers into the bank, where forwards read them."""
        for slot in self.slots:
            self.bank.put(slot, self.vector.detach(), self._scale)

    def keep_best(self) -> None:
        """Keep a copy of the present numbers as the best ones."""
        self.best = self.vector.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs; they are not copies."""
        tensors = {"vector": self.vector.detach(), **self.optimizer.state[self.vector]}
        return tensors if self.best is None else {**tensors, "best": self.best}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_draws: int, num_rows: int) -> None:
        """Continue from `tensors`, after `num_draws` draws of `num_rows` rows."""
        state = {name: tensor.to(self.bank.device) for name, tensor in tensors.items()}
        self.vector.copy_(state.pop("vector"))
        self.best = state.pop("best", None)
        if state:
            self.optimizer.state[self.vector] = state
        for _ in range(num_draws):
            self.next_rows(num_rows)
        self.write_bank()


def overlap_gradient(new: AdapterWeights, old: AdapterWeights) -> AdapterWeights:
    """Return the gradient of the overlap of two adapters' input subspaces with respect to the new factors.

    The overlap is the sum over modules of |A_old A_new^T|^2 (O-LoRA, arXiv 2310.14152, equation 8, squared
    instead of absolute), so the gradient is 2 A_new A_old^T A_old for A, and zero for B.
    """
    gradients = {}
    for module, (a, b) in new.factors.items():
        if module in old.factors:
            a_old = old.factors[module][0].to(a)
            gradients[module] = (2 * (a @ a_old.T) @ a_old, torch.zeros_like(b))
    return replace(new.with_factors(gradients), head=None)
