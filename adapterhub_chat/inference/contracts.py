"""Predictions and replies under prompt contracts, for many rows at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.inputs import conversation, input_examples
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.generate import answers, sampling_of
from adapterhub_chat.inference.likelihood import label_scores, next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Mix, PromptContract, Turn


@dataclass(frozen=True)
class Prediction:
    """One answer under a task's prompt contract; `label` and `scores` only where the contract has labels."""

    output: str
    adapter: str
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def predictions(
    model: AdapterModel,
    contract: PromptContract,
    mix: Mix,
    inputs: Sequence[str | Mapping[str, str]],
    on_progress: Callable[[int], None] = lambda _n: None,
) -> list[Prediction]:
    """Return one answer an input: the likeliest label where the contract has labels, else generated text.

    `on_progress(n)` is called when n more are done. Raises one DataError for all inputs that do not fit.
    """
    examples = input_examples(contract, inputs)
    if not contract.labels:
        mixes = [mix] * len(examples)
        texts = answers(model, contract, examples, mixes, on_progress=on_progress)
        return [Prediction(text, str(mix)) for text in texts]
    labels = list(contract.labels)
    answered = []
    for row in label_scores(model, contract, examples, mix, on_progress).tolist():
        label = labels[max(range(len(row)), key=row.__getitem__)]
        scores = dict(zip(labels, row, strict=True))
        answered.append(Prediction(contract.labels[label], str(mix), label, scores))
    return answered


def check_labels(
    model: AdapterModel, trained: PromptContract | None, asked: PromptContract
) -> None:
    """Raise UsageError if the labels asked for are not those of an encoder adapter's head, in its order.

    `trained` is the contract that the adapter was trained on.
    """
    if not model.backbone.encodes or trained is None:
        return
    if list(trained.labels) == list(asked.labels):
        return
    raise UsageError(
        f"the adapter's head knows the labels {', '.join(trained.labels)}, in this order; the task asks for "
        f"{', '.join(asked.labels) or 'free answers'}: train an adapter for it, or give its labels that order"
    )


def checked_contract(
    model: AdapterModel, mix: Mix, trained: PromptContract | None, asked: PromptContract | None
) -> PromptContract:
    """Return the contract `asked`; raise UsageError if it is None or does not fit the mix's adapter."""
    if asked is None:
        raise UsageError(
            f"adapter {str(mix)!r} has no prompt contract; name a task: predict(..., task='qa')"
        )
    check_labels(model, trained, asked)
    return asked


def choices(
    model: AdapterModel,
    requests: Sequence[Request],
    contracts: Sequence[PromptContract | None],
    on_text: Callable[[int, str], None],
) -> list[str]:
    """Return the answer of an encoder's adapters to each request: the words of the likeliest label.

    `on_text(row, words)` is called for each. Raises UsageError naming the rows whose contract is None or
    has no labels.
    """
    words = [list(contract.labels.values()) if contract else [] for contract in contracts]
    if unlabelled := [f"{i} ({requests[i].mix})" for i, row in enumerate(words) if not row]:
        raise UsageError(
            f"an encoder answers by an adapter with labels, and row {', '.join(unlabelled)} has none"
        )
    logits = next_token_logits(model, requests)
    rows = zip(words, logits, strict=True)
    texts = [labels[int(row[: len(labels)].argmax())] for labels, row in rows]
    for n, text in enumerate(texts):
        on_text(n, text)
    return texts


def replies(
    model: AdapterModel,
    conversations: Sequence[Sequence[Turn]],
    mixes: Sequence[Mix],
    contracts: Sequence[PromptContract | None],
    seed: int | None,
    changes: Mapping[str, Any],
) -> list[Request]:
    """Return the requests for the next turn of every conversation, each under its contract.

    `changes` are fields of Sampling; those that are not None replace the contract's. Raises UsageError
    for an invalid turn.
    """
    turns = [conversation(*row) for row in zip(conversations, contracts, strict=True)]
    prompts = encode_prompts(model.backbone.tokenizer, turns)
    samplings = [sampling_of(c or PromptContract(), seed) for c in contracts]
    rows = zip(prompts, mixes, samplings, strict=True)
    changed = {name: value for name, value in changes.items() if value is not None}
    return [Request(prompt, mix, replace(s, **changed)) for prompt, mix, s in rows]
