"""What a caller of `hub.train` says, as the Order of a run; raises for what does not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.config import RunOptions, TrainConfig, sweep_misfits
from adapterhub_chat.data.inputs import listed
from adapterhub_chat.data.task import Task, as_task
from adapterhub_chat.errors import ConfigError, UsageError
from adapterhub_chat.lora.sites import targeted
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.training.distributed import first_process, processes
from adapterhub_chat.validation import read_settings

STATE, FINISHED = "state", "finished.json"
"""In a run's folder: the saved states while it runs, and the sign that it has ended."""
FAMILY_SETTINGS = (
    "epochs", "max_steps", "max_minutes", "eval_every", "patience", "temperature", "schedule", "warmup",
)  # fmt: skip
"""Settings that adapters with a shared one have in common: they advance together."""
DATA_SETTINGS = ("row_length", "train_examples", "eval_examples", "rows_per_step")
"""Settings that all candidates of a sweep share: they see the same rows."""


@dataclass(frozen=True)
class Order:
    """What a run is asked for."""

    tasks: Mapping[str, Task]
    """Adapter name -> its task."""
    configs: Mapping[str, TrainConfig]
    options: RunOptions = field(default_factory=RunOptions)
    sweeps: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """Adapter name -> setting -> values."""
    save_dtype: torch.dtype = torch.float32
    run_dir: Path | None = None
    """Folder of the log and of the saved states; without it neither is kept."""
    resume: bool = False


def _check(registry: Registry, order: Order) -> None:
    """Look at all that can be wrong before the first step; raise one ConfigError that names it all."""
    options, names = order.options, list(order.tasks)
    common = {"shared": options.shared_name, "sequence": options.grown_name}.get(options.how)
    for name in (*names, *filter(None, [common])):
        check_name(name)
    encodes = registry.model.backbone.encodes
    found = [
        *_mode_misfits(order, encodes=encodes),
        *_sweep_misfits(order),
        *_folder_misfits(order),
    ]
    if common in names:
        found.append(f"{common!r} is the name of a task's adapter and of the common one")
    for name, config in order.configs.items():
        most = registry.model.backbone.max_length
        if most is not None and config.row_length > most:
            found.append(
                f"{name}: row_length {config.row_length}, and the encoder reads {most} tokens"
            )
        try:
            targeted(registry.model.shapes, config.targets, config.layers)
        except UsageError as error:
            found.append(f"{name}: {error}")
        if options.test_examples and not options.shard and not order.tasks[name].split("test"):
            found.append(f"{name}: its task has no test examples; set test_examples to 0")
    if found:
        raise ConfigError("the run", found)
    if first_process():
        registry.pool.check_writable()


def _mode_misfits(order: Order, *, encodes: bool) -> Iterator[str]:
    """Yield what is asked for and would have no effect, or cannot be."""
    options, configs = order.options, list(order.configs.values())
    grows = options.how == "sequence" and options.grow
    if encodes and grows:
        yield "grow needs a language model: an encoder's heads of several tasks do not add up"
    if options.grow and not grows:
        yield "grow needs how='sequence'"
    if options.replay and not grows:
        yield "replay needs how='sequence' and grow"
    if any(config.orthogonal for config in configs) and not grows:
        yield "orthogonal needs how='sequence' and grow"
    if options.how == "shared":
        for field_name in FAMILY_SETTINGS:
            values = list(dict.fromkeys(getattr(config, field_name) for config in configs))
            if len(values) > 1:
                yield f"{field_name} must be the same for all that share an adapter, not {values}"
    elif any(config.temperature != 1 for config in configs):
        yield "temperature needs how='shared'"
    if options.shard and processes() < 2:
        yield "shard spreads the backbone over processes; start several with torchrun"


def _sweep_misfits(order: Order) -> Iterator[str]:
    if order.sweeps and order.options.how != "joint":
        yield f"a sweep trains jointly; how={order.options.how!r} cannot have one"
    for name, sweep in order.sweeps.items():
        if name not in order.tasks:
            yield f"sweep of {name!r}, but this run trains {', '.join(order.tasks)}"
            continue
        yield from sweep_misfits(f"sweep of {name!r}", sweep)
        for key in set(sweep) & set(DATA_SETTINGS):
            yield f"sweep of {name!r}: {key} must be the same for all candidates"
        if not order.configs[name].eval_examples:
            yield f"sweep of {name!r}: eval_examples=0 leaves nothing to choose by"


def _folder_misfits(order: Order) -> Iterator[str]:
    """Yield why the run cannot begin, or go on, in its folder."""
    folder = order.run_dir
    if folder is None:
        if order.resume:
            yield "resume needs the run's folder (run_dir)"
        return
    saved = any((folder / STATE).rglob("state-*"))
    if order.resume and not saved and (folder / FINISHED).exists():
        yield f"the run in {folder} has finished; there is nothing to resume"
    if not order.resume and saved:
        yield f"{folder} holds the state of a run that has not finished: resume it, or name another folder"


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
