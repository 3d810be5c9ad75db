"""The one training loop: any number of adapters on one frozen backbone, each row with its own mix.

Joint training is exactly training each alone: an adapter's rows, loss, gradient norm, clipping, schedule
and optimizer state depend on its own job alone, and its factors get a gradient from its own rows only. With
several processes each one takes a share of every adapter's rows, and the gradients are summed. Nothing is
written to disk here; `on_event` and `on_state` are called after every step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.data.packing import Batch, in_order
from adapterhub_chat.errors import DataError, UsageError
from adapterhub_chat.events import Event
from adapterhub_chat.inference.likelihood import sum_by_owner, token_loss_sums, token_losses
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.lora.weights import AdapterWeights, initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import capture_blocks
from adapterhub_chat.training.auxiliary import auxiliary_losses
from adapterhub_chat.training.distributed import join, num_processes
from adapterhub_chat.training.family import Family, StepRows
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import Learner, Trained

MIN_TOTAL_WEIGHT = 1e-6
"""Lower bound of the answers' total weight, by which a step's loss is divided."""
VALIDATION_ROWS = 4
"""Number of packed rows in a validation batch."""


@dataclass(frozen=True)
class RunState:
    """All that is needed to continue a run exactly where it was."""

    identity: str
    """Hash of the backbone, the jobs' settings and their examples."""
    elapsed: float
    """Seconds trained so far."""
    counters: Mapping[str, Any]
    """Each family's counters, by the name of its first adapter."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """`adapter/tensor` -> tensor."""


OnState = Callable[[Callable[[], RunState]], None]
"""Called after every step with a function that returns the state."""


def train(
    model: AdapterModel,
    jobs: Sequence[Job],
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    on_state: OnState = lambda _: None,
    on_end: Callable[[RunState], None] = lambda _: None,
    resume: RunState | None = None,
) -> dict[str, Trained]:
    """Train every job's adapter in one run; return the results by name.

    `resume` continues from a state that `on_state` or, at the end, `on_end` was given. Ctrl-C ends the run
    early: the best weights until then are returned, marked `interrupted`. Raises UsageError if the jobs
    cannot share a batch or the state belongs to another run, DataError if a job has no examples.
    """
    run = TrainingRun(model, jobs, on_event)
    if resume is not None:
        run.restore(resume)
    try:
        while any(not family.counters.stopped for family in run.families):
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
    if num_processes() > 1 and any(job.auxiliary for job in jobs):
        raise UsageError("an adversarial transfer trains in one process; start it without torchrun")
    for job in jobs:
        if not job.train and job.name not in shared:
            raise DataError(f"adapter {job.name!r} has no training examples")


def _members_by_shared(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs that share an adapter, by the name of the shared adapter."""
    names = dict.fromkeys(job.shared for job in jobs if job.shared)
    return {name: [job for job in jobs if job.shared == name] for name in names}


def _slots_by_job(
    jobs: Sequence[Job], members: Mapping[str, Sequence[Job]]
) -> dict[str, list[int]]:
    """Return the slots of each job's adapter.

    A shared adapter has one slot for each member, so that the members' gradients can be told apart.
    """
    free = count()
    slots = {job.name: [next(free)] for job in jobs if job.name not in members}
    return slots | {name: [next(free) for _ in sharing] for name, sharing in members.items()}


class TrainingRun:
    """All families of a run, the bank of their weights, and the common forward and backward."""

    def __init__(
        self,
        model: AdapterModel,
        jobs: Sequence[Job],
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Allocate the bank and initialise every adapter; no step is made yet."""
        _check(jobs)
        self.model, self.jobs, self.on_event = model, jobs, on_event
        self.accelerator = join(model.backbone.device)
        self.length = jobs[0].config.row_length
        self.frozen_slots: dict[str, int] = {}
        """Job name -> slot of the frozen adapter that acts on its rows."""
        self.families = self._families()
        self._started, self._elapsed = time.monotonic(), 0.0

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> None:
        """Run one forward and backward over the rows of all active families, then update each of them."""
        elapsed = self._measure_elapsed()
        active = [family for family in self.families if not family.counters.stopped]
        drawn = [family.draw() for family in active]
        losses = iter(self._backward([group for groups in drawn for group in groups]))
        next_end = 2 * self._measure_elapsed() - elapsed
        for family, groups in zip(active, drawn, strict=True):
            group_losses = [next(losses) for _ in groups]
            metrics = family.update(groups, group_losses, self._all_reduce, elapsed, next_end)
            for name, values in metrics.items():
                self._report(family, name, "step", values)
        for family in active:
            if family.validation_due:
                self._validate(family)
        elapsed = self._measure_elapsed()
        for family in active:
            if family.check_stop(elapsed):
                for learner in family.learners:
                    values = {"loss": family.counters.best_loss}
                    self._report(family, learner.job.name, "stop", values, family.counters.stopped)

    def _backward(self, groups: Sequence[StepRows]) -> list[float]:
        """Collect every group's gradient in the bank; return each group's mean loss per answer token.

        With several processes, each one runs a share of every group's rows; the losses are those of all rows.
        """
        num_processes, index = self.accelerator.num_processes, self.accelerator.process_index
        rows = [self.model.arranged(list(group.rows)[index::num_processes]) for group in groups]
        factor = 1.0
        if not any(rows):  # every process runs every forward: a sharded backbone needs all of them
            rows[0], factor = [groups[0].rows[0]], 0.0
        total_weights = [
            sum(e.weight * len(c) for row in group.rows for e in row for c in e.continuations)
            for group in groups
        ]
        self.bank.zero_gradients()
        owner = torch.repeat_interleave(
            torch.arange(len(groups)), torch.tensor([len(group_rows) for group_rows in rows])
        )
        batch = self.model.pack([row for group_rows in rows for row in group_rows], self.length)
        mixes = torch.stack([self._mix(group.learner) for group in groups])[owner]
        auxiliaries = [group.learner.job.auxiliary for group in groups]
        layers = [auxiliary.layer for auxiliary in auxiliaries if auxiliary]
        plan = Plan(self.bank.places, mixes)
        with activate(plan), capture_blocks(self.model, layers) as block_outputs:
            logits = self.model.answer_logits(batch)
        means = self._mean_losses(batch, logits, owner, torch.tensor(total_weights)) * factor
        weights = torch.tensor([group.weight for group in groups])
        loss = (means * weights.to(means)).sum()
        if layers:
            loss = sum(auxiliary_losses(groups, rows, batch, logits, block_outputs), loss)
        self.accelerator.backward(loss)
        return list(self._all_reduce(means.detach()).tolist())

    def _mean_losses(
        self, batch: Batch, logits: Tensor, owner: Tensor, total_weights: Tensor
    ) -> Tensor:
        """Return each group's weighted sum of token losses over its answers' total weight in all processes.

        `owner` (N,) is the number of the group of each row.
        """
        losses = token_losses(logits, batch.targets.to(logits.device))
        losses = losses * batch.weights.to(losses.device)
        target_owner = owner[batch.keep // batch.ids.shape[1]].to(losses.device)
        sums = sum_by_owner(losses, target_owner, len(total_weights))
        return sums / total_weights.clamp(min=MIN_TOTAL_WEIGHT).to(losses.device)

    def _mix(self, learner: Learner) -> Tensor:
        """Return the mix (S,) of a learner's rows: its slot, and those of a shared and a frozen adapter."""
        mix = torch.zeros(self.bank.slots)
        mix[learner.slots[0]] = 1.0
        family = next(f for f in self.families if learner in f.members)
        if family.shared is not None:
            mix[family.shared_slot(learner)] = 1.0
        if learner.job.frozen is not None:
            mix[self.frozen_slots[learner.job.name]] = 1.0
        return mix

    # -- validation --------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, family: Family) -> None:
        """Measure the mean validation loss of a family; keep its weights if it is the best."""
        losses = {m.job.name: self.validation_loss(m) for m in family.members}
        known = [losses[m.job.name] for m in family.members if m.job.validation]
        mean = sum(known) / len(known) if known else math.nan
        family.record_validation(mean)
        for learner in family.learners:
            loss = losses.get(learner.job.name, mean)
            values = {"loss": loss, "best": family.counters.best_loss}
            self._report(family, learner.job.name, "validation", values)

    @torch.no_grad()
    def validation_loss(self, learner: Learner) -> float:
        """Return the mean loss over the validation answers' tokens, NaN when there are none."""
        num_processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = in_order(learner.job.validation, num_rows=VALIDATION_ROWS, length=self.length)
        batches = [self.model.pack(group, self.length) for group, _ in rows]
        mix = self._mix(learner)

        def mixing(num_rows: int) -> AbstractContextManager[None]:
            return activate(Plan(self.bank.places, mix.expand(num_rows, -1)))

        share = batches[rank::num_processes]
        sums = token_loss_sums(self.model, share, mixing)
        if len(share) < -(-len(batches) // num_processes):  # as many forwards in every process
            token_loss_sums(self.model, batches[:1], mixing)
        loss, num_tokens = self._all_reduce(sums).tolist()
        return loss / num_tokens if num_tokens else math.nan

    # -- clock and state ---------------------------------------------------------------------------

    def _measure_elapsed(self) -> float:
        """Return the seconds trained so far; with a time limit, by the first process's clock in all."""
        self._elapsed = time.monotonic() - self._started
        if any(job.config.max_minutes for job in self.jobs):
            first = self._elapsed if self.accelerator.process_index == 0 else 0.0
            seconds = torch.tensor(first, device=self.model.backbone.device)
            self._elapsed = float(self._all_reduce(seconds))
        return self._elapsed

    def state(self) -> RunState:
        """Return the run's present state; its tensors are not copies."""
        learners = [learner for family in self.families for learner in family.learners]
        return RunState(
            identity=self.identity,
            elapsed=self._elapsed,
            counters={f.members[0].job.name: f.counters_json() for f in self.families},
            tensors={
                f"{x.job.name}/{name}": tensor
                for x in learners
                for name, tensor in x.tensors().items()
            },
        )

    def restore(self, state: RunState) -> None:
        """Continue from a state; raise UsageError if it belongs to another run."""
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
            family.restore(state.counters[family.members[0].job.name], tensors)

    def interrupt(self) -> None:
        """Stop all families."""
        for family in self.families:
            family.interrupt()

    def results(self) -> dict[str, Trained]:
        """Return every adapter's result by name."""
        return {name: trained for f in self.families for name, trained in f.results().items()}

    # -- setup -------------------------------------------------------------------------------------

    def _families(self) -> list[Family]:
        """Allocate the bank, start a learner for each job, and join those that share an adapter."""
        members = _members_by_shared(self.jobs)
        slots = _slots_by_job(self.jobs, members)
        starts = {job.name: job.start or self._initial_weights(job) for job in self.jobs}
        self.bank = self._new_bank(starts, num_trained=sum(map(len, slots.values())))
        learners = {
            job.name: Learner(job, starts[job.name], self.bank, slots[job.name])
            for job in self.jobs
        }
        single = [job for job in self.jobs if not job.shared and job.name not in members]
        return [
            *(Family([learners[job.name]]) for job in single),
            *(
                Family([learners[job.name] for job in jobs], learners[name])
                for name, jobs in members.items()
            ),
        ]

    def _initial_weights(self, job: Job) -> AdapterWeights:
        """Return new weights as the job's settings describe them."""
        config, width = job.config, self.model.backbone.width
        return initial_weights(
            select_targets(self.model.shapes, config.targets, config.layers),
            rank=config.rank,
            alpha=config.alpha,
            rslora=config.rslora,
            seed=config.seed,
            head=(job.labels, width) if job.labels and width else None,
        )

    def _new_bank(self, starts: Mapping[str, AdapterWeights], num_trained: int) -> Bank:
        """Return a bank with `num_trained` free slots, then a slot for each frozen adapter, written."""
        frozen = {job.name: job.frozen for job in self.jobs if job.frozen is not None}
        all_weights = [*starts.values(), *frozen.values()]
        bank = self.model.new_bank(
            tuple(dict.fromkeys(m for weights in all_weights for m in weights.factors)),
            slots=num_trained + len(frozen),
            rank=max(weights.max_rank for weights in all_weights),
            dtype=self.model.slot_dtype,
            labels=max(weights.labels for weights in all_weights),
            trainable=True,
        )
        for slot, (name, weights) in enumerate(frozen.items(), num_trained):
            bank.write(slot, weights)
            self.frozen_slots[name] = slot
        return bank

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all processes, in place; return it."""
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    @cached_property
    def identity(self) -> str:
        """The sha256 of the backbone, the jobs' settings, their weights and their examples."""
        digest = hashlib.sha256(repr(self.model.backbone.fingerprint).encode())
        for job in self.jobs:
            settings = [job.name, job.shared, job.config.model_dump()]
            digest.update(json.dumps(settings).encode())
            for weights in filter(None, (job.frozen, job.start)):
                for tensor in weights.tensors():
                    digest.update(tensor.numpy().tobytes())
            digest.update(repr([*job.train, "|", *job.validation]).encode())
        return digest.hexdigest()

    def _report(
        self,
        family: Family,
        adapter: str,
        kind: str,
        values: Mapping[str, float],
        note: str = "",
    ) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.on_event(Event(adapter, kind, family.counters.step, family.num_steps, finite, note))
