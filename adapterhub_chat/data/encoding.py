"""Messages to token ids: a prompt, and the continuations that a loss or a metric scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_chat.data.chat_template import encode_prompts, encode_text, turn_end
from adapterhub_chat.data.prompts import render_prompt
from adapterhub_chat.errors import UsageError
from adapterhub_chat.types import Example, Message, PromptContract

ENCODER_MARK = "{# the answer is a label's number #}"
"""First words of an encoder's chat template, which mark that answers are label numbers."""
ENCODER_TEMPLATE = (
    ENCODER_MARK + "{{ cls_token }}{% for m in messages if m['role'] != 'system' %}"
    "{% if not loop.first %}{{ sep_token }}{% endif %}{{ m['content'] }}{% endfor %}{{ sep_token }}"
)
"""Chat template of an encoder: the turns with separators between them, without the system turn."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt with one continuation (the answer, in training) or several (labels to compare)."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    weight: float = 1.0
    """Weight of the loss in training."""
    domain: int = 0
    """In an adversarial transfer: 0 for the source, 1 for the target."""

    @property
    def num_inputs(self) -> int:
        """Input tokens: all but each continuation's last token, which is only predicted."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.continuations)


def messages_of(contract: PromptContract, example: Example) -> list[Message]:
    """Return the conversation up to the assistant's turn, by the example's contract, else `contract`."""
    contract = example.contract or contract  # set in mixtures of tasks
    system = [Message("system", contract.system)] if contract.system else []
    user = Message("user", render_prompt(contract.template, example.fields))
    return [*system, *example.history, user]


def encode_answers(
    tokenizer: Any, answers: Sequence[str], *, end: bool = True
) -> list[tuple[int, ...]]:
    """Return the token ids of each answer, with the end-of-turn token unless `end` is False."""
    if not answers:
        return []
    tail = (turn_end(tokenizer),) if end else ()
    return [(*ids, *tail) for ids in encode_text(tokenizer, answers)]


def encode_examples(
    tokenizer: Any, contract: PromptContract, examples: Iterable[Example], *, max_length: int
) -> list[Encoded]:
    """Return each example with its answer (a label's words) as the one continuation, for training.

    For an encoder's tokenizer the continuation is the label's number; raises UsageError for tasks without
    labels.
    """
    example_list = list(examples)
    prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in example_list])
    if classifies(tokenizer):
        numbers = [label_numbers(e.contract or contract)[e.answer] for e in example_list]
        return [truncate(p, ((n,),), max_length) for p, n in zip(prompts, numbers, strict=True)]
    words = [(e.contract or contract).labels.get(e.answer, e.answer) for e in example_list]
    answers = encode_answers(tokenizer, words)
    return [truncate(p, (a,), max_length) for p, a in zip(prompts, answers, strict=True)]


def encode_choices(
    tokenizer: Any, contract: PromptContract, examples: Iterable[Example], *, max_length: int
) -> list[Encoded]:
    """Return each example with every label as a continuation, in the order of the label set."""
    labels = encode_labels(tokenizer, contract)
    prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in examples])
    return [truncate(p, tuple(labels), max_length) for p in prompts]


def encode_labels(tokenizer: Any, contract: PromptContract) -> list[tuple[int, ...]]:
    """Return the token ids of each label's words; for an encoder's tokenizer, each label's number.

    The end-of-turn token is added only if one label's tokens are a prefix of another's.
    """
    if classifies(tokenizer):
        return [(number,) for number in label_numbers(contract).values()]
    words = list(contract.labels.values())
    labels = encode_answers(tokenizer, words, end=False)
    if any(a != b and b[: len(a)] == a for a in labels for b in labels):
        labels = encode_answers(tokenizer, words)
    return labels


def classifies(tokenizer: Any) -> bool:
    """Return whether a tokenizer belongs to an encoder, whose answers are label numbers."""
    return str(tokenizer.chat_template or "").startswith(ENCODER_MARK)


def label_numbers(contract: PromptContract) -> dict[str, int]:
    """Return each label's row in a classification head; raise UsageError for a contract without labels."""
    if not contract.labels:
        raise UsageError(
            "an encoder chooses among labels and writes no text: give it a task with labels, or use a "
            "language model as the backbone"
        )
    return {label: number for number, label in enumerate(contract.labels)}


def unknown_token_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the share of tokens that are unknown, or only some bytes of a character."""
    ids = [
        i
        for text_ids in tokenizer(list(texts), add_special_tokens=False).input_ids
        for i in text_ids
    ]
    texts_by_id = {i: tokenizer.decode([i]) for i in set(ids)}
    partial = {
        i for i, text in texts_by_id.items() if i == tokenizer.unk_token_id or "\ufffd" in text
    }
    return sum(i in partial for i in ids) / max(1, len(ids))


def truncate(
    prompt: tuple[int, ...], continuations: tuple[tuple[int, ...], ...], max_length: int
) -> Encoded:
    """Return an Encoded of at most `max_length` inputs: answers are cut at the end, prompts in the middle."""
    max_answer = max(2, max_length // (2 * len(continuations)))
    answers = tuple(c if len(c) <= max_answer else c[:max_answer] for c in continuations)
    max_prompt = max_length - sum(len(c) - 1 for c in answers)
    if len(prompt) > max_prompt:
        head = max_prompt // 4
        prompt = prompt[:head] + prompt[len(prompt) - (max_prompt - head) :]
    return Encoded(prompt, answers)
