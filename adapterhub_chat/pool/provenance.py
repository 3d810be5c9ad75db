"""Manifests and the tasks they name: the draft of a new adapter, the tasks of trained ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from adapterhub_chat.artifact.manifest import Manifest, Training
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import Mix, PromptContract


class Described(Protocol):
    """The fields that a new manifest takes over from a training's tasks or from a merge's sources."""

    @property
    def about(self) -> str: ...  # noqa: D102 - the fields of Task and Manifest
    @property
    def language(self) -> str: ...  # noqa: D102
    @property
    def licence(self) -> str: ...  # noqa: D102
    @property
    def contract(self) -> PromptContract: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102


def draft_of(
    name: str,
    backbone: Backbone,
    origins: Sequence[Described],
    training: Training,
    prompted_as: Described | None = None,
) -> Manifest:
    """Return the manifest of a new adapter: not measured yet, and without its probe.

    Contract and metric are those of `prompted_as`, of the last origin where that is None.
    """
    prompting = prompted_as or origins[-1]
    return Manifest(
        name=name,
        about=_joined("; ", (origin.about for origin in origins)),
        language=_joined(", ", (origin.language for origin in origins)),
        licence=_joined(", ", (origin.licence for origin in origins)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        contract=prompting.contract,
        metric=prompting.metric,
        training=training,
    )


def _joined(separator: str, texts: Iterable[str]) -> str:
    """Join the texts that are not empty, each once."""
    return separator.join(dict.fromkeys(filter(None, texts)))


def tasks_trained_on(
    registry: Registry, mixes: Sequence[tuple[str, Mix]]
) -> list[tuple[Task, list[tuple[str, Mix]]]]:
    """Return the tasks that adapters were trained on, each with the adapters that it is to judge."""
    groups: dict[str, list[tuple[str, Mix]]] = {}
    for name, mix in mixes:
        loaded = registry.known(name)
        task_names = trained_task_names(loaded.manifest if loaded else None)
        if not task_names:
            raise UsageError(f"adapter {name!r} does not say what it was trained on; name tasks")
        for task in task_names:
            groups.setdefault(task, []).append((name, mix))
    return [(load_trained_task(task, group[0][0]), group) for task, group in groups.items()]


def trained_task_names(manifest: Manifest | None) -> tuple[str, ...]:
    """Return the names of the tasks that an adapter was trained on; none without a manifest."""
    return manifest.training.tasks if manifest else ()


def load_trained_tasks(manifest: Manifest | None, adapter: str) -> list[Task]:
    """Return the tasks that an adapter was trained on; raise UsageError for one that is not found."""
    return [load_trained_task(name, adapter) for name in trained_task_names(manifest)]


def load_trained_task(name: str, adapter: str) -> Task:
    """Return a task by the name in an adapter's manifest; raise UsageError if no such task is known."""
    try:
        return load_task(name)
    except UnknownNameError as error:
        raise UsageError(
            f"adapter {adapter!r} was trained on the task {name!r}, whose file is not here; give its "
            f"path: --task path/to/{name}.toml, in Python evaluate(tasks=[...])"
        ) from error
