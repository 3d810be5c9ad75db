"""Task x adapter -> Score with a bootstrap interval; the backbone is measured on the same items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterhub_chat.batches import in_order, pack
from adapterhub_chat.generate import Request, Sampling, generate
from adapterhub_chat.losses import sum_by_owner, token_losses
from adapterhub_chat.metrics import (
    METRICS,
    Rows,
    answer_rows,
    bootstrap_interval,
    distinct_n,
    label_rows,
    likelihood_rows,
)
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.task import Task
from adapterhub_chat.template import (
    Encoded,
    encode_choices,
    encode_examples,
    encode_labels,
    encode_prompts,
    messages_of,
)
from adapterhub_chat.types import Example, Mix, PromptContract, Score

ROW_LENGTH, ROWS = 256, 8
"""Shape of a scoring batch, in tokens and rows."""
ROW_STEP = 64
"""Longer rows, for many labels, grow by so much."""
GENERATE_BATCH = 32
SAMPLES = 48
"""Answers generated to measure diversity where the metric is a likelihood."""

Progress = Callable[[int], None]


def sequence_losses(
    model: AdapterModel,
    encoded: Sequence[Encoded],
    mix: Mix,
    *,
    row_length: int = ROW_LENGTH,
    on_progress: Progress = lambda _n: None,
) -> Tensor:
    """Return -log p of every continuation given its prompt, (examples, continuations), float32."""
    width = len(encoded[0].continuations) if encoded else 0
    losses = torch.zeros(len(encoded), width)
    for rows, indices in in_order(encoded, num_rows=ROWS, length=row_length):
        batch = pack(rows, row_length)
        with torch.inference_mode(), model.mixing([mix] * batch.num_rows):
            logits = model.answer_logits(batch)
            each = token_losses(logits, batch.targets.to(logits.device)).cpu()
        summed = sum_by_owner(each, batch.owners, len(indices) * width)
        losses[indices] = summed.view(len(indices), width)
        on_progress(len(indices))
    return losses


def label_scores(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Progress = lambda _n: None,
) -> Tensor:
    """Return each label's share of the labels' likelihood, (examples, labels), rows summing to 1."""
    tokenizer = model.backbone.tokenizer
    words = encode_labels(tokenizer, contract)
    whole = 2 * len(words) * (1 + max(map(len, words)))  # at most half a row is labels, none is cut
    length = max(ROW_LENGTH, -(-whole // ROW_STEP) * ROW_STEP)
    length = min(length, model.backbone.max_length or length)
    encoded = encode_choices(tokenizer, contract, examples, max_length=length)
    losses = sequence_losses(model, encoded, mix, row_length=length, on_progress=on_progress)
    return (-losses).softmax(-1)


def answers(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mixes: Sequence[Mix],
    *,
    seed: int | None = None,
    on_progress: Progress = lambda _n: None,
) -> list[str]:
    """Return the text that each example's contract gives, row i under mix i.

    With a `seed`, what is sampled for an example depends on its place in the list alone.
    """
    prompts = encode_prompts(model.backbone.tokenizer, [messages_of(contract, e) for e in examples])
    rules = [
        sampling_of(e.contract or contract, None if seed is None else seed + i)
        for i, e in enumerate(examples)
    ]
    requests = [Request(*row) for row in zip(prompts, mixes, rules, strict=True)]
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    texts = [""] * len(requests)
    for start in range(0, len(order), GENERATE_BATCH):
        chosen = order[start : start + GENERATE_BATCH]
        for i, text in zip(chosen, generate(model, [requests[i] for i in chosen]), strict=True):
            texts[i] = text
        on_progress(len(chosen))
    return texts


def sampling_of(contract: PromptContract, seed: int | None = None) -> Sampling:
    """Return a contract's own decoding rules."""
    return Sampling(
        max_new_tokens=contract.max_new_tokens,
        temperature=contract.temperature,
        top_p=contract.top_p,
        stop=contract.stop,
        seed=seed,
        strip=True,
    )


@dataclass(frozen=True)
class Judged:
    """Per-item numbers of one adapter on one task, as its metric wants them."""

    rows: Rows
    details: Mapping[str, float] = field(default_factory=dict)


def judge(
    model: AdapterModel,
    task: Task,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Progress = lambda _n: None,
    *,
    details: bool = True,
) -> Judged:
    """Measure one mix on the given examples of a task; `details` may take as long as the rest."""
    metric, contract = METRICS[task.metric], task.contract
    if metric.kind == "label":
        guesses = _guess_labels(model, contract, examples, mix, on_progress)
        rows = label_rows([e.answer for e in examples], guesses)
        other = "macro_f1" if task.metric == "accuracy" else "accuracy"
        return Judged(rows, {other: METRICS[other].aggregate(rows)})
    if metric.kind == "answer":
        mixes = [mix] * len(examples)
        texts = answers(model, contract, examples, mixes, on_progress=on_progress)
        accepted = [e.accepted for e in examples]
        judges = {m.name: m.judge for m in METRICS.values() if m.judge is not None}
        judged = {name: answer_rows(j, texts, accepted) for name, j in judges.items()}
        others = {n: METRICS[n].aggregate(r) for n, r in judged.items() if n != task.metric}
        return Judged(judged[task.metric], others)
    encoded = encode_examples(model.backbone.tokenizer, contract, examples, max_length=ROW_LENGTH)
    losses = sequence_losses(model, encoded, mix, on_progress=on_progress).flatten().tolist()
    return Judged(
        likelihood_rows(losses, [len(e.continuations[0]) for e in encoded]),
        _diversity(model, contract, examples[:SAMPLES], mix) if details else {},
    )


def _guess_labels(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Progress,
) -> list[str]:
    """Return the likeliest label of each example, out of its own contract's labels."""
    guesses = [""] * len(examples)
    alike: defaultdict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        alike[tuple((example.contract or contract).labels.items())].append(i)
    for labels, chosen in alike.items():
        own = replace(contract, labels=dict(labels))
        shares = label_scores(model, own, [examples[i] for i in chosen], mix, on_progress)
        for i, best in zip(chosen, shares.argmax(-1).tolist(), strict=True):
            guesses[i] = labels[best][0]
    return guesses


def _diversity(
    model: AdapterModel, contract: PromptContract, examples: Sequence[Example], mix: Mix
) -> dict[str, float]:
    texts = answers(model, contract, examples, [mix] * len(examples), seed=0)
    return {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}


def score(
    adapter: str, task: Task, judged: Judged, backbone: Judged | None, *, seed: int = 0
) -> Score:
    """Return the metric with its 95 % interval, beside the backbone's value on the same items."""
    metric = METRICS[task.metric]
    low, high = bootstrap_interval(judged.rows, metric.statistic, seed=seed)
    beside = None if backbone is None else metric.aggregate(backbone.rows)
    return Score(
        adapter=adapter,
        task=task.name,
        metric=task.metric,
        value=metric.aggregate(judged.rows),
        low=low,
        high=high,
        n=len(judged.rows),
        backbone_value=beside,
        details=judged.details,
    )


def evaluate(
    model: AdapterModel,
    adapters: Sequence[tuple[str, Mix]],
    tasks: Sequence[tuple[Task, Sequence[Example]]],
    *,
    on_progress: Callable[[str, int], None] = lambda _what, _n: None,
) -> list[Score]:
    """Return a Score for every adapter on every task's examples; the backbone is measured once a task."""
    scores = []
    for task, examples in tasks:

        def told(n: int, name: str = task.name) -> None:
            on_progress(name, n)

        backbone = judge(model, task, examples, Mix(), told)
        for name, mix in adapters:
            judged = backbone if mix == Mix() else judge(model, task, examples, mix, told)
            found = score(name, task, judged, backbone)
            scores.append(replace(found, precision=model.backbone.precision))
    return scores
