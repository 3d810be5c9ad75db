"""Training strategies: how the adapters of one run are trained; each is a generator of finished adapters.

joint: all at once; with a sweep, several settings of an adapter at once, of which the best on validation is
kept. shared: joint, with one more adapter that all tasks share. sequence: one after another, or one adapter
that grows by a block for each task.
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
from adapterhub_chat.validation import read_settings


@dataclass(frozen=True)
class CheckpointHooks:
    """Where a stage of a run saves its state, and the state from which it resumes."""

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
    hooks_of: Callable[[str], CheckpointHooks] = lambda _: CheckpointHooks(),
) -> Iterator[tuple[str, Trained]]:
    """Yield the name and result of each stage when it is finished; stop after an interrupted one.

    With `grow`, a stage's weights are all blocks so far as one adapter, and `replay` is the share of a
    stage's examples that come from earlier tasks. `hooks_of(job name)` returns a stage's checkpoint hooks.
    """
    grown: AdapterWeights | None = None
    for index, job in enumerate(jobs):
        if grow:
            config = job.config.model_copy(update={"seed": job.config.seed + index})
            examples = _with_replay(job, jobs[:index], replay)
            job = replace(job, frozen=grown, train=examples, config=config)
        hooks = hooks_of(job.name)
        (trained,) = train(
            model,
            [job],
            on_event=on_event,
            on_state=hooks.on_state,
            on_end=hooks.on_end,
            resume=hooks.resume,
        ).values()
        if grow:
            blocks = [trained.weights] if grown is None else [grown, trained.weights]
            grown = concatenate(blocks)
            trained = replace(trained, weights=grown)
        yield job.name, trained
        if trained.stopped == "interrupted":
            return


def _with_replay(job: Job, earlier: Sequence[Job], share: float) -> Sequence[Encoded]:
    """Return the job's examples and enough of the earlier jobs' examples to make up `share` of all.

    An earlier job that has too few examples gives all of them.
    """
    if not earlier or not share:
        return job.train
    num_per_job = round(len(job.train) * share / (1 - share) / len(earlier))
    generator = torch.Generator().manual_seed(job.config.seed)
    replayed = [
        other.train[i]
        for other in earlier
        for i in torch.randperm(len(other.train), generator=generator)[:num_per_job].tolist()
    ]
    return [*job.train, *replayed]


WHOLE_RUN = "run"
"""Stage name of a strategy that is one run of the training loop."""


@dataclass(frozen=True)
class FinishedAdapter:
    """A trained adapter, as a strategy yields it."""

    job: Job
    trained: Trained
    tasks: tuple[str, ...]
    """Names of the jobs whose tasks the adapter has learnt."""
    trained_with: tuple[str, ...] = ()
    """Names of the other adapters of the run."""
    note: str = ""

    @property
    def weights(self) -> AdapterWeights:
        """The adapter's weights."""
        return self.trained.weights


@dataclass(frozen=True)
class StrategyContext:
    """The arguments of every strategy."""

    model: AdapterModel
    jobs: Mapping[str, Job]
    options: RunOptions
    sweeps: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    on_event: Callable[[Event], None] = lambda _: None
    on_sweep: Callable[[Sequence[Candidate]], None] = lambda _: None
    hooks_of: Callable[[str], CheckpointHooks] = lambda _: CheckpointHooks()
    """Stage name -> its checkpoint hooks."""

    def run(self) -> Iterator[FinishedAdapter]:
        """Yield the adapters as they are finished, by the strategy that `options.how` names."""
        return STRATEGIES[self.options.how](self)

    def train(self, jobs: Sequence[Job]) -> dict[str, Trained]:
        """Train jobs in one run of the training loop."""
        hooks = self.hooks_of(WHOLE_RUN)
        with self.model.checkpointing(self.options.checkpointing):
            return train(
                self.model,
                jobs,
                on_event=self.on_event,
                on_state=hooks.on_state,
                on_end=hooks.on_end,
                resume=hooks.resume,
            )

    def others(self, name: str) -> tuple[str, ...]:
        """Return the names of the other adapters of the run."""
        return tuple(other for other in self.jobs if other != name)


def joint(context: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train all jobs, and all settings of their sweeps, in one run."""
    variants = {
        name: _variants(job, context.sweeps.get(name, {})) for name, job in context.jobs.items()
    }
    results = context.train([v.job for group in variants.values() for v in group])
    candidates: list[Candidate] = []
    for name, group in variants.items():
        best = min(group, key=lambda v: _sort_key(results[v.job.name]))
        for v in group if len(group) > 1 else ():
            trained = results[v.job.name]
            outcome = (trained.best_loss, trained.best_step, trained.stopped, v is best)
            candidates.append(Candidate(name, v.settings, *outcome))
        job = replace(best.job, name=name)
        note = f"best of {len(group)} settings on validation" if len(group) > 1 else ""
        yield FinishedAdapter(job, results[best.job.name], (name,), context.others(name), note)
    if candidates:
        context.on_sweep(candidates)


def shared(context: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train an adapter for each task and one more that acts on all rows; yield plain adapters.

    A task's finished adapter is the sum of the shared and the task's own one, ranks side by side, so that it
    works alone. The shared one is yielded as an adapter, too.
    """
    name = context.options.shared_name
    first = next(iter(context.jobs.values()))
    shared_job = Job(name, (), (), first.config)
    jobs = [replace(job, shared=name) for job in context.jobs.values()]
    results = context.train([*jobs, shared_job])
    shared_result = results[name]
    yield FinishedAdapter(shared_job, shared_result, tuple(context.jobs))
    for job in context.jobs.values():
        trained = results[job.name]
        weights = concatenate([shared_result.weights, trained.weights])
        trained = replace(trained, weights=weights)
        note = f"the shared adapter {name!r} and its own, ranks side by side"
        trained_with = (*context.others(job.name), name)
        yield FinishedAdapter(job, trained, (job.name,), trained_with, note)


def sequence(context: StrategyContext) -> Iterator[FinishedAdapter]:
    """Train the jobs one after another: a new adapter for each, or one that grows."""
    options, names = context.options, list(context.jobs)
    with context.model.checkpointing(options.checkpointing):
        stages = train_sequence(
            context.model,
            list(context.jobs.values()),
            grow=options.grow,
            replay=options.replay,
            on_event=context.on_event,
            hooks_of=context.hooks_of,
        )
        for name, trained in stages:
            job = context.jobs[name]
            if options.grow:
                tasks = tuple(names[: names.index(name) + 1])
                note = f"grown by a block of rank {job.config.rank} for each task"
                yield FinishedAdapter(
                    replace(job, name=options.grown_name), trained, tasks, (), note
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
    variants = []
    for values in product(*sweep.values()):
        settings = dict(zip(sweep, values, strict=True))
        title = ",".join(f"{key}={value}" for key, value in settings.items())
        changed = {**job.config.model_dump(), **settings}
        config = read_settings(TrainConfig, changed, f"sweep of {job.name!r}")
        variants.append(_Variant(replace(job, name=f"{job.name}@{title}", config=config), settings))
    return variants


def _sort_key(trained: Trained) -> tuple[bool, float]:
    """Order results: those that have learnt something first, then by validation loss."""
    finite = math.isfinite(trained.best_loss)
    return trained.best_step == 0, trained.best_loss if finite else math.inf
