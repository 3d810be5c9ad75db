"""The one training loop: any number of adapters on one frozen backbone, each row with its own mix.

Joint training is exactly training each alone: an adapter's rows, loss, gradient norm, clipping, schedule
and optimizer state depend on nothing but its own job, and the equation gives its factors a gradient from
its own rows only. With several processes each takes a share of every adapter's rows, and gradients are
added up. Nothing is written to disk here; `on_event` and `on_state` hear of every step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.data.packing import Batch, in_order, pack
from adapterhub_chat.errors import DataError, UsageError
from adapterhub_chat.events import Event
from adapterhub_chat.inference.likelihood import sum_by_owner, token_losses
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import capture_blocks
from adapterhub_chat.training.auxiliary import auxiliary_losses
from adapterhub_chat.training.distributed import join, processes
from adapterhub_chat.training.family import Family, StepRows
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import Learner, Trained

SMALLEST = 1e-6
"""Weight of a step's answers that is divided by at least."""
VALIDATION_ROWS = 4
"""Packed rows of a validation batch."""


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on as if it had never ended."""

    identity: str
    """Of the backbone, the jobs' settings and their examples."""
    elapsed: float
    """Seconds trained so far."""
    numbers: Mapping[str, Any]
    """Each family's counters, by the name of its first adapter."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """`adapter/tensor` -> numbers."""


OnState = Callable[[Callable[[], RunState]], None]
"""Hears of every step; the function that it is given makes the state, if it wants one."""


def train(
    model: AdapterModel,
    jobs: Sequence[Job],
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    on_state: OnState = lambda _: None,
    on_end: Callable[[RunState], None] = lambda _: None,
    resume: RunState | None = None,
) -> dict[str, Trained]:
    """Train every job's adapter in one run and return them by name.

    `resume` goes on from a state that `on_state` or, at the end, `on_end` was given. Ctrl-C ends the run
    early: what was best until then is returned, marked `interrupted`. Raises UsageError when the jobs
    cannot share a batch or the state is another run's, DataError when a job has nothing to learn from.
    """
    run = TrainingRun(model, jobs, on_event)
    if resume is not None:
        run.restore(resume)
    try:
        while any(not family.now.stopped for family in run.families):
            run.step()
            on_state(run.state)
        on_end(run.state())
    except KeyboardInterrupt:
        run.interrupt()
    results = run.results()
    return {job.name: results[job.name] for job in jobs}


def _check(jobs: Sequence[Job]) -> None:
    if not jobs:
        raise UsageError("nothing to train: name at least one task")
    if len({job.name for job in jobs}) < len(jobs):
        raise UsageError("two adapters of one run have the same name; names must differ")
    if len({job.config.row_length for job in jobs}) > 1:
        raise UsageError("adapters trained in one run need one row_length: they share a batch")
    shared = {job.shared for job in jobs if job.shared}
    if missing := shared - {job.name for job in jobs}:
        raise UsageError(f"no job trains the shared adapter {', '.join(sorted(missing))}")
    if processes() > 1 and any(job.auxiliary for job in jobs):
        raise UsageError("an adversarial transfer trains in one process; start it without torchrun")
    for job in jobs:
        if not job.train and job.name not in shared:
            raise DataError(f"adapter {job.name!r} has no training examples")


class TrainingRun:
    """All families, the bank that they train in, and the shared forward and backward."""

    def __init__(
        self,
        model: AdapterModel,
        jobs: Sequence[Job],
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Lay out the bank and start every adapter; nothing is learnt yet."""
        _check(jobs)
        self.model, self.jobs, self.on_event = model, jobs, on_event
        self.accelerator = join(model.backbone.device)
        self.length = jobs[0].config.row_length
        self.under: dict[str, int] = {}
        self.families = self._families()
        self._started, self._now = time.monotonic(), 0.0

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> None:
        """Run one forward and backward over every live family's rows, then each one's own update."""
        elapsed = self._clock()
        live = [family for family in self.families if not family.now.stopped]
        drawn = [family.draw() for family in live]
        losses = iter(self._backward([part for parts in drawn for part in parts]))
        next_end = 2 * self._clock() - elapsed
        for family, parts in zip(live, drawn, strict=True):
            own = [next(losses) for _ in parts]
            for name, values in family.learn(parts, own, self._total, elapsed, next_end).items():
                self._tell(family, name, "step", values)
        for family in live:
            if family.validation_due:
                self._validate(family)
        elapsed = self._clock()
        for family in live:
            if family.finish(elapsed):
                for learner in family.learners:
                    values = {"loss": family.now.best_loss}
                    self._tell(family, learner.job.name, "stop", values, family.now.stopped)

    def _backward(self, parts: Sequence[StepRows]) -> list[float]:
        """Leave every part's gradient in the bank; return each one's mean loss over its answer tokens.

        With several processes, each sees a share of every part's rows; the losses are everybody's.
        """
        count, mine = self.accelerator.num_processes, self.accelerator.process_index
        rows = [list(part.rows)[mine::count] for part in parts]
        counts = 1.0
        if not any(rows):  # every process runs every forward: a sharded backbone needs all of them
            rows[0], counts = [parts[0].rows[0]], 0.0
        wanted = [
            sum(e.weight * len(c) for row in part.rows for e in row for c in e.continuations)
            for part in parts
        ]
        self.bank.zero_gradients()
        owner = torch.repeat_interleave(
            torch.arange(len(parts)), torch.tensor([len(own) for own in rows])
        )
        batch = pack([row for own in rows for row in own], self.length)
        mixes = torch.stack([self._mix(part.learner) for part in parts])[owner]
        layers = [own.layer for part in parts if (own := part.learner.job.auxiliary)]
        with activate(Plan(self.bank.places, mixes)), capture_blocks(self.model, layers) as heard:
            logits = self.model.answer_logits(batch)
        means = self._means(batch, logits, owner, torch.tensor(wanted)) * counts
        weights = torch.tensor([part.weight for part in parts])
        loss = (means * weights.to(means)).sum()
        more = auxiliary_losses(parts, rows, batch, logits, heard) if layers else []
        self.accelerator.backward(sum(more, loss))
        return list(self._total(means.detach()).tolist())

    def _means(self, batch: Batch, logits: Tensor, owner: Tensor, wanted: Tensor) -> Tensor:
        """Return each part's weighted sum of losses over the weight of its answer tokens everywhere."""
        losses = token_losses(logits, batch.targets.to(logits.device))
        losses = losses * batch.weights.to(losses.device)
        belongs = owner[batch.keep // self.length].to(losses.device)
        sums = sum_by_owner(losses, belongs, len(wanted))
        return sums / wanted.clamp(min=SMALLEST).to(losses.device)

    def _mix(self, learner: Learner) -> Tensor:
        """Return the mix (S,) of a learner's rows: its own slot, and who else acts on them."""
        mix = torch.zeros(self.bank.slots)
        mix[learner.slots[0]] = 1.0
        family = next(f for f in self.families if learner in f.members)
        if family.shared is not None:
            mix[family.shared_slot(learner)] = 1.0
        if learner.job.under is not None:
            mix[self.under[learner.job.name]] = 1.0
        return mix

    # -- validation --------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, family: Family) -> None:
        """Measure the mean validation loss of a family; keep its numbers when it is the best."""
        losses = {m.job.name: self.held_out_loss(m) for m in family.members}
        known = [losses[m.job.name] for m in family.members if m.job.validation]
        mean = sum(known) / len(known) if known else math.nan
        family.judge(mean)
        for learner in family.learners:
            loss = losses.get(learner.job.name, mean)
            values = {"loss": loss, "best": family.now.best_loss}
            self._tell(family, learner.job.name, "validation", values)

    @torch.no_grad()
    def held_out_loss(self, learner: Learner) -> float:
        """Return the mean loss over the validation answers' tokens, NaN when there are none."""
        count, mine = self.accelerator.num_processes, self.accelerator.process_index
        sums = torch.zeros(2, dtype=torch.float64, device=self.model.backbone.device)
        examples = learner.job.validation
        batches = [b for b, _ in in_order(examples, num_rows=VALIDATION_ROWS, length=self.length)]
        for turn in range(-(-len(batches) // count)):  # as many forwards in every process
            number = turn * count + mine
            batch = pack(batches[number % len(batches)], self.length)
            mix = self._mix(learner).expand(batch.num_rows, -1)
            with activate(Plan(self.bank.places, mix)):
                logits = self.model.answer_logits(batch)
            if number < len(batches):
                sums[0] += token_losses(logits, batch.targets.to(logits.device)).sum()
                sums[1] += len(batch.targets)
        loss, tokens = self._total(sums).tolist()
        return loss / tokens if tokens else math.nan

    # -- beginning and end -------------------------------------------------------------------------

    def _clock(self) -> float:
        """Return the seconds trained so far, the first process's clock in all of them."""
        self._now = time.monotonic() - self._started
        if any(job.config.max_minutes for job in self.jobs):
            first = self._now if self.accelerator.process_index == 0 else 0.0
            seconds = torch.tensor(first, device=self.model.backbone.device)
            self._now = float(self._total(seconds))
        return self._now

    def state(self) -> RunState:
        """Return the run's present state; its tensors are not copies."""
        learners = [learner for family in self.families for learner in family.learners]
        return RunState(
            identity=self.identity,
            elapsed=self._now,
            numbers={f.members[0].job.name: f.numbers() for f in self.families},
            tensors={
                f"{x.job.name}/{name}": tensor
                for x in learners
                for name, tensor in x.tensors().items()
            },
        )

    def restore(self, state: RunState) -> None:
        """Go on from a state; raise UsageError when it belongs to another run."""
        if state.identity != self.identity:
            raise UsageError(
                "the saved state belongs to another run: backbone, adapters, settings and examples "
                "must be the same to resume; start a new run, or give the settings of the old one"
            )
        self._started = time.monotonic() - state.elapsed
        tensors: dict[str, dict[str, Tensor]] = {}
        for path, tensor in state.tensors.items():
            adapter, _, name = path.rpartition("/")
            tensors.setdefault(adapter, {})[name] = tensor
        for family in self.families:
            family.restore(state.numbers[family.members[0].job.name], tensors)

    def interrupt(self) -> None:
        """Stop all families."""
        for family in self.families:
            family.interrupt()

    def results(self) -> dict[str, Trained]:
        """Return every adapter's result by name."""
        return {name: done for f in self.families for name, done in f.results().items()}

    # -- inside ------------------------------------------------------------------------------------

    def _families(self) -> list[Family]:
        """Lay out the bank (a slot for each task, for what stands under it, and for what it shares)."""
        shared = {job.shared: [j for j in self.jobs if j.shared == job.shared] for job in self.jobs}
        width = self.model.backbone.width
        starts = {
            job.name: job.start
            or initial_weights(
                select_targets(self.model.shapes, job.config.targets, job.config.layers),
                rank=job.config.rank,
                alpha=job.config.alpha,
                rslora=job.config.rslora,
                seed=job.config.seed,
                head=(job.labels, width) if job.labels and width else None,
            )
            for job in self.jobs
        }
        slots = {
            job.name: [n] for n, job in enumerate(j for j in self.jobs if j.name not in shared)
        }
        free = len(slots)
        for name, members in shared.items():
            if name:  # one slot beside each task, so that their gradients can be told apart
                slots[name] = list(range(free, free + len(members)))
                free += len(members)
        frozen = [job for job in self.jobs if job.under is not None]
        all_weights = [*starts.values(), *(job.under for job in frozen if job.under is not None)]
        self.bank = self.model.new_bank(
            tuple(dict.fromkeys(m for weights in all_weights for m in weights.factors)),
            slots=free + len(frozen),
            rank=max(weights.max_rank for weights in all_weights),
            dtype=self.model.slot_dtype,
            labels=max(weights.labels for weights in all_weights),
            trainable=True,
        )
        for slot, job in enumerate(frozen, free):
            assert job.under is not None
            self.bank.write(slot, job.under)
            self.under[job.name] = slot
        made = {
            job.name: Learner(job, starts[job.name], self.bank, slots[job.name])
            for job in self.jobs
        }
        alone = [Family([made[job.name]]) for job in shared.get("", []) if job.name not in shared]
        return [
            *alone,
            *(Family([made[j.name] for j in m], made[name]) for name, m in shared.items() if name),
        ]

    def _total(self, tensor: Tensor) -> Tensor:
        """Return the tensor added up over all processes, in place."""
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    @cached_property
    def identity(self) -> str:
        """The sha256 of backbone, settings and examples."""
        digest = hashlib.sha256(repr(self.model.backbone.fingerprint).encode())
        for job in self.jobs:
            own = [job.name, job.shared, job.config.model_dump()]
            digest.update(json.dumps(own).encode())
            for other in filter(None, (job.under, job.start)):
                for tensor in other.tensors():
                    digest.update(tensor.numpy().tobytes())
            digest.update(repr([*job.train, "|", *job.validation]).encode())
        return digest.hexdigest()

    def _tell(
        self,
        family: Family,
        adapter: str,
        kind: str,
        values: Mapping[str, float],
        note: str = "",
    ) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self.on_event(Event(adapter, kind, family.now.step, family.total, known, note))
