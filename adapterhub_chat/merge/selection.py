"""Automatic choices of a merge: the method by its retention, and the weights by search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

from adapterhub_chat.artifact.manifest import TriedMethod
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, UsageError
from adapterhub_chat.evaluation.retention import (
    excess_loss,
    mean_and_lowest,
    retentions,
    source_results,
    validation_items,
)
from adapterhub_chat.events import Event, Listeners
from adapterhub_chat.merge.methods import METHODS, Method, Moments
from adapterhub_chat.merge.spec import LEARN, MergeSpec, merge_sources
from adapterhub_chat.merge.weight_search import search_weights
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import as_mix

MIX = "mix"
"""The name of the run-time mix among the methods that were tried."""
EXACT_METHODS = ("cat", "linear")
"""Methods that `auto` leaves out: they keep every rank, so they equal the run-time mix."""


def choose_method(
    registry: Registry,
    spec: MergeSpec,
    sources: Sequence[Stored],
    tasks: Mapping[str, Sequence[Task]],
    moments: Moments,
    listeners: Listeners,
) -> tuple[MergeSpec, tuple[TriedMethod, ...]]:
    """Try all methods at one rank, on the same validation items; return the best one's spec, and all results.

    The best has the highest mean retention among those that leave every task above the floor.
    """
    on_progress = listeners.on_judged
    singles = source_results(registry.model, tasks, "validation", spec.options.limit, on_progress)
    measured = {(single.adapter, single.task.name) for single in singles}
    missing = [
        task.name
        for name, source_tasks in tasks.items()
        for task in source_tasks
        if (name, task.name) not in measured
    ]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} has no validation items, so no method can be chosen by it; name a method, "
            "or tasks={...} that have some"
        )
    mean, lowest = mean_and_lowest(retentions(registry.model, singles, spec.mix, on_progress))
    tried = [TriedMethod(method=MIX, mean=mean, lowest=lowest)]
    specs: dict[str, MergeSpec] = {}
    for method in METHODS.values():
        if method.name in EXACT_METHODS or not _supports_weights(spec, method):
            continue
        candidate = _with_method(spec, method)
        trial_spec = replace(candidate, weights=None) if spec.weights == LEARN else candidate
        merged = merge_sources(trial_spec, sources, moments)
        with registry.model.temporarily_loaded(merged.weights, spec.name) as trial:
            results = retentions(registry.model, singles, as_mix(trial), on_progress)
        mean, lowest = mean_and_lowest(results)
        tried.append(TriedMethod(method=method.name, mean=mean, lowest=lowest))
        specs[method.name] = candidate
    above_floor = [result for result in tried[1:] if result.lowest >= spec.options.floor]
    if not above_floor:
        raise AdapterError(_floor_message(spec, tried))
    best = max(above_floor, key=lambda result: result.mean)
    return specs[best.method], tuple(tried)


def keeps_floor(
    registry: Registry,
    spec: MergeSpec,
    sources: Sequence[Stored],
    tasks: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> bool:
    """Return whether a merge leaves every task above the floor, on the validation items."""
    on_progress = listeners.on_judged
    singles = source_results(registry.model, tasks, "validation", spec.options.limit, on_progress)
    merged = merge_sources(spec, sources)
    with registry.model.temporarily_loaded(merged.weights, spec.name) as trial:
        results = retentions(registry.model, singles, as_mix(trial), on_progress)
    return mean_and_lowest(results)[1] >= spec.options.floor


def _supports_weights(spec: MergeSpec, method: Method) -> bool:
    """Return whether a method takes the spec's weights: with moments, none are learnt or negative."""
    weights = spec.explicit_weights or (0,)
    return not method.needs_moments or not (spec.weights == LEARN or min(weights) < 0)


def _with_method(spec: MergeSpec, method: Method) -> MergeSpec:
    """Return the spec with another method, without a density if that has none."""
    density = None if method.density is None else spec.options.density
    options = spec.options.model_copy(update={"density": density})
    return replace(spec, method=method.name, options=options)


def _floor_message(spec: MergeSpec, tried: Sequence[TriedMethod]) -> str:
    best = max(tried[1:], key=lambda result: result.lowest)
    return (
        f"no method keeps {spec.options.floor:.0%} of every source's score: {best.method} comes nearest "
        f"with {best.lowest:.0%} at worst ({best.mean:.0%} on average), the run-time mix keeps "
        f"{tried[0].lowest:.0%} at worst. Nothing is saved. Use the mix, or each row's own adapter in one "
        "batch; or allow a higher rank or a lower floor"
    )


def learn_weights(
    registry: Registry,
    spec: MergeSpec,
    sources: Sequence[Stored],
    tasks: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> tuple[float, ...]:
    """Return the weights under which the merged adapter's validation loss is lowest, mean over tasks.

    Every evaluation is an event, with its loss above that of the sources.
    """
    items = validation_items(registry.model, tasks, spec.options.limit)
    if not items:
        raise UsageError("the sources' tasks have no validation items to learn weights on")

    budget, steps = spec.options.budget, count(1)

    def objective(weights: Sequence[float]) -> float:
        loss = float("inf")
        if any(weights):
            merged = merge_sources(replace(spec, weights=tuple(weights)), sources)
            with registry.model.temporarily_loaded(merged.weights, spec.name) as trial:
                loss = excess_loss(registry.model, items, as_mix(trial))
        listeners.on_event(Event(spec.name, "step", next(steps), budget, {"loss": loss}))
        return loss

    weights = search_weights(objective, len(sources), budget, spec.options.seed)
    return tuple(round(weight, 4) for weight in weights)
