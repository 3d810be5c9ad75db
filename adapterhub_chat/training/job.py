"""Job: the encoded examples and settings of one adapter to train."""

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
    """Pooled hidden states and logits of some of a job's examples."""

    examples: Sequence[Encoded]
    pooled: Tensor
    """(examples, hidden) float32: the mean of the chosen block's output over each prompt's tokens."""
    logits: Tensor
    """(examples, vocab): logits of the token after each prompt."""


class Auxiliary(Protocol):
    """A further loss of a job, on hidden states; computed once a step."""

    @property
    def layer(self) -> int:
        """Number of the block whose output the loss uses."""

    @property
    def stopped(self) -> str:
        """Why the job has to stop; empty while it may go on."""

    def loss(self, states: HiddenStates) -> Tensor:
        """Return the scalar to add to the job's loss."""


@dataclass(frozen=True)
class Job:
    """One adapter to train: its examples, its settings, and the other adapters that act on its rows."""

    name: str
    train: Sequence[Encoded]
    """Empty only for an adapter that other jobs share."""
    validation: Sequence[Encoded]
    config: TrainConfig
    shared: str = ""
    """Name of the job (without examples) whose adapter also acts on these rows and learns from them."""
    frozen: AdapterWeights | None = None
    """A frozen adapter that also acts on these rows."""
    start: AdapterWeights | None = None
    """Initial weights, with one scale for all modules; None: initialised by `config`."""
    auxiliary: Auxiliary | None = None
    """A further loss. It gets the rows of one process, and its state is not saved."""
    labels: int = 0
    """Number of the task's labels; on an encoder, the size of the head."""


def make_job(tokenizer: Any, name: str, task: Task, config: TrainConfig) -> Job:
    """Return the job of training adapter `name` on `task`; raise DataError without training examples."""
    training = sample(task.split("train"), config.train_examples, config.seed)
    if not training:
        raise DataError(f"task {task.name!r} has no training examples")
    validation = sample(task.split("validation"), config.eval_examples, 0)
    encoded_training, encoded_validation = (
        encode_examples(tokenizer, task.contract, examples, max_length=config.row_length)
        for examples in (training, validation if config.eval_examples else [])
    )
    labels = len(task.contract.labels)
    return Job(name, encoded_training, encoded_validation, config, labels=labels)
