"""Adoption of a plain PEFT adapter: it is measured, and gets a manifest, a probe and a card."""

from __future__ import annotations

from pathlib import Path

from adapterhub_chat.artifact.manifest import Manifest, Training
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, UsageError
from adapterhub_chat.evaluation.scoring import judge_task
from adapterhub_chat.events import Listeners
from adapterhub_chat.pool.admission import check_fit
from adapterhub_chat.pool.provenance import draft_of
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.learn import learn_routing
from adapterhub_chat.types import as_mix


def adopt(
    registry: Registry,
    source: str | Path,
    task: Task,
    name: str | None,
    limit: int,
    listeners: Listeners,
) -> Manifest:
    """Measure and save an adapter without a manifest; see AdapterHub.adopt."""
    stored = registry.read(source, name)
    if stored.manifest is not None:
        raise UsageError(
            f"adapter {stored.name!r} has a manifest already; adapterhub-chat eval measures it"
        )
    verdict = check_fit(stored, registry.model)
    if not verdict.ok:
        raise AdapterError(f"adapter {stored.name!r} is refused: {'; '.join(verdict.problems)}")
    training = Training(
        how="foreign",
        tasks=(task.name,),
        note="made elsewhere, with PEFT; its backbone was taken on trust, its scores were measured here",
    )
    draft = draft_of(stored.name, registry.model.backbone, [task], training)
    # its training data are unknown, so the task's licence says nothing about them
    changes = {"licence": "", "routing": learn_routing(registry, [task])}
    draft = draft.model_copy(update=changes)
    registry.save_new(stored.weights, draft)
    registry.record_scores(
        judge_task(registry.model, task, [(draft.name, as_mix(draft.name))], limit, listeners)
    )
    loaded = registry.known(draft.name)
    return loaded.manifest if loaded and loaded.manifest else draft
