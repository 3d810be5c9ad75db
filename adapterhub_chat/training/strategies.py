"""Courses: the ways in which adapters are learnt in one run, each a generator of finished adapters.

joint: all at once. sweep: several settings of one adapter at once, the best on validation is kept.
shared: joint, with one more adapter under all of them. sequence: one after another, or one that grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from adapterhub_chat.config import RunOptions, TrainConfig
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.events import Candidate, Event
from adapterhub_chat.lora.weights import AdapterWeights, concatenate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.loop import OnState, RunState, train


@dataclass(frozen=True)
class CheckpointHooks:
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
    memory: Callable[[str], CheckpointHooks] = lambda _: CheckpointHooks(),
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


ALL = "run"
"""Name of the memory of a course that is one run of the training loop."""


@dataclass(frozen=True)
class FinishedAdapter:
    """An adapter that a course has finished."""

    job: Job
    trained: Trained
    tasks: tuple[str, ...]
    """The adapters' names of the jobs whose tasks it has learnt."""
    beside: tuple[str, ...] = ()
    note: str = ""

    @property
    def weights(self) -> AdapterWeights:
        """Its numbers."""
        return self.trained.weights


@dataclass(frozen=True)
class StrategyContext:
    """What every course is given."""

    model: AdapterModel
    jobs: Mapping[str, Job]
    options: RunOptions
    sweeps: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    on_event: Callable[[Event], None] = lambda _: None
    on_sweep: Callable[[Sequence[Candidate]], None] = lambda _: None
    memory: Callable[[str], CheckpointHooks] = lambda _: CheckpointHooks()

    def run(self) -> Iterator[FinishedAdapter]:
        """Yield the adapters as they are finished."""
        return STRATEGIES[self.options.how](self)

    def train(self, jobs: Sequence[Job]) -> dict[str, Trained]:
        """Train jobs in one run of the loop."""
        kept = self.memory(ALL)
        with self.model.checkpointing(self.options.checkpointing):
            return train(
                self.model,
                jobs,
                on_event=self.on_event,
                on_state=kept.on_state,
                on_end=kept.on_end,
                resume=kept.resume,
            )

    def others(self, name: str) -> tuple[str, ...]:
        """Return who is trained beside `name`."""
        return tuple(other for other in self.jobs if other != name)


def joint(course: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train all jobs, and all settings of a sweep, in one run."""
    variants = {
        name: _variants(job, course.sweeps.get(name, {})) for name, job in course.jobs.items()
    }
    results = course.train([v.job for group in variants.values() for v in group])
    table: list[Candidate] = []
    for name, group in variants.items():
        best = min(group, key=lambda v: _rank(results[v.job.name]))
        for v in group if len(group) > 1 else ():
            done = results[v.job.name]
            found = (done.best_loss, done.best_step, done.stopped, v is best)
            table.append(Candidate(name, v.settings, *found))
        job = replace(best.job, name=name)
        note = f"best of {len(group)} settings on validation" if len(group) > 1 else ""
        yield FinishedAdapter(job, results[best.job.name], (name,), course.others(name), note)
    if table:
        course.on_sweep(table)


def shared(course: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train an adapter for each task and one more that acts on all rows; finish each as a plain adapter.

    A task's adapter is the sum of the shared one and its own, ranks side by side, so that it works alone
    and everywhere; the shared one is an adapter, too.
    """
    name = course.options.shared_name
    first = next(iter(course.jobs.values()))
    common = Job(name, (), (), first.config)
    jobs = [replace(job, shared=name) for job in course.jobs.values()]
    results = course.train([*jobs, common])
    base = results[name]
    yield FinishedAdapter(common, base, tuple(course.jobs))
    for job in course.jobs.values():
        done = results[job.name]
        whole = replace(done, weights=concatenate([base.weights, done.weights]))
        note = f"the shared adapter {name!r} and its own, ranks side by side"
        yield FinishedAdapter(job, whole, (job.name,), (*course.others(job.name), name), note)


def sequence(course: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train the jobs one after another: a new adapter for each, or one that grows."""
    options, names = course.options, list(course.jobs)
    with course.model.checkpointing(options.checkpointing):
        stages = train_sequence(
            course.model,
            list(course.jobs.values()),
            grow=options.grow,
            replay=options.replay,
            on_event=course.on_event,
            memory=course.memory,
        )
        for name, trained in stages:
            job = course.jobs[name]
            if options.grow:
                learnt = tuple(names[: names.index(name) + 1])
                note = f"grown by a block of rank {job.config.rank} for each task"
                yield FinishedAdapter(
                    replace(job, name=options.grown_name), trained, learnt, (), note
                )
            else:
                yield FinishedAdapter(job, trained, (name,))


STRATEGIES: Mapping[str, Callable[[StrategyContext], Iterator[FinishedAdapter]]] = {
    "joint": joint,
    "shared": shared,
    "sequence": sequence,
}


@dataclass(frozen=True)
class _Variant:
    job: Job
    settings: Mapping[str, Any]


def _variants(job: Job, sweep: Mapping[str, Sequence[Any]]) -> list[_Variant]:
    """Return the job under every combination of the sweep's values; the job itself without a sweep."""
    if not sweep:
        return [_Variant(job, {})]
    found = []
    for values in product(*sweep.values()):
        settings = dict(zip(sweep, values, strict=True))
        title = ",".join(f"{key}={value}" for key, value in settings.items())
        config = TrainConfig.model_validate({**job.config.model_dump(), **settings})
        found.append(_Variant(replace(job, name=f"{job.name}@{title}", config=config), settings))
    return found


def _rank(done: Trained) -> tuple[bool, float]:
    """Order results: those that have learnt something first, then by validation loss."""
    known = math.isfinite(done.best_loss)
    return done.best_step == 0, done.best_loss if known else math.inf
