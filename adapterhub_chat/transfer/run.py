"""A transfer from start to end: from a TransferSpec to a saved, measured adapter with its verdict."""

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
from adapterhub_chat.pool.provenance import draft_of, trained_task_names
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stacks import flattened
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.route.learn import learn_routing
from adapterhub_chat.transfer.candidates import Outcome, check_method, transfer
from adapterhub_chat.transfer.methods import STACKS
from adapterhub_chat.transfer.setting import TransferProblem, make_problem, warn_of_language
from adapterhub_chat.transfer.spec import TransferSpec, target_and_texts
from adapterhub_chat.types import Example, as_mix

SOURCE_METHODS = ("maxent", "adversarial")
"""Methods that also learn from the source's examples."""


@dataclass(frozen=True)
class Transferred:
    """The result of a transfer."""

    manifest: Manifest | None
    """Of the new adapter; None if nothing is better than the bare backbone."""
    outcome: Outcome
    by_shots: Mapping[int, Outcome] = field(default_factory=dict)
    """Number of shots -> outcome, in ascending order."""


def make_transfer(registry: Registry, spec: TransferSpec, listeners: Listeners) -> Transferred:
    """Train, judge, choose, save and measure; see AdapterHub.transfer."""
    stored = registry.read(spec.source)
    task = spec.source_task or _task_of(stored)
    target, texts = target_and_texts(spec, task)
    name = _check_spec(registry, spec, stored, target)
    problems = _problems(registry, spec, stored, task, target, texts)
    outcomes = {
        shots: transfer(registry.model, problem, spec.method, on_event=listeners.on_event)
        for shots, problem in problems.items()
    }
    outcome = outcomes[spec.shots]
    if outcome.candidates[outcome.chosen].weights is None:
        return Transferred(None, outcome, outcomes)
    tasks = [target, *([task] if outcome.chosen in SOURCE_METHODS else [])]
    manifest = _save(registry, spec, name, tasks, stored, outcome)
    if target.split("test"):
        scores = judge_task(registry.model, target, [(name, as_mix(name))], 0, listeners)
        registry.describe(name, manifest := manifest.with_scores(scores))
    return Transferred(manifest, outcome, outcomes)


def _check_spec(registry: Registry, spec: TransferSpec, stored: Stored, target: Task) -> str:
    """Return the new adapter's name; raise AdapterHubError for an unfit source, name or block."""
    name = check_name(spec.name or f"{target.name}-from-{stored.name}")
    reason = transfer_problem(stored.manifest)
    if reason and spec.method in (*STACKS, "auto") and not spec.force:
        raise AdapterError(
            f"{reason}; nothing is stacked on it. force=True (--force) does it all the same"
        )
    stack_bases = [base.name for base in stored.manifest.stack] if stored.manifest else []
    if name in (spec.source, *stack_bases):
        raise UsageError(
            f"{name!r} is what the new adapter learns from; choose another name for it"
        )
    _check_layers(registry, spec)
    registry.pool.check_writable()
    return name


def _problems(
    registry: Registry,
    spec: TransferSpec,
    stored: Stored,
    task: Task,
    target: Task,
    texts: Sequence[Example] | None,
) -> dict[int, TransferProblem]:
    """Return the checked problem of each number of shots, in ascending order."""
    labels = [*stored.manifest.contract.labels] if stored.manifest else None
    source = flattened(registry.pool, stored)
    problems = {
        shots: replace(
            make_problem(source, task, target, shots, spec.config, unlabelled=texts, labels=labels),
            level=spec.level,
            stack_layers=spec.stack_layers,
            layer=spec.layer,
        )
        for shots in sorted({spec.shots, *spec.more_shots})
    }
    for problem in problems.values():
        check_method(problem, spec.method)
    warn_of_language(registry.model.backbone.tokenizer, problems[spec.shots])
    return problems


def _save(
    registry: Registry,
    spec: TransferSpec,
    name: str,
    tasks: Sequence[Task],
    stored: Stored,
    outcome: Outcome,
) -> Manifest:
    """Save the chosen adapter: as a stack on the source, or else as one plain adapter."""
    chosen = outcome.candidates[outcome.chosen]
    assert chosen.weights is not None
    stack = _stack_bases(registry, spec, stored) if chosen.stacked is not None else ()
    weights = chosen.stacked if chosen.stacked is not None and stack else chosen.weights
    draft = _draft(registry, spec, name, tasks, stored, outcome)
    return registry.save_new(weights, draft.model_copy(update={"stack": stack}))


def flatten(registry: Registry, name: str, flat_name: str | None) -> Manifest:
    """Save a stack as one plain adapter; see AdapterHub.flatten."""
    stored = registry.read(name)
    manifest = stored.manifest
    if manifest is None or not manifest.stack:
        raise UsageError(f"adapter {name!r} is no stack: it is one plain adapter already")
    new_name = check_name(flat_name or f"{manifest.name}-flat")
    parents = (*(base.sha256 for base in manifest.stack), manifest.sha256)
    training = manifest.training.model_copy(
        update={"parents": parents, "note": f"the stack {manifest.name} as one adapter"}
    )
    scores = tuple(replace(score, adapter=new_name) for score in manifest.scores)
    changes = {
        "name": new_name,
        "stack": (),
        "training": training,
        "scores": scores,
        "published": "",
    }
    return registry.save_new(flattened(registry.pool, stored), manifest.model_copy(update=changes))


def _stack_bases(registry: Registry, spec: TransferSpec, stored: Stored) -> tuple[StackBase, ...]:
    """Return the bases of a stack on the source; empty if the source is not in the pool, so cannot be one."""
    if spec.source not in registry.pool or stored.manifest is None:
        return ()
    return (*stored.manifest.stack, StackBase(name=spec.source, sha256=stored.manifest.sha256))


def _check_layers(registry: Registry, spec: TransferSpec) -> None:
    """Raise UsageError for blocks that the backbone does not have."""
    select_targets(registry.model.shapes, "all-linear", spec.stack_layers or "all", "stack_layers")
    num_blocks = len(registry.model.backbone.blocks)
    if spec.layer != -1 and not -num_blocks <= spec.layer < num_blocks:
        raise UsageError(
            f"layer={spec.layer}: {registry.model.backbone.name} has {num_blocks} blocks; allowed are "
            f"{-num_blocks} to {num_blocks - 1}"
        )


def _task_of(stored: Stored) -> Task:
    """Return the task that a source adapter was trained on."""
    tasks = trained_task_names(stored.manifest)
    if len(tasks) != 1:
        raise UsageError(
            f"adapter {stored.name!r} does not say which one task it learnt; name it: source_task=..., "
            "--source-task"
        )
    return load_task(tasks[0])


def _draft(
    registry: Registry,
    spec: TransferSpec,
    name: str,
    tasks: Sequence[Task],
    stored: Stored,
    outcome: Outcome,
) -> Manifest:
    """Return the chosen adapter's manifest; `tasks` are those it has learnt from, the target first."""
    target = tasks[0]
    draft = draft_of(
        name, registry.model.backbone, [target], _training(spec, tasks, stored, outcome)
    )
    return draft.model_copy(
        update={
            "routing": learn_routing(registry, [target]),
            "transfer": _report(spec, stored, outcome),
            "licence": ", ".join(dict.fromkeys(task.licence for task in tasks)),
        }
    )


def _training(
    spec: TransferSpec, tasks: Sequence[Task], stored: Stored, outcome: Outcome
) -> Training:
    """Return the manifest's record of the training."""
    chosen = outcome.candidates[outcome.chosen]
    sha256 = stored.manifest.sha256 if stored.manifest else ""
    return Training(
        how="transfer",
        tasks=(tasks[0].name,),
        data_sha256=tuple(task.data_hash() for task in tasks),
        sources=tuple(dict.fromkeys(s for task in tasks for s in task.sources)),
        parents=(sha256,) if sha256 and outcome.chosen != "target" else (),
        settings=spec.config.model_dump(),
        steps=chosen.steps,
        best_step=chosen.best_step,
        stopped=chosen.note,
        seconds=round(outcome.seconds, 1),
    )


def _report(spec: TransferSpec, stored: Stored, outcome: Outcome) -> TransferReport:
    """Return the manifest's record of the candidates, their verdicts and the chosen method."""
    chosen = outcome.candidates[outcome.chosen]
    weighting = outcome.weighting if outcome.chosen == "maxent" else None
    discriminator = outcome.discriminator if outcome.chosen == "adversarial" else None
    notes = [chosen.note, weighting.note if weighting else ""]
    return TransferReport(
        source=spec.source,
        source_sha256=stored.manifest.sha256 if stored.manifest else "",
        method=outcome.chosen,
        shots=spec.shots,
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
        discriminator=discriminator.recent_accuracy if discriminator else None,
        proxy=outcome.proxy,
        note="; ".join(filter(None, notes)),
        seconds=round(outcome.seconds, 1),
    )
