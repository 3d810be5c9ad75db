"""What a caller of `hub.train` says, as the Order of a run; raises for what does not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub_chat.config import RunOptions, TrainConfig, read_settings
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inputs import listed
from adapterhub_chat.task import Task, as_task
from adapterhub_chat.workshop import Order


def order_of(
    tasks: Sequence[str | Path | Task],
    shared: Mapping[str, Any],
    names: Sequence[str] | None,
    settings: Mapping[str, Mapping[str, Any]],
) -> Order:
    """Return the order to train one adapter per task; `shared` are fields of RunOptions and TrainConfig."""
    loaded = [as_task(task) for task in listed(tasks, "tasks")]
    titles = [task.name for task in loaded] if names is None else list(names)
    if len(titles) != len(loaded):
        raise UsageError(f"{len(loaded)} tasks but {len(titles)} names: give one name per task")
    if len(set(titles)) < len(titles):
        raise UsageError(f"adapter names must differ: {', '.join(titles)}")
    run = {key: value for key, value in shared.items() if key in RunOptions.model_fields}
    common = {key: value for key, value in shared.items() if key not in run}
    return Order(
        tasks=dict(zip(titles, loaded, strict=True)),
        configs=_configs_of(titles, common, settings),
        options=read_settings(RunOptions, run, "the run"),
    )


def _configs_of(
    names: Sequence[str], shared: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainConfig]:
    """Return each adapter's settings: the shared ones under its own."""
    if unknown := [name for name in own if name not in names]:
        trained = ", ".join(names)
        raise UsageError(f"settings for {', '.join(unknown)}, but this run trains {trained}")
    return {
        name: read_settings(TrainConfig, {**shared, **own.get(name, {})}, f"settings of {name!r}")
        for name in names
    }
