"""What a transfer is asked to do, checked at the door."""

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

BUDGET: Mapping[str, Any] = {
    "max_steps": 60,
    "epochs": 1000.0,
    "train_examples": 400,
    "eval_examples": 200,
    "patience": 0,
}
"""Settings of every method where none are given: so many steps, and as much to judge by."""


def transfer_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the budget of every method: BUDGET under the given fields of TrainConfig."""
    return read_settings(TrainConfig, {**BUDGET, **settings}, "the transfer")


@dataclass(frozen=True)
class TransferSpec:
    """What is asked for."""

    source: str
    target: Task | Path
    """A path is that of a table, asked as the source's task is."""
    method: str = "auto"
    name: str | None = None
    shots: int = 16
    source_task: Task | None = None
    unlabelled: Sequence[Mapping[str, str] | str] | None = None
    """Texts of the target, or its fields; None: the target's own training inputs."""
    force: bool = False
    """Stack on a source that hurts all the same."""
    level: float | None = None
    """Mean log-likelihood that the reweighted source shall reach; None: as the effective size allows."""
    stack_layers: str | None = None
    """The blocks in which a stack's T acts, as a slice such as 0:8; None: as the config says."""
    layer: int = -1
    """The block whose states the discriminator and the entropy balancing look at."""
    also: Sequence[int] = ()
    """Other numbers of shots that are tried and judged, and not kept."""
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
    """Return the order that a caller's words mean; `options` are further fields of it.

    Of several numbers of `shots` the first makes the adapter; the others are tried, too.
    """
    config = transfer_config(settings)
    goal = target_of(target)
    counts = [shots] if isinstance(shots, int) else list(shots)
    if not counts or min(counts) < 0:
        raise UsageError(f"shots={shots}: one number that is at least 0, or several")
    return TransferSpec(source, goal, shots=counts[0], also=counts[1:], config=config, **options)


def ranked_task(target: str | Path | Task) -> Task:
    """Return the task that sources are ranked for; raise UsageError for a table."""
    goal = target_of(target)
    if isinstance(goal, Path):
        raise UsageError(
            f"sources are ranked for a task, and {goal} is a table: a .toml file beside it makes it one"
        )
    return goal


def _target(order: TransferSpec, source: Task) -> tuple[Task, list[Example] | None]:
    """Return the target, and its texts without labels where there are some beside its own inputs."""
    texts: list[Example] = []
    target = order.target
    if isinstance(target, Path):
        target, texts = table_task(target, source)
    if order.unlabelled is not None:
        texts += input_examples(target.contract, order.unlabelled)
    elif texts:
        texts += target.split("train")
    return target, texts if texts or order.unlabelled is not None else None
