"""`train`: train and measure adapters; `--config` and `--resume` read the run from files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.cli.options import (
    DeviceOption,
    DtypeOption,
    HubOptions,
    JsonOption,
    QuantizeOption,
    with_settings,
)
from adapterhub_chat.cli.output import INTERRUPTED, Bars, Notes, err, print_finished, print_json
from adapterhub_chat.config import RunConfig
from adapterhub_chat.events import Candidate, Ledger, Listeners
from adapterhub_chat.training.distributed import first_process, leave
from adapterhub_chat.training.run import Finished
from adapterhub_chat.training.run_file import read_run, read_sweep, resumed
from adapterhub_chat.training.spec import TrainSpec


@with_settings
def train(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Names from tasks/, or paths of .py or .toml files.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML of a run: [settings] and [adapters.NAME] tables.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Adapter names, one per task (repeat the option).")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Values to try, the best is kept: rank=4,8 (repeat the option)."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(show_default="smollm2-135m")] = None,
    pool: Annotated[Path | None, typer.Option(show_default="adapters")] = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of log and state.", show_default="runs/<time>")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run-dir, as it was ordered.")
    ] = False,
    as_json: JsonOption = False,
    *,
    run_options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Train one adapter per task, jointly or one after another; save and measure them."""
    notes = Notes(quiet=as_json or not first_process())
    flags = {
        **run_options,
        "backbone": backbone,
        "pool": str(pool) if pool else None,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
    }
    if resume:
        other_arguments = {"a task": tasks, "--config": config, "--name": name, "--sweep": sweep}
        set_options = [
            what for what, value in {**other_arguments, **flags, **settings}.items() if value
        ]
        run = resumed(run_dir, set_options)
    else:
        run = read_run(config, tasks or [], name or [], flags, settings, read_sweep(sweep or []))
    folder = run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    hub = HubOptions(run.backbone, Path(run.pool), run.quantize, run.dtype, run.device).open(notes)
    with Bars(err, show=not notes.quiet) as bars:
        finished = _train(hub, TrainSpec.of_run(run, folder, resume=resume), bars.listeners)
    is_first_process = first_process()
    leave()
    if is_first_process:
        if as_json:
            print_json({n: m.summary() for n, m in finished.manifests.items()})
        else:
            print_finished(finished, run.pool, folder, notes)
        raise typer.Exit(_training_code(run, finished.manifests))


def _training_code(run: RunConfig, manifests: Mapping[str, Manifest]) -> int:
    """Return INTERRUPTED after Ctrl-C, 1 when an adapter was not saved since it learnt nothing, else 0."""
    if any(m.training.stopped == "interrupted" for m in manifests.values()):
        return INTERRUPTED
    grows = run.how == "sequence" and run.grow
    return int(len(manifests) < (1 if grows else len(run.adapters) + (run.how == "shared")))


def _train(hub: AdapterHub, spec: TrainSpec, listeners: Listeners) -> Finished:
    """Carry out a run; return its manifests, the sweep's table and the sequence's ledger."""
    finished = Finished()

    def on_sweep(table: Sequence[Candidate]) -> None:
        finished.sweep = table

    def on_ledger(ledger: Ledger) -> None:
        finished.ledger = ledger

    finished.manifests = hub.run(spec, replace(listeners, on_sweep=on_sweep, on_ledger=on_ledger))
    return finished
