"""A transfer as it is asked for: from names to an adapter in the pool with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapterhub_chat.artifact.manifest import (
    Manifest,
    StackBase,
    Training,
    TransferReport,
    transfer_problem,
)
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.errors import AdapterError, UsageError
from adapterhub_chat.evaluation.scoring import judge_task
from adapterhub_chat.events import Listeners
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.provenance import draft_of
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stacks import flattened
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.route.learn import learn_routing
from adapterhub_chat.transfer.candidates import Outcome, check_method, transfer
from adapterhub_chat.transfer.methods import STACKS
from adapterhub_chat.transfer.setting import make_problem, warn_of_language
from adapterhub_chat.transfer.spec import TransferSpec, _target
from adapterhub_chat.types import as_mix

BY_SOURCE = ("maxent", "adversarial")
"""Methods that learn from the source's examples, too."""


@dataclass(frozen=True)
class Transferred:
    """What came of it."""

    manifest: Manifest | None
    """Of the new adapter; None when nothing is better than the bare backbone."""
    outcome: Outcome
    by_shots: Mapping[int, Outcome] = field(default_factory=dict)
    """What each number of shots that was asked for comes to, in ascending order."""


def make_transfer(registry: Registry, order: TransferSpec, listeners: Listeners) -> Transferred:
    """Train, judge, choose, keep and measure; see AdapterHub.transfer."""
    stored = registry.read(order.source)
    task = order.source_task or _task_of(stored)
    target, texts = _target(order, task)
    name = check_name(order.name or f"{target.name}-from-{stored.name}")
    if (
        (found := transfer_problem(stored.manifest))
        and order.method in (*STACKS, "auto")
        and not order.force
    ):
        raise AdapterError(
            f"{found}; nothing is stacked on it. force=True (--force) does it all the same"
        )
    beneath = [one.name for one in stored.manifest.stack] if stored.manifest else []
    if name in (order.source, *beneath):
        raise UsageError(
            f"{name!r} is what the new adapter learns from; choose another name for it"
        )
    _check_layers(registry, order)
    registry.pool.check_writable()
    labels = [*stored.manifest.contract.labels] if stored.manifest else None
    source = flattened(registry.pool, stored)
    settings = {
        shots: replace(
            make_problem(
                source, task, target, shots, order.config, unlabelled=texts, labels=labels
            ),
            level=order.level,
            stack_layers=order.stack_layers,
            layer=order.layer,
        )
        for shots in sorted({order.shots, *order.also})
    }
    for setting in settings.values():
        check_method(setting, order.method)
    warn_of_language(registry.model.backbone.tokenizer, settings[order.shots])
    outcomes = {
        shots: transfer(registry.model, setting, order.method, on_event=listeners.on_event)
        for shots, setting in settings.items()
    }
    outcome = outcomes[order.shots]
    chosen = outcome.candidates[outcome.chosen]
    if chosen.weights is None:
        return Transferred(None, outcome, outcomes)
    taught = [target, *([task] if outcome.chosen in BY_SOURCE else [])]
    draft = _manifest(registry, order, name, taught, stored, outcome)
    under = _under(registry, order, stored) if chosen.own is not None else ()
    weights = chosen.own if chosen.own is not None and under else chosen.weights
    manifest = registry.save_new(weights, draft.model_copy(update={"stack": under}))
    if target.split("test"):
        scores = judge_task(registry.model, target, [(name, as_mix(name))], 0, listeners)
        registry.describe(name, manifest := manifest.with_scores(scores))
    return Transferred(manifest, outcome, outcomes)


def flatten(registry: Registry, name: str, flat_name: str | None) -> Manifest:
    """Keep a stack as one plain adapter; see AdapterHub.flatten."""
    stored = registry.read(name)
    manifest = stored.manifest
    if manifest is None or not manifest.stack:
        raise UsageError(f"adapter {name!r} is no stack: it is one plain adapter already")
    named = check_name(flat_name or f"{manifest.name}-flat")
    parents = (*(under.sha256 for under in manifest.stack), manifest.sha256)
    training = manifest.training.model_copy(
        update={"parents": parents, "note": f"the stack {manifest.name} as one adapter"}
    )
    scores = tuple(replace(score, adapter=named) for score in manifest.scores)
    changes = {"name": named, "stack": (), "training": training, "scores": scores, "published": ""}
    return registry.save_new(flattened(registry.pool, stored), manifest.model_copy(update=changes))


def _under(registry: Registry, order: TransferSpec, stored: Stored) -> tuple[StackBase, ...]:
    """Return what a stack stands on, empty where the source is no pool member: it is flattened then."""
    if order.source not in registry.pool or stored.manifest is None:
        return ()
    return (*stored.manifest.stack, StackBase(name=order.source, sha256=stored.manifest.sha256))


def _check_layers(registry: Registry, order: TransferSpec) -> None:
    """Raise UsageError for blocks that the backbone does not have."""
    select_targets(registry.model.shapes, "all-linear", order.stack_layers or "all", "stack_layers")
    count = len(registry.model.backbone.blocks)
    if order.layer != -1 and not -count <= order.layer < count:
        raise UsageError(
            f"layer={order.layer}: {registry.model.backbone.name} has {count} blocks; allowed are {-count} "
            f"to {count - 1}"
        )


def _task_of(stored: Stored) -> Task:
    """Return the task that a source adapter was trained on."""
    tasks = stored.manifest.training.tasks if stored.manifest else ()
    if len(tasks) != 1:
        raise UsageError(
            f"adapter {stored.name!r} does not say which one task it learnt; name it: source_task=..., "
            "--source-task"
        )
    return load_task(tasks[0])


def _manifest(
    registry: Registry,
    order: TransferSpec,
    name: str,
    taught: Sequence[Task],
    stored: Stored,
    outcome: Outcome,
) -> Manifest:
    """Return what is known of the chosen adapter, which tasks have `taught`, the target first."""
    target = taught[0]
    chosen = outcome.candidates[outcome.chosen]
    sha256 = stored.manifest.sha256 if stored.manifest else ""
    weighting = outcome.weighting if outcome.chosen == "maxent" else None
    game = outcome.game if outcome.chosen == "adversarial" else None
    notes = [chosen.note, weighting.note if weighting else ""]
    training = Training(
        how="transfer",
        tasks=(target.name,),
        data_sha256=tuple(task.data_hash() for task in taught),
        sources=tuple(dict.fromkeys(s for task in taught for s in task.sources)),
        parents=(sha256,) if sha256 and outcome.chosen != "target" else (),
        settings=order.config.model_dump(),
        steps=chosen.steps,
        best_step=chosen.best_step,
        stopped=chosen.note,
        seconds=round(outcome.seconds, 1),
    )
    report = TransferReport(
        source=order.source,
        source_sha256=sha256,
        method=outcome.chosen,
        shots=order.shots,
        baseline=outcome.baseline,
        verdict=chosen.verdict.word,
        gain=chosen.verdict.gain,
        low=chosen.verdict.low,
        high=chosen.verdict.high,
        values={n: c.value for n, c in outcome.candidates.items()},
        verdicts={n: c.verdict.word for n, c in outcome.candidates.items()},
        effective=weighting.effective if weighting else None,
        lam=weighting.lam if weighting else None,
        clipped=weighting.clipped if weighting else None,
        residual=weighting.residual if weighting else None,
        discriminator=game.recent if game else None,
        proxy=outcome.proxy,
        note="; ".join(filter(None, notes)),
        seconds=round(outcome.seconds, 1),
    )
    draft = draft_of(name, registry.model.backbone, [target], training)
    licence = ", ".join(dict.fromkeys(task.licence for task in taught))
    return draft.model_copy(
        update={
            "routing": learn_routing(registry, [target]),
            "transfer": report,
            "licence": licence,
        }
    )
