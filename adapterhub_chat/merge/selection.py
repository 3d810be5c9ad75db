"""The choices that a merge can make by itself: its method, out of the table, and its weights, by search."""

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
from adapterhub_chat.merge.spec import LEARN, MergeSpec, merged_by
from adapterhub_chat.merge.weight_search import search_weights
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import as_mix

MIX = "mix"
"""The name under which the run-time mix stands among the methods that were tried."""
EXACT = ("cat", "linear")
"""Methods that `auto` leaves out: they keep every rank, so they are the run-time mix itself."""


def choose_method(
    registry: Registry,
    order: MergeSpec,
    sources: Sequence[Stored],
    own: Mapping[str, Sequence[Task]],
    moments: Moments,
    listeners: Listeners,
) -> tuple[MergeSpec, tuple[TriedMethod, ...]]:
    """Try the table at one rank, on the same validation items; return the best method's order, and all.

    The best has the highest mean retention among those that leave every task above the floor.
    """
    told = listeners.on_judged
    sticks = source_results(registry.model, own, "validation", order.options.limit, told)
    judged = {(stick.adapter, stick.task.name) for stick in sticks}
    if left := [t.name for n, tasks in own.items() for t in tasks if (n, t.name) not in judged]:
        raise UsageError(
            f"{', '.join(left)} has no validation items, so no method can be chosen by it; name a method, or "
            "tasks={...} that have some"
        )
    mean, lowest = mean_and_lowest(retentions(registry.model, sticks, order.mix, told))
    tried = [TriedMethod(method=MIX, mean=mean, lowest=lowest)]
    orders: dict[str, MergeSpec] = {}
    for method in METHODS.values():
        if method.name in EXACT or not _able(order, method):
            continue
        one = _by(order, method)
        even = replace(one, weights=None) if order.weights == LEARN else one
        with registry.model.temporarily_loaded(
            merged_by(even, sources, moments).weights, order.name
        ) as trial:
            found = retentions(registry.model, sticks, as_mix(trial), told)
        mean, lowest = mean_and_lowest(found)
        tried.append(TriedMethod(method=method.name, mean=mean, lowest=lowest))
        orders[method.name] = one
    fine = [one for one in tried[1:] if one.lowest >= order.options.floor]
    if not fine:
        raise AdapterError(_below(order, tried))
    return orders[max(fine, key=lambda one: one.mean).method], tuple(tried)


def keeps_floor(
    registry: Registry,
    order: MergeSpec,
    sources: Sequence[Stored],
    own: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> bool:
    """Return whether a merge leaves every task above the floor, on the validation items."""
    sticks = source_results(
        registry.model, own, "validation", order.options.limit, listeners.on_judged
    )
    with registry.model.temporarily_loaded(merged_by(order, sources).weights, order.name) as trial:
        found = retentions(registry.model, sticks, as_mix(trial), listeners.on_judged)
    return mean_and_lowest(found)[1] >= order.options.floor


def _able(order: MergeSpec, method: Method) -> bool:
    """Whether a method can do with the weights: one that looks has nothing to learn or to take away."""
    return not method.needs_moments or not (order.weights == LEARN or min(order.given or (0,)) < 0)


def _by(order: MergeSpec, method: Method) -> MergeSpec:
    """Return the order by another method, without a density where that takes none."""
    density = None if method.density is None else order.options.density
    options = order.options.model_copy(update={"density": density})
    return replace(order, method=method.name, options=options)


def _below(order: MergeSpec, tried: Sequence[TriedMethod]) -> str:
    best = max(tried[1:], key=lambda one: one.lowest)
    return (
        f"no method keeps {order.options.floor:.0%} of every source's score: {best.method} comes nearest "
        f"with {best.lowest:.0%} at worst ({best.mean:.0%} on average), the run-time mix keeps "
        f"{tried[0].lowest:.0%} at worst. Nothing is saved. Use the mix, or each row's own adapter in one "
        "batch; or allow a higher rank or a lower floor"
    )


def learn_weights(
    registry: Registry,
    order: MergeSpec,
    sources: Sequence[Stored],
    own: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> tuple[float, ...]:
    """Return the weights under which the merged adapter's validation loss is lowest, mean over tasks.

    Every set that is tried is an event, with its loss above the sources' own.
    """
    items = validation_items(registry.model, own, order.options.limit)
    if not items:
        raise UsageError("the sources' tasks have no validation items to learn weights on")

    budget, tries = order.options.budget, count(1)

    def objective(weights: Sequence[float]) -> float:
        loss = float("inf")
        if any(weights):
            merged = merged_by(replace(order, weights=tuple(weights)), sources)
            with registry.model.temporarily_loaded(merged.weights, order.name) as trial:
                loss = excess_loss(registry.model, items, as_mix(trial))
        listeners.on_event(Event(order.name, "step", next(tries), budget, {"loss": loss}))
        return loss

    found = search_weights(objective, len(sources), budget, order.options.seed)
    return tuple(round(weight, 4) for weight in found)
