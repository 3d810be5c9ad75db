"""Reads a training run: TOML and flags -> `RunConfig`; `run.json`, from which a run resumes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub_chat.config import RunConfig
from adapterhub_chat.errors import ConfigError, UsageError
from adapterhub_chat.training.settings import (
    adapter_misfits,
    is_mapping,
    sweep_misfits,
    train_setting_misfits,
)
from adapterhub_chat.training.spec import RUN_FILE
from adapterhub_chat.validation import read_settings


def read_run(
    path: Path | None,
    tasks: Sequence[str],
    names: Sequence[str],
    flags: Mapping[str, Any],
    settings: Mapping[str, Any],
    sweep: Mapping[str, list[Any]] | None = None,
) -> RunConfig:
    """Return the run that a TOML file and the command line describe together; flags take precedence.

    `sweep`, from `read_sweep`, is added to every adapter's own. Raises one ConfigError with every misfit:
    unknown keys at any depth, values out of range, an adapter without a task, a duplicate name, no adapter.
    """
    values = _read_toml(path) if path else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    misfits: list[str] = []
    titles = list(names or map(_stem, tasks))
    if len(titles) != len(tasks):
        misfits.append(f"{len(tasks)} tasks but {len(titles)} names: give one name per task")
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        misfits.append(f"two adapters are called {', '.join(twice)}: give each a name of its own")
    adapters = {
        name: {k: v for k, v in table.items() if k not in settings} if is_mapping(table) else table
        for name, table in _table(values, "adapters", misfits).items()
    }
    adapters |= {title: {"task": task} for title, task in zip(titles, tasks, strict=False)}
    values["adapters"] = adapters
    values["settings"] = {**_table(values, "settings", misfits), **settings}
    run = _parse_run(values, str(path) if path else "the command line", misfits)
    if not sweep:
        return run
    swept = {
        name: {**table, "sweep": {**table.get("sweep", {}), **sweep}}
        for name, table in run.adapters.items()
    }
    return run.model_copy(update={"adapters": swept})


def _parse_run(values: Mapping[str, Any], source: str, misfits: Sequence[str] = ()) -> RunConfig:
    """Return the run that `values` describe.

    Raises one ConfigError with `misfits` and all that is wrong in `values`, the adapters' tables included.
    """
    all_misfits = list(misfits)
    run = None
    try:
        run = read_settings(RunConfig, values, source)
    except ConfigError as error:
        all_misfits += error.misfits
    settings, adapters = values.get("settings", {}), values.get("adapters", {})
    all_misfits += train_setting_misfits("settings", settings if is_mapping(settings) else {})
    for name, table in adapters.items() if is_mapping(adapters) else ():
        all_misfits += adapter_misfits(f"adapters.{name}", table if is_mapping(table) else {})
    if not adapters:
        all_misfits.append("nothing to train: name tasks, or write [adapters.NAME] tables")
    if all_misfits or run is None:
        raise ConfigError(source, all_misfits)
    return run


def read_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse texts such as `rank=4,8` into lists of values; raise ConfigError naming every misfit."""
    sweep: dict[str, list[Any]] = {}
    misfits = []
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not values:
            misfits.append(f"{text!r} is no sweep; write a setting and its values: rank=4,8")
            continue
        sweep.setdefault(key, []).extend(_parse_value(value) for value in values.split(","))
    misfits += sweep_misfits("--sweep", sweep)
    if misfits:
        raise ConfigError("the command line", misfits)
    return sweep


def _parse_value(text: str) -> Any:
    """Return a number, a boolean, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from error


def _table(values: Mapping[str, Any], key: str, misfits: list[str]) -> dict[str, Any]:
    """Return the table `key`; if it is something else, add to `misfits` and return an empty one."""
    value = values.get(key, {})
    if is_mapping(value):
        return dict(value)
    misfits.append(f"{key}: must be a table; got {value!r}")
    return {}


def _stem(task: str) -> str:
    """Return the adapter name of a task: a file's stem, or the task's name."""
    return Path(task).stem if task.endswith((".py", ".toml")) else task


def resumed(folder: Path | None, options: Sequence[str] = ()) -> RunConfig:
    """Return the run that was started in `folder`; raise UsageError if there is none.

    `options` names the further options of the command line; they are refused.
    """
    if options:
        listed = ", ".join(options)
        raise UsageError(f"--resume goes on with the run as it was ordered; leave out {listed}")
    if folder is None:
        raise UsageError("--resume needs --run-dir, the folder of the run to go on with")
    path = folder / RUN_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no run to resume: there is no {RUN_FILE} in it"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["does not hold a run"])
    return _parse_run(values, str(path))
