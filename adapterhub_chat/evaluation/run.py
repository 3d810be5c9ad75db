"""Evaluation of a pool's adapters on the tasks that they were trained on, or on others."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import UsageError
from adapterhub_chat.evaluation.scoring import judge_task
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.inference.contracts import check_labels
from adapterhub_chat.pool.provenance import tasks_trained_on
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import AdapterChoice, Score


def evaluate_adapters(
    registry: Registry,
    adapters: Sequence[AdapterChoice] | None,
    tasks: Sequence[Task] | None,
    limit: int = 0,
    *,
    save: bool = False,
    listeners: Listeners = SILENT,
) -> list[Score]:
    """Return the scores of adapters on the test splits of tasks; see AdapterHub.evaluate."""
    members = registry.pool.names()
    if not (members if adapters is None else adapters):
        raise UsageError(
            f"nothing to evaluate: name adapters, or train some into {registry.pool.root}"
        )
    chosen = registry.load_usable(members, listeners.on_refused) if adapters is None else adapters
    named = [(str(mix), mix) for mix in registry.resolve(chosen)]
    pairs = tasks_trained_on(registry, named) if tasks is None else [(t, named) for t in tasks]
    for task, mixes in pairs:
        for _, mix in mixes:
            check_labels(registry.model, registry.contract(mix), task.contract)
    by_task = [judge_task(registry.model, task, group, limit, listeners) for task, group in pairs]
    scores = [score for task_scores in by_task for score in task_scores]
    if save:
        registry.record_scores(scores)
    return scores
