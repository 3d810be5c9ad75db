"""What is asked under a prompt contract, for many rows at once: inputs of a task, turns of conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterhub_chat.data.encoding import encode_prompts
from adapterhub_chat.data.inputs import conversation, input_examples
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.generate import answers, sampling_of
from adapterhub_chat.inference.likelihood import label_scores, next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Mix, PromptContract, Turn


@dataclass(frozen=True)
class Prediction:
    """One answer by a task's prompt contract; `label` and `scores` only where the task has labels."""

    output: str
    adapter: str
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def predictions(
    model: AdapterModel,
    contract: PromptContract,
    mix: Mix,
    inputs: Sequence[str | Mapping[str, str]],
    told: Callable[[int], None] = lambda _n: None,
) -> list[Prediction]:
    """Return one answer an input: the likeliest label where the contract has labels, else what is generated.

    `told(n)` hears of every n that are done. Raises one DataError for all inputs that do not fit.
    """
    examples = input_examples(contract, inputs)
    if not contract.labels:
        mixes = [mix] * len(examples)
        texts = answers(model, contract, examples, mixes, on_progress=told)
        return [Prediction(text, str(mix)) for text in texts]
    labels = list(contract.labels)
    found = []
    for row in label_scores(model, contract, examples, mix, told).tolist():
        label = labels[max(range(len(row)), key=row.__getitem__)]
        scores = dict(zip(labels, row, strict=True))
        found.append(Prediction(contract.labels[label], str(mix), label, scores))
    return found


def check_labels(model: AdapterModel, own: PromptContract | None, asked: PromptContract) -> None:
    """Raise UsageError when an encoder's adapter is asked for other labels than its head's, in its order."""
    if not model.backbone.encodes or own is None or list(own.labels) == list(asked.labels):
        return
    raise UsageError(
        f"the adapter's head knows the labels {', '.join(own.labels)}, in this order; the task asks for "
        f"{', '.join(asked.labels) or 'free answers'}: train an adapter for it, or give its labels that order"
    )


def checked_contract(
    model: AdapterModel, mix: Mix, own: PromptContract | None, asked: PromptContract | None
) -> PromptContract:
    """Return the contract that a mix is asked by; raise UsageError where there is none or it does not fit."""
    if asked is None:
        raise UsageError(
            f"adapter {str(mix)!r} has no prompt contract; name a task: predict(..., task='qa')"
        )
    check_labels(model, own, asked)
    return asked


def choices(
    model: AdapterModel,
    requests: Sequence[Request],
    contracts: Sequence[PromptContract | None],
    on_text: Callable[[int, str], None],
) -> list[str]:
    """Return what an encoder's adapters answer to requests in one batch: the words of the likeliest label.

    Raises UsageError naming the rows whose mix has no adapter, or one without labels, to choose by.
    """
    words = [list(contract.labels.values()) if contract else [] for contract in contracts]
    if silent := [f"{i} ({requests[i].mix})" for i, own in enumerate(words) if not own]:
        raise UsageError(
            f"an encoder answers by an adapter with labels, and row {', '.join(silent)} has none"
        )
    logits = next_token_logits(model, requests)
    texts = [own[int(row[: len(own)].argmax())] for own, row in zip(words, logits, strict=True)]
    for row, said in enumerate(texts):
        on_text(row, said)
    return texts


def replies(
    model: AdapterModel,
    conversations: Sequence[Sequence[Turn]],
    mixes: Sequence[Mix],
    contracts: Sequence[PromptContract | None],
    seed: int | None,
    changes: Mapping[str, Any],
) -> list[Request]:
    """Return the requests for the next turn of every conversation, each under its own contract.

    `changes` are fields of Sampling that replace the contract's where they are not None. Raises
    UsageError for what is no turn.
    """
    turns = [conversation(*row) for row in zip(conversations, contracts, strict=True)]
    prompts = encode_prompts(model.backbone.tokenizer, turns)
    rules = [sampling_of(c or PromptContract(), seed) for c in contracts]
    rows = zip(prompts, mixes, rules, strict=True)
    given = {name: value for name, value in changes.items() if value is not None}
    return [Request(prompt, mix, replace(rule, **given)) for prompt, mix, rule in rows]
