"""Workshop: a training run from tasks to measured adapters in the pool."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from adapterhub_chat.config import TrainConfig, read_settings
from adapterhub_chat.errors import AdapterError, DataError, UsageError
from adapterhub_chat.evaluate import evaluate
from adapterhub_chat.jobs import make_job, sample
from adapterhub_chat.manifest import Manifest, manifest_of
from adapterhub_chat.pool import check_name
from adapterhub_chat.runlog import RunLog
from adapterhub_chat.sequence import train_sequence
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task
from adapterhub_chat.train import Event, train
from adapterhub_chat.types import Mix, Score, as_mix
from adapterhub_chat.weights import AdapterWeights

How = Literal["joint", "sequence"]


@dataclass(frozen=True)
class Listeners:
    """Who hears of progress."""

    on_event: Callable[[Event], None] = lambda _: None
    on_judged: Callable[[str, int], None] = lambda _what, _n: None


SILENT = Listeners()


def make_adapters(
    shelf: Shelf,
    tasks: Mapping[str, Task],
    configs: Mapping[str, TrainConfig],
    how: How,
    *,
    test_examples: int,
    save_dtype: torch.dtype = torch.float32,
    run_dir: Path | None = None,
    listeners: Listeners = SILENT,
) -> dict[str, Manifest]:
    """Train an adapter for each named task, save it, measure it; return the manifests of what was saved.

    Everything that can be wrong is looked at before the first step: names, data, the pool's folder.
    Ctrl-C in training saves what was best until then, unmeasured, with a warning. What has learnt
    nothing is not saved; when that is all there is, KeyboardInterrupt goes on its way.
    """
    if how not in get_args(How):
        raise UsageError(f"how={how!r}: allowed are {', '.join(get_args(How))}")
    for name in tasks:
        check_name(name)
    shelf.pool.check_writable()
    backbone = shelf.model.backbone
    jobs = {n: make_job(backbone.tokenizer, n, task, configs[n]) for n, task in tasks.items()}
    manifests: dict[str, Manifest] = {}
    interrupted = False
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(run_dir)) if run_dir is not None else None

        def tell(event: Event) -> None:
            listeners.on_event(event)
            if log is not None:
                log(event)

        each: Any = (
            train(shelf.model, list(jobs.values()), on_event=tell).items()
            if how == "joint"
            else train_sequence(shelf.model, list(jobs.values()), on_event=tell)
        )
        for name, trained in each:
            interrupted |= trained.stopped == "interrupted"
            if not trained.best_step:
                _warn(f"adapter {name!r} is not saved: {trained.stopped} before it learnt anything")
                continue
            beside = [other for other in tasks if other != name] if how == "joint" else []
            draft = manifest_of(tasks[name], backbone, jobs[name], trained, how=how, beside=beside)
            manifests |= _kept(shelf, trained.weights.to(save_dtype), draft)
    if interrupted and not manifests:
        raise KeyboardInterrupt
    if interrupted:
        _warn(f"interrupted: the best so far of {', '.join(manifests)} is saved, not measured")
    elif test_examples:
        return _measured(shelf, tasks, manifests, test_examples, listeners)
    return manifests


def _kept(shelf: Shelf, weights: AdapterWeights, draft: Manifest) -> dict[str, Manifest]:
    """Save one adapter; where that fails, warn, so that the others of the run are not lost."""
    try:
        return {draft.name: shelf.keep(weights, draft)}
    except AdapterError as error:
        _warn(f"adapter {draft.name!r} is not saved: {error}")
        return {}


def _measured(
    shelf: Shelf,
    tasks: Mapping[str, Task],
    manifests: Mapping[str, Manifest],
    limit: int,
    listeners: Listeners,
) -> dict[str, Manifest]:
    """Score loaded pool members on their tasks' test splits; write the scores into their manifests."""
    measured = {}
    try:
        for name, manifest in manifests.items():
            scores = judge_task(shelf, tasks[name], [(name, as_mix(name))], limit, listeners)
            measured[name] = manifest.with_scores(scores)
            shelf.describe(name, measured[name])
    except KeyboardInterrupt:
        _warn(f"interrupted: {', '.join(manifests)} are saved, but not all are measured")
        raise
    return measured


def judge_task(
    shelf: Shelf,
    task: Task,
    adapters: Sequence[tuple[str, Mix]],
    limit: int,
    listeners: Listeners = SILENT,
) -> list[Score]:
    """Score adapters on (at most `limit` of) a task's test split; raise DataError when it is empty."""
    examples = sample(task.split("test"), limit)
    if not examples:
        raise DataError(f"task {task.name!r} has no test examples")
    return evaluate(shelf.model, adapters, [(task, examples)], on_progress=listeners.on_judged)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def configs_of(
    names: Sequence[str], shared: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainConfig]:
    """Return each adapter's settings: the shared ones under its own."""
    if unknown := [name for name in own if name not in names]:
        trained = ", ".join(names)
        raise UsageError(f"settings for {', '.join(unknown)}, but this run trains {trained}")
    return {
        name: read_settings(TrainConfig, {**shared, **own.get(name, {})}, f"settings of {name!r}")
        for name in names
    }
