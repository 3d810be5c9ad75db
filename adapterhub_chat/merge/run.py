"""Merging: adapters of the pool become one new adapter, checked, kept, and measured against its sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from adapterhub_chat.artifact.manifest import (
    Manifest,
    MergeReport,
    Training,
    TriedMethod,
    transfer_problem,
)
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.data.metrics import METRICS
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, UsageError, warn
from adapterhub_chat.evaluation.retention import drift, mean_and_lowest, retention, source_results
from adapterhub_chat.evaluation.scoring import judge, score
from adapterhub_chat.events import Listeners
from adapterhub_chat.files import file_sha256
from adapterhub_chat.merge.combine import Merged, distance, merge, modules_of
from adapterhub_chat.merge.methods import METHODS
from adapterhub_chat.merge.moments import InputMoments
from adapterhub_chat.merge.selection import MIX, choose_method, keeps_floor, learn_weights
from adapterhub_chat.merge.spec import AUTO, LEARN, MergeSpec, merged_by, read_source, tasks_of
from adapterhub_chat.pool.probe import make_probe, probe_problem, probe_prompts
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import Mix, Retention, Score, as_mix

GAP = 0.01
"""The run-time mix must keep so much more than the merge before it is worth a word."""
IDENTITY = 1e-3
"""How far one source alone may come out from itself, as a share of its update's norm."""


def merge_adapters(
    registry: Registry,
    order: MergeSpec,
    tasks: Mapping[str, str | Path | Task],
    listeners: Listeners,
) -> Manifest:
    """Merge, check, keep and measure; see AdapterHub.merge."""
    sources = [read_source(registry, name) for name in order.names]
    hurtful = [found for source in sources if (found := transfer_problem(source.manifest))]
    if hurtful and not order.options.force:
        raise AdapterError(f"{'; '.join(hurtful)}. force=True (--force) merges it all the same")
    own = tasks_of(sources, tasks, needed=order.needs_tasks)
    moments = InputMoments(registry.model, own, modules_of([source.weights for source in sources]))
    tried: tuple[TriedMethod, ...] = ()
    chosen = order.method == AUTO
    if chosen:
        order, tried = choose_method(registry, order, sources, own, moments, listeners)
    if order.weights == LEARN:
        learnt = replace(order, weights=learn_weights(registry, order, sources, own, listeners))
        keeps = not chosen or keeps_floor(registry, learnt, sources, own, listeners)
        order = (
            learnt if keeps else replace(order, weights=None)
        )  # chosen by these, above the floor
    merged = merged_by(order, sources, moments)
    _check_identity(registry, order, sources, moments)
    draft = _draft(registry, order, sources, merged, tried)
    with registry.model.temporarily_loaded(merged.weights, order.name) as trial:
        draft = _measured(registry, order, draft, trial, own, listeners)
    done = registry.save_new(merged.weights, draft)
    _check_saved(registry, done.name, merged)
    if done.merge and done.merge.verdict:
        warn(f"{done.name}: {done.merge.verdict}")
    return done


def _draft(
    registry: Registry,
    order: MergeSpec,
    sources: Sequence[Stored],
    merged: Merged,
    tried: tuple[TriedMethod, ...],
) -> Manifest:
    """Return the manifest of a merged adapter: not measured yet; it is prompted as its heaviest source."""
    said = [source.manifest for source in sources if source.manifest]
    weights = dict(zip(order.names, order.numbers, strict=True))
    if not said:
        raise AdapterError(
            f"none of {', '.join(order.names)} has a manifest, so nobody knows how the merged adapter is to "
            "be prompted; adapterhub-chat adopt gives them one"
        )
    own = zip(order.numbers, order.names, sources, strict=True)
    # by the names here: a manifest may call a pulled adapter otherwise
    _, spoken, heaviest = max(
        ((abs(w), name, s.manifest) for w, name, s in own if s.manifest), key=lambda one: one[0]
    )
    backbone = registry.model.backbone
    named = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
    training = Training(
        how="merge",
        tasks=_once(task for m in said for task in m.training.tasks),
        data_sha256=_once(data for m in said for data in m.training.data_sha256),
        sources=_once(source for m in said for source in m.training.sources),
        parents=tuple(file_sha256(source.path / WEIGHTS) for source in sources),
        note=f"merged by {order.method} from {named}; prompted as {spoken}",
    )
    return Manifest(
        name=order.name,
        about="; ".join(_once(m.about for m in said if m.about)),
        language=", ".join(_once(m.language for m in said if m.language)),
        licence=", ".join(_once(m.licence for m in said if m.licence)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        contract=heaviest.contract,
        metric=heaviest.metric,
        training=training,
        merge=MergeReport(
            method=order.method,
            weights=weights,
            rank=merged.weights.max_rank,
            density=order.options.density or METHODS[order.method].density,
            seed=order.options.seed,
            energy=round(merged.report.energy, 6),
            tried=tried,
        ),
    )


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _check_identity(
    registry: Registry, order: MergeSpec, sources: Sequence[Stored], moments: InputMoments
) -> None:
    """Raise AdapterError unless each source, merged alone with weight 1, is and answers as it does itself."""
    density = None if METHODS[order.method].density is None else 1.0
    for n, source in enumerate(sources):
        alone = merge(
            [source.weights],
            [1.0],
            method=order.method,
            density=density,
            moments=partial(moments.of, n),
        )
        if (off := distance(alone.weights, source.weights)) > IDENTITY:
            raise AdapterError(
                f"{order.method} is not trusted here: {source.name!r} alone, with weight 1, does not come "
                f"out as itself: its update is off by {off:.1%}"
            )
        probe = make_probe(registry.model, source.name)
        with registry.model.temporarily_loaded(alone.weights, source.name) as trial:
            if problem := probe_problem(registry.model, trial, probe, "exact"):
                raise AdapterError(
                    f"{order.method} is not trusted here: {source.name!r} alone, with weight 1, "
                    f"does not come out as itself: {problem}"
                )


def _check_saved(registry: Registry, name: str, merged: Merged) -> None:
    """Raise AdapterError, and take it back, unless what is read back is what was merged, to the bit."""
    stored = registry.pool.load(name)
    same = stored.weights.factors.keys() == merged.weights.factors.keys() and all(
        torch.equal(mine, its)
        for module, own in merged.weights.factors.items()
        for mine, its in zip(own, stored.weights.factors[module], strict=True)
    )
    if not same:
        _take_back(registry, name)
        raise AdapterError(f"adapter {name!r} was not saved as it was merged; check the disk")


def _take_back(registry: Registry, name: str) -> None:
    """Have the pool as it was before a save."""
    try:
        registry.rollback(name)
    except UsageError:  # there was no version before it
        registry.unload(name)
        registry.pool.delete(name)


def _measured(
    registry: Registry,
    order: MergeSpec,
    draft: Manifest,
    trial: str,
    own: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> Manifest:
    """Return a manifest with what an adapter on trial keeps of its sources, on test items, and its scores."""
    model = registry.model
    found: list[Retention] = []
    mixed: list[Retention] = []
    scores: dict[str, Score] = {}
    for stick in source_results(model, own, "test", order.options.limit, listeners.on_judged):
        task, items = stick.task, stick.examples
        told = partial(listeners.on_judged, task.name)
        judged, at_run_time, backbone = (
            judge(model, task, items, mix, told, details=False)
            for mix in (as_mix(trial), order.mix, Mix())
        )
        if not math.isfinite(METRICS[task.metric].aggregate(judged.rows)):
            raise AdapterError(
                f"the merged adapter makes numbers that are not finite on {task.name}, so nothing is saved; "
                "give smaller weights"
            )
        found.append(retention(stick, judged.rows))
        mixed.append(retention(stick, at_run_time.rows))
        one = score(order.name, task, judged, backbone)
        scores[task.name] = replace(one, precision=model.backbone.precision)
    _tell_unmeasured(own, found)
    assert draft.merge is not None
    report = draft.merge.model_copy(
        update={
            "retention": tuple(found),
            "mix": tuple(mixed),
            "drift": {name: _drift(registry, name, trial) for name in order.names},
            "verdict": _verdict(order, draft.merge, found, mixed),
        }
    )
    done = draft.model_copy(update={"merge": report})
    return done.with_scores(list(scores.values())) if scores else done


def _tell_unmeasured(own: Mapping[str, Sequence[Task]], found: Sequence[Retention]) -> None:
    """Warn of tasks without test items."""
    measured = {(one.adapter, one.task) for one in found}
    left = [t.name for name, tasks in own.items() for t in tasks if (name, t.name) not in measured]
    if left:
        text = f"{', '.join(left)} has no test items: what the merge keeps of it is not measured"
        warn(text)


def _drift(registry: Registry, source: str, merged: str) -> float:
    """Return how far a source's next tokens have moved: the probe prompt, bare and in its contract."""
    contract = registry.contract(as_mix(source))
    prompts = probe_prompts(registry.model.backbone.tokenizer, contract)
    return round(drift(registry.model, prompts, as_mix(source), as_mix(merged)), 6)


def _verdict(
    order: MergeSpec, report: MergeReport, found: Sequence[Retention], mixed: Sequence[Retention]
) -> str:
    """Return what speaks against the merge, or an empty string."""
    said = []
    low = [one for one in found if one.value < order.options.floor]
    if low:
        named = ", ".join(f"{one.task} {one.value:.0%}" for one in low)
        said.append(
            f"it keeps less than {order.options.floor:.0%} of its sources' scores on {named}"
        )
    if found and (mix := mean_and_lowest(mixed)[0]) > (merged := mean_and_lowest(found)[0]) + GAP:
        every = report.tried and max(report.tried, key=lambda one: one.mean).method == MIX
        what = "every merge that was tried" if every else "this merge"
        said.append(
            f"the run-time mix {order.mix} keeps more than {what} ({mix:.0%} on average, not {merged:.0%})"
        )
    return "; ".join(said)
