"""Orders: a RunConfig carried out by a hub, written down so that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.config import RunConfig, RunOptions, read_settings
from adapterhub_chat.courses import Candidate
from adapterhub_chat.errors import ConfigError, UsageError
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.runlog import write_json
from adapterhub_chat.sequence import Ledger
from adapterhub_chat.task import Task, load_task, mixture
from adapterhub_chat.train import Event
from adapterhub_chat.workshop import SILENT, Listeners

FILE = "run.json"


@dataclass
class Finished:
    """What a run gave: adapters, the table of a sweep, the ledger of a sequence."""

    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    sweep: Sequence[Candidate] = ()
    ledger: Ledger | None = None


def carry_out(
    hub: AdapterHub,
    run: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    listeners: Listeners = SILENT,
) -> Finished:
    """Train what `run` describes, with log and state in `folder`."""
    done = Finished()

    def on_sweep(table: Sequence[Candidate]) -> None:
        done.sweep = table

    def on_ledger(ledger: Ledger) -> None:
        done.ledger = ledger

    def on_event(event: Event) -> None:
        if not written:  # the run has begun: nothing that was wrong with it left a trace
            write_json(folder / FILE, run.model_dump(mode="json"))
            written.append(True)
        listeners.on_event(event)

    written: list[bool] = []
    tasks = [_task(name, entry) for name, entry in run.adapters.items()]
    own = {name: dict(entry) for name, entry in run.adapters.items()}
    sweeps = {name: entry.pop("sweep") for name, entry in own.items() if entry.get("sweep")}
    for entry in own.values():
        entry.pop("task", None)
        entry.pop("tasks", None)
    options = {key: getattr(run, key) for key in RunOptions.model_fields}
    done.manifests = hub.train(
        tasks,
        names=list(run.adapters),
        settings=own,
        sweep=sweeps,
        run_dir=folder,
        resume=resume,
        listeners=replace(listeners, on_event=on_event, on_sweep=on_sweep, on_ledger=on_ledger),
        **options,
        **run.settings,
    )
    return done


def resumed(folder: Path | None, given: Sequence[str] = ()) -> RunConfig:
    """Return the run that was ordered in `folder`; raise UsageError when there is none.

    `given` names what was ordered beside: a run goes on as it was ordered.
    """
    if given:
        listed = ", ".join(given)
        raise UsageError(f"--resume goes on with the run as it was ordered; leave out {listed}")
    if folder is None:
        raise UsageError("--resume needs --run-dir, the folder of the run to go on with")
    path = folder / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no run to resume: there is no {FILE} in it") from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["does not hold a run"])
    return read_settings(RunConfig, values, str(path))


def _task(name: str, entry: Mapping[str, Any]) -> Task:
    if "tasks" not in entry:
        return load_task(entry["task"])
    return mixture(name, [load_task(task) for task in entry["tasks"]])
