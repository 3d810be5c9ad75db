"""Retention: what is left of a source adapter in whatever was made of it, measured on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from torch import Tensor

from adapterhub_chat.data.encoding import Encoded, encode_examples
from adapterhub_chat.data.metrics import METRICS, Metric, Rows, mean_loss, paired_difference
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.inference.likelihood import ROW_LENGTH, next_token_logits, sequence_losses
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Example, Mix, Retention, Split, as_mix


@dataclass(frozen=True)
class SourceResult:
    """A source's own results on some items of its task: what a merge is held against."""

    adapter: str
    task: Task
    examples: Sequence[Example]
    rows: Rows


def source_results(
    model: AdapterModel,
    tasks: Mapping[str, Sequence[Task]],
    split: Split,
    limit: int,
    told: Callable[[str, int], None],
) -> list[SourceResult]:
    """Judge each source by itself on at most `limit` items of its tasks (0: all); empty splits drop out."""
    found = []
    for adapter, own in tasks.items():
        for task in own:
            if examples := sample(task.split(split), limit):
                rows = _rows(model, task, examples, as_mix(adapter), told)
                found.append(SourceResult(adapter, task, examples, rows))
    return found


def retentions(
    model: AdapterModel,
    sticks: Sequence[SourceResult],
    mix: Mix,
    told: Callable[[str, int], None],
) -> list[Retention]:
    """Return what a mix (of one merged adapter, or of all sources) keeps of every source."""
    return [
        retention(stick, _rows(model, stick.task, stick.examples, mix, told)) for stick in sticks
    ]


def retention(stick: SourceResult, merged: Rows) -> Retention:
    """Return how much of a source's score is kept by other rows of the same items."""
    metric = METRICS[stick.task.metric]
    value, low, high = kept_share(metric, stick.rows, merged)
    return Retention(
        adapter=stick.adapter,
        task=stick.task.name,
        metric=metric.name,
        single=metric.aggregate(stick.rows),
        merged=metric.aggregate(merged),
        value=value,
        low=low,
        high=high,
        n=len(merged),
    )


def kept_share(metric: Metric, single: Rows, merged: Rows) -> tuple[float, float, float]:
    """Return merged / single with its 95 % interval; for a perplexity single / merged.

    The difference is bootstrapped over paired items, and set against the source's own score.
    """
    whole, left = metric.aggregate(single), metric.aggregate(merged)
    if math.isfinite(whole) and not math.isfinite(left):
        return 0.0, 0.0, 0.0  # numbers that went out of bounds answer nothing
    if metric.kind == "likelihood":
        worse, low, high = paired_difference(merged, single, mean_loss)
        return math.exp(-worse), math.exp(-high), math.exp(-low)
    if whole == 0:
        return 1.0, 1.0, 1.0
    gain, low, high = paired_difference(merged, single, metric.statistic)
    return 1 + gain / whole, max(1 + low / whole, 0.0), 1 + high / whole


def mean_and_lowest(found: Sequence[Retention]) -> tuple[float, float]:
    """Return the mean retention, and that of the task that suffers most."""
    values = [one.value for one in found]
    return fmean(values), min(values)


@dataclass(frozen=True)
class ValidationItems:
    """A source's validation items as token ids, and its own mean loss of a token on them."""

    encoded: Sequence[Encoded]
    loss: float


def validation_items(
    model: AdapterModel, tasks: Mapping[str, Sequence[Task]], limit: int
) -> list[ValidationItems]:
    """Return at most `limit` validation items of every task, with its source's loss on them."""
    found = []
    for adapter, own in tasks.items():
        for task in own:
            examples = sample(task.split("validation"), limit)
            encoded = encode_examples(
                model.backbone.tokenizer, task.contract, examples, max_length=ROW_LENGTH
            )
            if encoded:
                found.append(ValidationItems(encoded, _loss(model, encoded, as_mix(adapter))))
    return found


def excess_loss(model: AdapterModel, learnt: Sequence[ValidationItems], mix: Mix) -> float:
    """Return by how much a mix's loss of a token is above the sources' own (nats), the mean over tasks."""
    return fmean(_loss(model, one.encoded, mix) - one.loss for one in learnt)


def drift(
    model: AdapterModel, prompts: Sequence[tuple[int, ...]], source: Mix, other: Mix
) -> float:
    """Return the mean KL (nats) of the source's next token to the other's, over prompts of token ids."""
    requests = [Request(prompt, mix) for mix in (source, other) for prompt in prompts]
    own, its = next_token_logits(model, requests).split(len(prompts))
    return divergence(own, its)


def divergence(own: Tensor, its: Tensor) -> float:
    """Return the mean KL (nats) of next tokens, by logits (prompts, vocab) of both sides."""
    p, q = (logits.double().log_softmax(-1) for logits in (own, its))
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _loss(model: AdapterModel, encoded: Sequence[Encoded], mix: Mix) -> float:
    count = sum(len(e.continuations[0]) for e in encoded)
    return float(sequence_losses(model, encoded, mix).double().sum()) / count


def _rows(
    model: AdapterModel,
    task: Task,
    examples: Sequence[Example],
    mix: Mix,
    told: Callable[[str, int], None],
) -> Rows:
    return judge(model, task, examples, mix, partial(told, task.name), details=False).rows
