"""Checks of the tables that describe a training run: settings of an adapter, its sweep, its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import ConfigError
from adapterhub_chat.validation import read_settings

ADAPTER_KEYS = ("task", "tasks", "sweep")
"""Keys of an adapter's table in a run file that are no fields of TrainConfig."""


def train_setting_misfits(where: str, values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with fields of TrainConfig; `where` names their table."""
    try:
        read_settings(TrainConfig, values, where)
    except ConfigError as error:
        return [f"{where}.{misfit}" for misfit in error.misfits]
    return []


def sweep_misfits(where: str, sweep: Any) -> list[str]:
    """Return what is wrong with a sweep, which is a table of setting -> list of values to try."""
    if not is_mapping(sweep) or not all(is_list(values) for values in sweep.values()):
        return [f"{where} needs a list of values for each setting, as in rank = [4, 8]"]
    misfits: list[str] = []
    for key, values in sweep.items():
        if len(set(map(repr, values))) < len(values):
            misfits.append(f"{where}.{key}: a value is given twice in {values}")
        misfits += dict.fromkeys(m for v in values for m in train_setting_misfits(where, {key: v}))
    return misfits


def adapter_misfits(where: str, table: Mapping[str, Any]) -> list[str]:
    """Return what is wrong in one adapter's table of a run file: its task or tasks, sweep and settings."""
    task, tasks = table.get("task"), table.get("tasks")
    misfits = []
    if tasks is None and not isinstance(task, str):
        misfits.append(f'{where} needs a task, as in task = "qa"')
    elif tasks is not None and (task is not None or not is_list(tasks, str)):
        misfits.append(f'{where} needs one task, or tasks = ["a", "b"] alone')
    settings = {key: value for key, value in table.items() if key not in ADAPTER_KEYS}
    sweep = table.get("sweep", {})
    return [
        *misfits,
        *sweep_misfits(f"{where}.sweep", sweep),
        *train_setting_misfits(where, settings),
    ]


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_list(value: Any, kind: type = object) -> bool:
    """Return whether a value is a list that is not empty, of items of `kind`."""
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, kind) for v in value)
    )
