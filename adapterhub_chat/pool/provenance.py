"""Provenance: the manifest of a new adapter, and the tasks that existing adapters were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from adapterhub_chat.artifact.manifest import Manifest, Training
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import Mix


def draft_of(name: str, backbone: Backbone, tasks: Sequence[Task], training: Training) -> Manifest:
    """Return the manifest of a new adapter, without scores and probe.

    Its prompt contract and metric are those of the last task.
    """
    task = tasks[-1]
    return Manifest(
        name=name,
        about="; ".join(dict.fromkeys(t.about for t in tasks if t.about)),
        language=", ".join(dict.fromkeys(t.language for t in tasks)),
        licence=", ".join(dict.fromkeys(t.licence for t in tasks)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        contract=task.contract,
        metric=task.metric,
        training=training,
    )


def tasks_trained_on(
    registry: Registry, mixes: Sequence[tuple[str, Mix]]
) -> list[tuple[Task, list[tuple[str, Mix]]]]:
    """Return the tasks that adapters were trained on, each with the mixes to evaluate on it."""
    mixes_by_task: dict[str, list[tuple[str, Mix]]] = {}
    for name, mix in mixes:
        adapter = registry.known(name)
        trained_on = adapter.manifest.training.tasks if adapter and adapter.manifest else ()
        if not trained_on:
            raise UsageError(f"adapter {name!r} does not say what it was trained on; name tasks")
        for task in trained_on:
            mixes_by_task.setdefault(task, []).append((name, mix))
    return [(load_trained_task(task, group[0][0]), group) for task, group in mixes_by_task.items()]


def load_trained_task(name: str, adapter: str) -> Task:
    """Return a task by the name in an adapter's manifest; raise UsageError if no such task is known."""
    try:
        return load_task(name)
    except UnknownNameError as error:
        raise UsageError(
            f"adapter {adapter!r} was trained on the task {name!r}, whose file is not here; give its "
            f"path: --task path/to/{name}.toml, in Python evaluate(tasks=[...])"
        ) from error
