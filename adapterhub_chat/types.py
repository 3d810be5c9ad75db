"""Value types shared by all modules: small, frozen, independent of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from adapterhub_chat.errors import UsageError

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

BACKBONE = "backbone"
"""Reserved adapter name: no adapter at all."""
AUTO = "auto"
"""Reserved adapter name: the router chooses by the message."""
HEAD = "classifier"
"""The name, in PEFT and transformers, of the module that computes label logits from an encoder's features."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class PromptContract:
    """How a task prompts the model; stored in the manifest and applied to each row of a mixed batch."""

    template: str = "{text}"
    """The user's turn; `{name}` stands for a field of the example."""
    system: str = ""
    """The system turn."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label -> the words the model says for it; empty for free text."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer (besides the end-of-turn token)."""
    max_new_tokens: int = 64
    """Maximum tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus kept when sampling."""


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a task: fields for the template, earlier turns, and the accepted answers."""

    fields: Mapping[str, str]
    answer: str
    """The text (or, in a label task, the label) that training teaches."""
    references: tuple[str, ...] = ()
    """All accepted answers; the metric takes the best. Empty: `(answer,)`."""
    history: tuple[Message, ...] = ()
    """Turns before the last user turn."""
    group: str = ""
    """Examples of one group (for example a conversation) stay in one split. Empty: no group."""
    contract: PromptContract | None = None
    """The contract of this example in a mixture of tasks. None: the task's."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """All accepted answers."""
        return self.references or (self.answer,)


@dataclass(frozen=True, slots=True)
class Score:
    """A measured metric with its 95 % bootstrap interval, and the backbone's value on the same items."""

    adapter: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    backbone_value: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    precision: str = ""
    """Of the backbone during the measurement: `bfloat16`, `nf4`, ..."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Share of a source's score on its task that a derived adapter keeps, on the same items."""

    adapter: str
    """The source."""
    task: str
    metric: str
    single: float
    """The source's score."""
    merged: float
    value: float
    """merged / single; single / merged for metrics where lower is better; 1 for a source with score 0."""
    low: float
    high: float
    """The 95 % interval, by paired bootstrap."""
    n: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Weights over adapters for one row: a row of M, by name. Empty: the bare backbone."""

    weights: tuple[tuple[str, float], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that have a weight."""
        return tuple(name for name, _ in self.weights)

    def __str__(self) -> str:
        """Return `qa`, `qa=0.5 generation=0.5` or `backbone`."""
        if not self.weights:
            return BACKBONE
        if len(self.weights) == 1 and self.weights[0][1] == 1.0:
            return self.weights[0][0]
        return " ".join(f"{name}={weight:g}" for name, weight in self.weights)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a backbone: short hashes of its parts, and its precision."""

    architecture: str
    config: str
    tokenizer: str
    template: str
    weights: str
    quantization: str = "none"
    dtype: str = "float32"

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Return the fields, except the precision, in which `other` differs."""
        fields = ("architecture", "config", "tokenizer", "template", "weights")
        return tuple(f for f in fields if getattr(self, f) != getattr(other, f))


NO_ADAPTER = Mix()
"""The mix of a row without an adapter."""

Turn = Message | Mapping[str, str]
"""A message as callers may write it: a Message, or {"role": ..., "content": ...}."""


def as_message(turn: Turn) -> Message:
    """Return `turn` as a Message; raise UsageError for an unknown role or a missing text."""
    if isinstance(turn, Message):
        return turn
    role, content = turn.get("role"), turn.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UsageError(
            f"message {dict(turn)!r} needs a role (system, user or assistant) and a text content"
        )
    return Message(role, content)  # type: ignore[arg-type]


AdapterChoice = str | Mapping[str, float] | Mix | None
"""A row's adapter as callers may write it: a name, weights by name, a Mix, or None for the backbone."""


def as_mix(choice: AdapterChoice) -> Mix:
    """Return `choice` as a Mix, without zero weights."""
    if isinstance(choice, Mix):
        return choice
    if choice is None or choice == BACKBONE:
        return Mix()
    if isinstance(choice, str):
        return Mix(((choice, 1.0),))
    return Mix(tuple((n, float(w)) for n, w in choice.items() if w != 0 and n != BACKBONE))
