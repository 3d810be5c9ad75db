"""The one training loop: any number of adapters on one frozen backbone, each row with its own mix.

Joint training is exactly training each alone: an adapter's rows, loss, gradient norm, clipping, schedule
and optimizer state depend on nothing but its own job, and the equation gives its factors a gradient from
its own rows only. Nothing is written to disk here; `on_event` hears of every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adapterhub_chat.batches import epochs, in_order, pack
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import DataError, UsageError
from adapterhub_chat.jobs import Job
from adapterhub_chat.lora import Plan, activate
from adapterhub_chat.losses import sum_by_owner, token_losses
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.template import Encoded
from adapterhub_chat.weights import AdapterWeights, initial_weights

VALIDATION_ROWS = 4
"""Packed rows of a validation batch."""


@dataclass(frozen=True)
class Event:
    """What happened to one adapter at one step."""

    adapter: str
    kind: str
    """`step`, `validation` or `stop`."""
    step: int
    total: int
    values: Mapping[str, float]
    note: str = ""


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


def train(
    model: AdapterModel, jobs: Sequence[Job], *, on_event: Callable[[Event], None] = lambda _: None
) -> dict[str, Trained]:
    """Train every job's adapter in one run and return them by name.

    Ctrl-C ends the run early: what was best until then is returned, marked `interrupted`. Raises
    UsageError when the jobs cannot share a batch, DataError when one has nothing to learn from.
    """
    _check(jobs)
    run = _Run(model, jobs, on_event)
    try:
        while any(learner.stopped == "" for learner in run.learners):
            run.step()
    except KeyboardInterrupt:
        run.interrupt()
    return {learner.job.name: learner.result() for learner in run.learners}


def targeted(shapes: Mapping[str, tuple[int, int]], targets: str) -> dict[str, tuple[int, int]]:
    """Return the modules that `targets` names: `all-linear`, or last names such as `q_proj,v_proj`."""
    if targets == "all-linear":
        return dict(shapes)
    wanted = [t.strip() for t in targets.split(",") if t.strip()]
    known = {module.rpartition(".")[2] for module in shapes}
    if unknown := [t for t in wanted if t not in known]:
        raise UsageError(
            f"targets: the backbone has no linear layer named {', '.join(unknown)}; "
            f"allowed are all-linear, {', '.join(sorted(known))}"
        )
    return {m: shape for m, shape in shapes.items() if m.rpartition(".")[2] in wanted}


def _check(jobs: Sequence[Job]) -> None:
    if not jobs:
        raise UsageError("nothing to train: name at least one task")
    if len({job.name for job in jobs}) < len(jobs):
        raise UsageError("two adapters of one run have the same name; names must differ")
    if len({job.config.row_length for job in jobs}) > 1:
        raise UsageError("adapters trained in one run need one row_length: they share a batch")
    for job in jobs:
        if not job.train:
            raise DataError(f"adapter {job.name!r} has no training examples")


def total_steps(job: Job) -> int:
    """Return how many steps `epochs` or `max_steps` allow, whichever ends first."""
    tokens = sum(example.num_inputs for example in job.train)
    per_epoch = tokens / (job.config.rows_per_step * job.config.row_length)
    steps = max(1, math.ceil(per_epoch * job.config.epochs))
    limit: int = job.config.max_steps
    return min(steps, limit) if limit else steps


@dataclass
class _Learner:
    """One adapter's own state in the run: stream of rows, optimizer, schedule, best weights."""

    job: Job
    slot: int
    initial: AdapterWeights
    parameters: list[torch.nn.Parameter]
    stream: Iterator[list[list[Encoded]]]
    optimizer: torch.optim.Optimizer
    total: int
    best: AdapterWeights
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    misses: int = 0
    tokens: int = 0
    over: bool = False
    stopped: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """The share of the run that is over, by steps or by the clock, whichever is further."""
        limit = self.job.config.max_minutes * 60
        by_clock = (time.monotonic() - self.started) / limit if limit else 0.0
        return min(1.0, max(self.step / self.total, by_clock))

    @property
    def eval_every(self) -> int:
        """Steps between two validations."""
        return self.job.config.eval_every or max(1, self.total // 8)

    @property
    def validation_due(self) -> bool:
        """Whether the last step calls for a validation: every so many steps, and at the end."""
        if self.stopped:
            return False
        often = bool(self.job.validation) and self.step % self.eval_every == 0
        return often or self.over

    def apply_gradient(self) -> tuple[float, float]:
        """Clip, set the learning rate, step; return (gradient norm before clipping, learning rate)."""
        config = self.job.config
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        rate = config.learning_rate * schedule(self.progress, 1 / self.total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return float(norm), rate

    def result(self) -> Trained:
        return Trained(
            weights=self.best,
            steps=self.step,
            best_step=self.best_step,
            best_loss=self.best_loss,
            tokens=self.tokens,
            seconds=self.seconds or time.monotonic() - self.started,
            stopped=self.stopped,
        )


def schedule(progress: float, one_step: float, config: TrainConfig) -> float:
    """Return the share of the peak learning rate: linear warm-up, then cosine to zero or constant.

    `progress` is the share of the run before this step, `one_step` the share of one step.
    """
    if progress < config.warmup:
        return min(1.0, (progress + one_step) / max(config.warmup, one_step))
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))


class _Run:
    """All learners, the bank that they train in, and the shared forward and backward."""

    def __init__(
        self, model: AdapterModel, jobs: Sequence[Job], on_event: Callable[[Event], None]
    ) -> None:
        self.model, self.on_event = model, on_event
        self.accelerator = Accelerator(cpu=model.backbone.device.type == "cpu")
        starts = [
            initial_weights(
                targeted(model.shapes, job.config.targets),
                rank=job.config.rank,
                alpha=job.config.alpha,
                rslora=job.config.rslora,
                seed=job.config.seed,
            )
            for job in jobs
        ]
        self.bank = model.new_bank(
            tuple({m for start in starts for m in start.factors}),
            slots=len(jobs),
            rank=max(job.config.rank for job in jobs),
            dtype=torch.float32,
            trainable=True,
        )
        self.length = jobs[0].config.row_length
        self.learners = [
            self._learner(slot, job, start)
            for slot, (job, start) in enumerate(zip(jobs, starts, strict=True))
        ]

    def step(self) -> None:
        """Run one forward and backward over every live learner's rows, then each one's own update."""
        live = [learner for learner in self.learners if not learner.stopped]
        rows = [next(learner.stream) for learner in live]
        losses = self._losses(live, rows)
        self.bank.zero_grad()
        self.accelerator.backward(torch.stack(losses).sum())
        for learner, loss, own in zip(live, losses, rows, strict=True):
            value = float(loss.detach())
            if not math.isfinite(value):
                learner.stopped = "diverged"
                continue  # its rows touch nobody else's gradient
            norm, rate = learner.apply_gradient()
            learner.over = learner.progress >= 1
            learner.tokens += sum(e.num_inputs for row in own for e in row)
            values = {"loss": value, "gradient_norm": norm, "learning_rate": rate}
            self._tell(learner, "step", values)
        losses.clear()  # and with them the graph, before more memory is needed
        self._validate([x for x in live if x.validation_due])
        for learner in live:
            self._finish(learner)

    def _losses(
        self, live: Sequence[_Learner], rows: Sequence[list[list[Encoded]]]
    ) -> list[Tensor]:
        """Return each learner's mean loss over its own answer tokens."""
        batch = pack([row for own in rows for row in own], self.length)
        mix = torch.zeros(batch.num_rows, self.bank.slots)
        row_learner = torch.repeat_interleave(
            torch.arange(len(live)), torch.tensor([len(own) for own in rows])
        )
        mix[torch.arange(batch.num_rows), torch.tensor([x.slot for x in live])[row_learner]] = 1.0
        with activate(Plan(self.bank, mix)):
            logits = self.model.answer_logits(batch)
        device = self.model.backbone.device
        losses = token_losses(logits, batch.targets.to(device))
        owner = row_learner[batch.keep // self.length].to(device)
        counts = torch.bincount(owner, minlength=len(live))
        means = sum_by_owner(losses, owner, len(live)) / counts.clamp(min=1)
        return list(means.unbind())

    @torch.no_grad()
    def _validate(self, due: Sequence[_Learner]) -> None:
        """Measure the mean validation loss of each learner that is due; keep its weights when best."""
        for learner in due:
            loss = self._held_out_loss(learner)
            better = loss < learner.best_loss or not learner.job.validation
            learner.misses = 0 if better else learner.misses + 1
            if better:
                self._keep(learner, loss)
            self._tell(learner, "validation", {"loss": loss, "best": learner.best_loss})

    def _held_out_loss(self, learner: _Learner) -> float:
        """Return the mean loss over the validation answers' tokens, NaN when there are none."""
        total, count = 0.0, 0
        examples = learner.job.validation
        for rows, _ in in_order(examples, num_rows=VALIDATION_ROWS, length=self.length):
            batch = pack(rows, self.length)
            mix = torch.zeros(batch.num_rows, self.bank.slots)
            mix[:, learner.slot] = 1.0
            with activate(Plan(self.bank, mix)):
                logits = self.model.answer_logits(batch)
            total += float(token_losses(logits, batch.targets.to(logits.device)).sum())
            count += len(batch.targets)
        return total / count if count else math.nan

    def _keep(self, learner: _Learner, loss: float) -> None:
        """Take the learner's present weights as its best."""
        learner.best_loss, learner.best_step = loss, learner.step
        learner.best = self.bank.read(learner.slot, learner.initial)

    def interrupt(self) -> None:
        """Stop all learners; one that was never validated keeps what it has learnt by now."""
        for learner in self.learners:
            if not learner.stopped:
                learner.stopped = "interrupted"
                if not learner.best_step and learner.step:
                    self._keep(learner, math.nan)

    def _finish(self, learner: _Learner) -> None:
        config = learner.job.config
        if learner.over:
            learner.stopped = learner.stopped or "finished"
        elif config.patience and learner.misses >= config.patience:
            learner.stopped = "early"
        if learner.stopped:
            learner.seconds = time.monotonic() - learner.started
            self._tell(learner, "stop", {"loss": learner.best_loss}, note=learner.stopped)

    def _learner(self, slot: int, job: Job, start: AdapterWeights) -> _Learner:
        self.bank.write(slot, start)
        config = job.config
        parameters = self.bank.parameters(slot)
        optimizer: Any = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        stream = epochs(
            job.train, num_rows=config.rows_per_step, length=self.length, seed=config.seed
        )
        return _Learner(job, slot, start, parameters, stream, optimizer, total_steps(job), start)

    def _tell(
        self, learner: _Learner, kind: str, values: Mapping[str, float], note: str = ""
    ) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self.on_event(Event(learner.job.name, kind, learner.step, learner.total, known, note))
