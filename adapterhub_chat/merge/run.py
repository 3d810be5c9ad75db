"""Merging: adapters of the pool become one new adapter, which is checked, measured and saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from adapterhub_chat.merge.combine import Merged, merge, modules_of, relative_distance
from adapterhub_chat.merge.methods import METHODS
from adapterhub_chat.merge.moments import InputMoments
from adapterhub_chat.merge.selection import MIX, choose_method, keeps_floor, learn_weights
from adapterhub_chat.merge.spec import (
    AUTO,
    LEARN,
    MergeSpec,
    merge_sources,
    read_source,
    tasks_by_source,
)
from adapterhub_chat.pool.probe import make_probe, probe_problem, probe_prompts
from adapterhub_chat.pool.provenance import draft_of
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import Mix, Retention, Score, as_mix

MIN_MIX_ADVANTAGE = 0.01
"""Mean retention by which the run-time mix must be better than the merge for the verdict to say so."""
IDENTITY_TOLERANCE = 1e-3
"""Largest relative distance of a source merged alone from itself."""


def merge_adapters(
    registry: Registry,
    spec: MergeSpec,
    tasks: Mapping[str, str | Path | Task],
    listeners: Listeners,
) -> Manifest:
    """Merge, check, measure and save; see AdapterHub.merge."""
    sources = [read_source(registry, name) for name in spec.names]
    hurtful = [reason for source in sources if (reason := transfer_problem(source.manifest))]
    if hurtful and not spec.options.force:
        raise AdapterError(f"{'; '.join(hurtful)}. force=True (--force) merges it all the same")
    source_tasks = tasks_by_source(sources, tasks, required=spec.needs_tasks)
    modules = modules_of([source.weights for source in sources])
    moments = InputMoments(registry.model, source_tasks, modules)
    tried: tuple[TriedMethod, ...] = ()
    automatic = spec.method == AUTO
    if automatic:
        spec, tried = choose_method(registry, spec, sources, source_tasks, moments, listeners)
    if spec.weights == LEARN:
        weights = learn_weights(registry, spec, sources, source_tasks, listeners)
        learnt = replace(spec, weights=weights)
        # `auto` chose the method with the default weights, above the floor
        keeps = not automatic or keeps_floor(registry, learnt, sources, source_tasks, listeners)
        spec = learnt if keeps else replace(spec, weights=None)
    merged = merge_sources(spec, sources, moments)
    _check_identity(registry, spec, sources, moments)
    draft = _draft(registry, spec, sources, merged, tried)
    with registry.model.temporarily_loaded(merged.weights, spec.name) as trial:
        draft = _measure(registry, spec, draft, trial, source_tasks, listeners)
    saved = registry.save_new(merged.weights, draft)
    _check_saved(registry, saved.name, merged)
    if saved.merge and saved.merge.verdict:
        warn(f"{saved.name}: {saved.merge.verdict}")
    return saved


def _draft(
    registry: Registry,
    spec: MergeSpec,
    sources: Sequence[Stored],
    merged: Merged,
    tried: tuple[TriedMethod, ...],
) -> Manifest:
    """Return the manifest of a merged adapter, not measured yet; it has its heaviest source's contract."""
    weights = dict(zip(spec.names, spec.source_weights, strict=True))
    # by the pool's names: the manifest of a pulled adapter may have another one
    manifests = {
        name: source.manifest
        for name, source in zip(spec.names, sources, strict=True)
        if source.manifest
    }
    if not manifests:
        raise AdapterError(
            f"none of {', '.join(spec.names)} has a manifest, so nobody knows how the merged adapter is to "
            "be prompted; adapterhub-chat adopt gives them one"
        )
    heaviest = max(manifests, key=lambda name: abs(weights[name]))
    trainings = [manifest.training for manifest in manifests.values()]
    recipe = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
    training = Training(
        how="merge",
        tasks=_unique(task for t in trainings for task in t.tasks),
        data_sha256=_unique(sha256 for t in trainings for sha256 in t.data_sha256),
        sources=_unique(source for t in trainings for source in t.sources),
        parents=tuple(file_sha256(source.path / WEIGHTS) for source in sources),
        note=f"merged by {spec.method} from {recipe}; prompted as {heaviest}",
    )
    report = MergeReport(
        method=spec.method,
        weights=weights,
        rank=merged.weights.max_rank,
        density=spec.options.density or METHODS[spec.method].density,
        seed=spec.options.seed,
        energy=round(merged.report.energy, 6),
        tried=tried,
    )
    origins = list(manifests.values())
    draft = draft_of(
        spec.name, registry.model.backbone, origins, training, prompted_as=manifests[heaviest]
    )
    return draft.model_copy(update={"merge": report})


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _check_identity(
    registry: Registry, spec: MergeSpec, sources: Sequence[Stored], moments: InputMoments
) -> None:
    """Raise AdapterError unless each source, merged alone with weight 1, equals itself and answers alike."""
    density = None if METHODS[spec.method].density is None else 1.0
    for index, source in enumerate(sources):
        alone = merge(
            [source.weights],
            [1.0],
            method=spec.method,
            density=density,
            moments=partial(moments.for_source, index),
        )
        if (error := relative_distance(alone.weights, source.weights)) > IDENTITY_TOLERANCE:
            raise AdapterError(
                f"{spec.method} is not trusted here: {source.name!r} alone, with weight 1, does not come "
                f"out as itself: its update is off by {error:.1%}"
            )
        probe = make_probe(registry.model, source.name)
        with registry.model.temporarily_loaded(alone.weights, source.name) as trial:
            if problem := probe_problem(registry.model, trial, probe, "exact"):
                raise AdapterError(
                    f"{spec.method} is not trusted here: {source.name!r} alone, with weight 1, "
                    f"does not come out as itself: {problem}"
                )


def _check_saved(registry: Registry, name: str, merged: Merged) -> None:
    """Undo the save and raise AdapterError unless the saved weights equal the merged ones bit for bit."""
    saved, expected = registry.pool.load(name).weights.factors, merged.weights.factors
    equal = saved.keys() == expected.keys() and all(
        all(map(torch.equal, saved[module], factors)) for module, factors in expected.items()
    )
    if not equal:
        _undo_save(registry, name)
        raise AdapterError(f"adapter {name!r} was not saved as it was merged; check the disk")


def _undo_save(registry: Registry, name: str) -> None:
    """Restore the pool's version from before the last save, or delete the adapter if there was none."""
    try:
        registry.rollback(name)
    except UsageError:  # there was no version before it
        registry.unload(name)
        registry.pool.delete(name)


def _measure(
    registry: Registry,
    spec: MergeSpec,
    draft: Manifest,
    trial: str,
    tasks: Mapping[str, Sequence[Task]],
    listeners: Listeners,
) -> Manifest:
    """Return the manifest with retention, drift, verdict and scores of the merged adapter, on test items."""
    model = registry.model
    of_merged: list[Retention] = []
    of_mix: list[Retention] = []
    scores: dict[str, Score] = {}
    for single in source_results(model, tasks, "test", spec.options.limit, listeners.on_judged):
        task = single.task
        on_progress = partial(listeners.on_judged, task.name)
        merged, mixed, backbone = (
            judge(model, task, single.examples, mix, on_progress, details=False)
            for mix in (as_mix(trial), spec.mix, Mix())
        )
        if not math.isfinite(METRICS[task.metric].aggregate(merged.rows)):
            raise AdapterError(
                f"the merged adapter makes numbers that are not finite on {task.name}, so nothing is saved; "
                "give smaller weights"
            )
        of_merged.append(retention(single, merged.rows))
        of_mix.append(retention(single, mixed.rows))
        result = score(spec.name, task, merged, backbone)
        scores[task.name] = replace(result, precision=model.backbone.precision)
    _warn_unmeasured(tasks, of_merged)
    assert draft.merge is not None
    report = draft.merge.model_copy(
        update={
            "retention": tuple(of_merged),
            "mix": tuple(of_mix),
            "drift": {name: _drift(registry, name, trial) for name in spec.names},
            "verdict": _verdict(spec, draft.merge, of_merged, of_mix),
        }
    )
    measured = draft.model_copy(update={"merge": report})
    return measured.with_scores(list(scores.values())) if scores else measured


def _warn_unmeasured(tasks: Mapping[str, Sequence[Task]], measured: Sequence[Retention]) -> None:
    """Warn of tasks without test items."""
    known = {(result.adapter, result.task) for result in measured}
    missing = [
        task.name
        for name, source_tasks in tasks.items()
        for task in source_tasks
        if (name, task.name) not in known
    ]
    if missing:
        warn(f"{', '.join(missing)} has no test items: what the merge keeps of it is not measured")


def _drift(registry: Registry, source: str, merged: str) -> float:
    """Return the KL drift of a source's next tokens on the probe prompts: bare and in its contract."""
    contract = registry.contract(as_mix(source))
    prompts = probe_prompts(registry.model.backbone.tokenizer, contract)
    return round(drift(registry.model, prompts, as_mix(source), as_mix(merged)), 6)


def _verdict(
    spec: MergeSpec,
    report: MergeReport,
    of_merged: Sequence[Retention],
    of_mix: Sequence[Retention],
) -> str:
    """Return the objections to the merge, an empty string if there are none."""
    objections = []
    below_floor = [result for result in of_merged if result.value < spec.options.floor]
    if below_floor:
        losses = ", ".join(f"{result.task} {result.value:.0%}" for result in below_floor)
        objections.append(
            f"it keeps less than {spec.options.floor:.0%} of its sources' scores on {losses}"
        )
    if of_merged:
        mix, merged = mean_and_lowest(of_mix)[0], mean_and_lowest(of_merged)[0]
        if mix > merged + MIN_MIX_ADVANTAGE:
            best = max(report.tried, key=lambda result: result.mean).method if report.tried else ""
            what = "every merge that was tried" if best == MIX else "this merge"
            objections.append(
                f"the run-time mix {spec.mix} keeps more than {what} ({mix:.0%} on average, not {merged:.0%})"
            )
    return "; ".join(objections)
