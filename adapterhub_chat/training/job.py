"""Jobs: what one adapter learns from, drawn from a task and turned into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded, encode_examples
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError
from adapterhub_chat.lora.weights import AdapterWeights


@dataclass(frozen=True)
class HiddenStates:
    """What a forward made of some of a job's examples."""

    examples: Sequence[Encoded]
    pooled: Tensor
    """(examples, hidden) float32: the chosen block's output, its mean over each prompt."""
    logits: Tensor
    """(examples, vocab): what is predicted right after each prompt."""


class Auxiliary(Protocol):
    """One more loss of a job, on hidden states; asked once a step."""

    @property
    def layer(self) -> int:
        """The block that it listens to."""

    @property
    def stopped(self) -> str:
        """Why the job has to end, empty while it may go on."""

    def loss(self, seen: HiddenStates) -> Tensor:
        """Return what is added to the job's loss, a scalar."""


@dataclass(frozen=True)
class Job:
    """One adapter to train: its examples, its own settings, and who else acts on its rows."""

    name: str
    train: Sequence[Encoded]
    """Empty only for an adapter that other jobs share."""
    validation: Sequence[Encoded]
    config: TrainConfig
    shared: str = ""
    """Name of the job (without examples) whose adapter acts on these rows, too, and learns from them."""
    under: AdapterWeights | None = None
    """A frozen adapter that acts on these rows, too."""
    start: AdapterWeights | None = None
    """Where it starts, with one scale for all modules; None: where the settings say."""
    auxiliary: Auxiliary | None = None
    """One more loss; it sees one process's rows, and its state is not saved."""
    labels: int = 0
    """How many labels its task has: on an encoder, its head's."""


def make_job(tokenizer: Any, name: str, task: Task, config: TrainConfig) -> Job:
    """Return the job of training adapter `name` on `task`; raise DataError when there is no data."""
    training = sample(task.split("train"), config.train_examples, config.seed)
    if not training:
        raise DataError(f"task {task.name!r} has no training examples")
    held_out = sample(task.split("validation"), config.eval_examples, 0)
    learnt, checked = (
        encode_examples(tokenizer, task.contract, examples, max_length=config.row_length)
        for examples in (training, held_out if config.eval_examples else [])
    )
    return Job(name, learnt, checked, config, labels=len(task.contract.labels))
