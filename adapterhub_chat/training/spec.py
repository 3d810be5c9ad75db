"""TrainSpec: everything that a training run needs to know, from a call or a run file, and its checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.config import RunConfig, RunOptions, TrainConfig
from adapterhub_chat.data.inputs import as_list
from adapterhub_chat.data.task import Task, as_task, load_task, mixture
from adapterhub_chat.errors import ConfigError, UsageError
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.training.distributed import first_process, num_processes
from adapterhub_chat.training.settings import ADAPTER_KEYS, sweep_misfits
from adapterhub_chat.validation import read_settings

STATE, FINISHED = "state", "finished.json"
"""In a run's folder: the folder of saved states while it runs, and the file that marks its end."""
RUN_FILE = "run.json"
"""In a run's folder: the RunConfig that it was started with."""
FAMILY_SETTINGS = (
    "epochs", "max_steps", "max_minutes", "eval_every", "patience", "temperature", "schedule", "warmup",
)  # fmt: skip
"""Settings that must be equal for all adapters of how="shared", which advance together."""
DATA_SETTINGS = ("row_length", "train_examples", "eval_examples", "rows_per_step")
"""Settings that must be equal for all candidates of a sweep, which are trained on the same rows."""


@dataclass(frozen=True)
class TrainSpec:
    """A training run: tasks, settings, options, sweeps and folder."""

    tasks: Mapping[str, Task]
    """Adapter name -> its task."""
    configs: Mapping[str, TrainConfig]
    options: RunOptions = field(default_factory=RunOptions)
    sweeps: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """Adapter name -> setting -> values."""
    save_dtype: torch.dtype = torch.float32
    run_dir: Path | None = None
    """Folder of the log and the saved states; None: neither is written."""
    resume: bool = False
    run_config: RunConfig | None = None
    """The run as a file describes it; written to `run_dir`, so that the run can be resumed from there."""

    @classmethod
    def of_call(
        cls,
        tasks: Sequence[str | Path | Task],
        shared: Mapping[str, Any],
        names: Sequence[str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> TrainSpec:
        """Return the spec of one adapter per task; `shared` are fields of RunOptions and TrainConfig.

        `settings[name]` are fields of one adapter's TrainConfig; `fields` are those of the spec itself.
        Raises UsageError if names and tasks do not pair up, ConfigError for wrong settings or sweeps.
        """
        loaded = [as_task(task) for task in as_list(tasks, "tasks")]
        titles = [task.name for task in loaded] if names is None else list(names)
        if len(titles) != len(loaded):
            raise UsageError(f"{len(loaded)} tasks but {len(titles)} names: give one name per task")
        if len(set(titles)) < len(titles):
            raise UsageError(f"adapter names must differ: {', '.join(titles)}")
        options = {key: value for key, value in shared.items() if key in RunOptions.model_fields}
        common = {key: value for key, value in shared.items() if key not in options}
        sweeps = fields.get("sweeps", {})
        misfits = [
            m for n, sweep in sweeps.items() for m in sweep_misfits(f"sweep of {n!r}", sweep)
        ]
        if misfits:
            raise ConfigError("the run", misfits)
        return cls(
            tasks=dict(zip(titles, loaded, strict=True)),
            configs=_configs_of(titles, common, settings or {}),
            options=read_settings(RunOptions, options, "the run"),
            **fields,
        )

    @classmethod
    def of_run(cls, run: RunConfig, run_dir: Path, *, resume: bool = False) -> TrainSpec:
        """Return the spec of a run that `read_run` or `resumed` has read."""
        sweeps = {name: entry["sweep"] for name, entry in run.adapters.items() if "sweep" in entry}
        settings = {
            name: {key: value for key, value in entry.items() if key not in ADAPTER_KEYS}
            for name, entry in run.adapters.items()
        }
        return cls(
            tasks={name: _task_of(name, entry) for name, entry in run.adapters.items()},
            configs=_configs_of(list(run.adapters), run.settings, settings),
            options=RunOptions(**{key: getattr(run, key) for key in RunOptions.model_fields}),
            sweeps={name: sweep for name, sweep in sweeps.items() if sweep},
            run_dir=run_dir,
            resume=resume,
            run_config=run,
        )


def check_spec(registry: Registry, spec: TrainSpec) -> None:
    """Check everything that can be wrong before the first step; raise one ConfigError with all misfits."""
    options, names = spec.options, list(spec.tasks)
    common = {"shared": options.shared_name, "sequence": options.grown_name}.get(options.how)
    for name in (*names, *filter(None, [common])):
        check_name(name)
    misfits = [
        *_mode_misfits(spec, encodes=registry.model.backbone.encodes),
        *_sweep_misfits(spec),
        *_folder_misfits(spec),
    ]
    if common in names:
        misfits.append(f"{common!r} is the name of a task's adapter and of the common one")
    for name in names:
        misfits += _adapter_misfits(registry.model, spec, name)
    if misfits:
        raise ConfigError("the run", misfits)
    if first_process():
        registry.pool.check_writable()


def _adapter_misfits(model: AdapterModel, spec: TrainSpec, name: str) -> Iterator[str]:
    """Yield what does not fit between one adapter's settings, its task and the backbone."""
    options, config = spec.options, spec.configs[name]
    max_length = model.backbone.max_length
    if max_length is not None and config.row_length > max_length:
        yield f"{name}: row_length {config.row_length}, and the encoder reads {max_length} tokens"
    try:
        select_targets(model.shapes, config.targets, config.layers)
    except UsageError as error:
        yield f"{name}: {error}"
    if options.test_examples and not options.shard and not spec.tasks[name].split("test"):
        yield f"{name}: its task has no test examples; set test_examples to 0"


def _mode_misfits(spec: TrainSpec, *, encodes: bool) -> Iterator[str]:
    """Yield the options that would have no effect, or contradict each other."""
    options, configs = spec.options, list(spec.configs.values())
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
        for key in FAMILY_SETTINGS:
            values = list(dict.fromkeys(getattr(config, key) for config in configs))
            if len(values) > 1:
                yield f"{key} must be the same for all that share an adapter, not {values}"
    elif any(config.temperature != 1 for config in configs):
        yield "temperature needs how='shared'"
    if options.shard and num_processes() < 2:
        yield "shard spreads the backbone over processes; start several with torchrun"


def _sweep_misfits(spec: TrainSpec) -> Iterator[str]:
    if spec.sweeps and spec.options.how != "joint":
        yield f"a sweep trains jointly; how={spec.options.how!r} cannot have one"
    for name, sweep in spec.sweeps.items():
        if name not in spec.tasks:
            yield f"sweep of {name!r}, but this run trains {', '.join(spec.tasks)}"
            continue
        for key in set(sweep) & set(DATA_SETTINGS):
            yield f"sweep of {name!r}: {key} must be the same for all candidates"
        if not spec.configs[name].eval_examples:
            yield f"sweep of {name!r}: eval_examples=0 leaves nothing to choose by"


def _folder_misfits(spec: TrainSpec) -> Iterator[str]:
    """Yield why the run cannot start or resume in its folder."""
    folder = spec.run_dir
    if folder is None:
        if spec.resume:
            yield "resume needs the run's folder (run_dir)"
        return
    saved = any((folder / STATE).rglob("state-*"))
    if spec.resume and not saved and (folder / FINISHED).exists():
        yield f"the run in {folder} has finished; there is nothing to resume"
    if not spec.resume and saved:
        yield f"{folder} holds the state of a run that has not finished: resume it, or name another folder"


def _task_of(name: str, entry: Mapping[str, Any]) -> Task:
    """Return the task, or the mixture of tasks, that an adapter's table in a run file names."""
    if "tasks" not in entry:
        return load_task(entry["task"])
    return mixture(name, [load_task(task) for task in entry["tasks"]])


def _configs_of(
    names: Sequence[str], shared: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainConfig]:
    """Return each adapter's settings: the shared ones, overridden by its own."""
    if unknown := [name for name in settings if name not in names]:
        trained = ", ".join(names)
        raise UsageError(f"settings for {', '.join(unknown)}, but this run trains {trained}")
    return {
        name: read_settings(
            TrainConfig, {**shared, **settings.get(name, {})}, f"settings of {name!r}"
        )
        for name in names
    }
