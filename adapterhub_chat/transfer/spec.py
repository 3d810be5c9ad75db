"""TransferSpec: everything that a transfer needs to know, from the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.inputs import input_examples
from adapterhub_chat.data.task import Task, as_task, is_table, table_task
from adapterhub_chat.errors import UsageError
from adapterhub_chat.types import Example
from adapterhub_chat.validation import read_settings

DEFAULTS: Mapping[str, Any] = {
    "max_steps": 60,
    "epochs": 1000.0,
    "train_examples": 400,
    "eval_examples": 200,
    "patience": 0,
}
"""Settings of every method, unless others are given."""


def transfer_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of every method: DEFAULTS, overridden by the given fields of TrainConfig."""
    return read_settings(TrainConfig, {**DEFAULTS, **settings}, "the transfer")


@dataclass(frozen=True)
class TransferSpec:
    """The source, the target and the options of a transfer."""

    source: str
    target: Task | Path
    """A path is a table of examples, with the prompt contract of the source's task."""
    method: str = "auto"
    name: str | None = None
    shots: int = 16
    source_task: Task | None = None
    unlabelled: Sequence[Mapping[str, str] | str] | None = None
    """Unlabelled texts of the target, or fields; None: the target's own training inputs."""
    force: bool = False
    """Stack on the source even if a transfer was judged to have hurt it."""
    level: float | None = None
    """Mean log-likelihood that the reweighted source must reach; None: what the effective size allows."""
    stack_layers: str | None = None
    """The blocks in which a stack's T acts, as a slice such as 0:8; None: as the config says."""
    layer: int = -1
    """Number of the block whose states the discriminator and the entropy balancing use."""
    more_shots: Sequence[int] = ()
    """Further numbers of shots, which are trained and judged but not saved."""
    config: TrainConfig = field(default_factory=TrainConfig)


def target_of(target: str | Path | Task) -> Task | Path:
    """Return a target as a task, or as the path of a table."""
    if isinstance(target, Task) or not is_table(target):
        return as_task(target)
    return Path(target)


def transfer_spec(
    source: str,
    target: str | Path | Task,
    shots: int | Sequence[int],
    settings: Mapping[str, Any],
    **options: Any,
) -> TransferSpec:
    """Return the spec of a call; `options` are further fields of it.

    Of several numbers of `shots` the first one makes the adapter; the others are only judged. Raises
    UsageError for a negative number or none.
    """
    config = transfer_config(settings)
    resolved = target_of(target)
    counts = [shots] if isinstance(shots, int) else list(shots)
    if not counts or min(counts) < 0:
        raise UsageError(f"shots={shots}: one number that is at least 0, or several")
    return TransferSpec(
        source, resolved, shots=counts[0], more_shots=counts[1:], config=config, **options
    )


def ranked_task(target: str | Path | Task) -> Task:
    """Return the task that sources are ranked for; raise UsageError for a table."""
    resolved = target_of(target)
    if isinstance(resolved, Path):
        raise UsageError(
            f"sources are ranked for a task, and {resolved} is a table: a .toml file beside it makes it one"
        )
    return resolved


def target_and_texts(spec: TransferSpec, source: Task) -> tuple[Task, list[Example] | None]:
    """Return the target, and its unlabelled texts; None if there are only its own training inputs."""
    texts: list[Example] = []
    target = spec.target
    if isinstance(target, Path):
        target, texts = table_task(target, source)
    if spec.unlabelled is not None:
        texts += input_examples(target.contract, spec.unlabelled)
    elif texts:
        texts += target.split("train")
    return target, texts if texts or spec.unlabelled is not None else None
