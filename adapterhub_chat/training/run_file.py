"""A training run as a file: TOML and flags -> `RunConfig`; `run.json`, from which a run resumes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapterhub_chat.config import RunConfig, _is_list, _is_table, _setting_misfits, sweep_misfits
from adapterhub_chat.errors import ConfigError, UsageError
from adapterhub_chat.training.spec import RUN_FILE
from adapterhub_chat.validation import explain, read_settings


def read_run(
    path: Path | None,
    tasks: Sequence[str],
    names: Sequence[str],
    flags: Mapping[str, Any],
    settings: Mapping[str, Any],
    sweep: Mapping[str, list[Any]] | None = None,
) -> RunConfig:
    """Return the run that a TOML file and the command line describe together; flags win.

    Raises one ConfigError with every misfit: unknown keys at any depth, values out of range, an adapter
    without a task, one name for two, nothing to train.
    """
    values = _toml(path) if path else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    found: list[str] = []
    titles = list(names or map(_stem, tasks))
    if len(titles) != len(tasks):
        found.append(f"{len(tasks)} tasks but {len(titles)} names: give one name per task")
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        found.append(f"two adapters are called {', '.join(twice)}: give each a name of its own")
    adapters = {
        name: {key: own[key] for key in own if key not in settings} if _is_table(own) else own
        for name, own in _table(values, "adapters", found).items()
    }
    adapters |= {n: {"task": t} for n, t in zip(titles, tasks, strict=False)}
    for own in adapters.values() if sweep else ():
        if _is_table(own):
            own["sweep"] = {**own.get("sweep", {}), **(sweep or {})}
    values["adapters"] = adapters
    values["settings"] = {**_table(values, "settings", found), **settings}
    run = None
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        found += explain(error, RunConfig)
    found += _setting_misfits("settings", values["settings"])
    for name, table in adapters.items():
        found += _adapter_misfits(f"adapters.{name}", dict(table) if _is_table(table) else {})
    if not adapters:
        found.append("nothing to train: name tasks, or write [adapters.NAME] tables")
    if found or run is None:
        raise ConfigError(str(path) if path else "the command line", found)
    return run


def _adapter_misfits(where: str, own: dict[str, Any]) -> list[str]:
    """Return what is wrong in the table of one adapter: its task or tasks, its sweep, its settings."""
    found = []
    one, several, sweep = own.pop("task", None), own.pop("tasks", None), own.pop("sweep", {})
    if several is None and not isinstance(one, str):
        found.append(f'{where} needs a task, as in task = "qa"')
    elif several is not None and (one is not None or not _is_list(several, str)):
        found.append(f'{where} needs one task, or tasks = ["a", "b"] alone')
    return [*found, *sweep_misfits(f"{where}.sweep", sweep), *_setting_misfits(where, own)]


def read_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the lists that texts such as `rank=4,8` mean; raise ConfigError naming every misfit."""
    sweep: dict[str, list[Any]] = {}
    found = []
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not values:
            found.append(f"{text!r} is no sweep; write a setting and its values: rank=4,8")
            continue
        sweep.setdefault(key, []).extend(_number(value) for value in values.split(","))
    found += sweep_misfits("--sweep", sweep)
    if found:
        raise ConfigError("the command line", found)
    return sweep


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from error


def _table(values: Mapping[str, Any], key: str, found: list[str]) -> dict[str, Any]:
    """Return the table `key`; where it is something else, say so in `found` and return an empty one."""
    value = values.get(key, {})
    if _is_table(value):
        return dict(value)
    found.append(f"{key}: must be a table; got {value!r}")
    return {}


def _stem(task: str) -> str:
    return Path(task).stem if task.endswith((".py", ".toml")) else task


def resumed(folder: Path | None, given: Sequence[str] = ()) -> RunConfig:
    """Return the run that was ordered in `folder`; raise UsageError when there is none.

    `given` names what was ordered beside: a run goes on as it was ordered.
    """
    if given:
        listed = ", ".join(given)
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
    return read_settings(RunConfig, values, str(path))
