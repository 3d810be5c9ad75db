"""Retention: the share of a source adapter's score that a derived adapter keeps, on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from torch import Tensor

from adapterhub_chat.data.encoding import Encoded, encode_examples
from adapterhub_chat.data.metrics import METRICS, Metric, Rows, mean_loss, paired_difference
from adapterhub_chat.data.packing import in_order, pack
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.inference.likelihood import (
    ROW_LENGTH,
    ROWS,
    next_token_logits,
    token_loss_sums,
)
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Example, Mix, Retention, Split, as_mix


@dataclass(frozen=True)
class SourceResult:
    """A source's results on some items of its task, the reference for a derived adapter."""

    adapter: str
    task: Task
    examples: Sequence[Example]
    rows: Rows


def source_results(
    model: AdapterModel,
    tasks: Mapping[str, Sequence[Task]],
    split: Split,
    limit: int,
    on_progress: Callable[[str, int], None],
) -> list[SourceResult]:
    """Measure each source alone on at most `limit` items of its tasks (0: all); empty splits are left out."""
    results = []
    for adapter, source_tasks in tasks.items():
        for task in source_tasks:
            if examples := sample(task.split(split), limit):
                rows = _judged_rows(model, task, examples, as_mix(adapter), on_progress)
                results.append(SourceResult(adapter, task, examples, rows))
    return results


def retentions(
    model: AdapterModel,
    singles: Sequence[SourceResult],
    mix: Mix,
    on_progress: Callable[[str, int], None],
) -> list[Retention]:
    """Return the retention of every source under a mix (of one merged adapter, or of all sources)."""
    return [
        retention(single, _judged_rows(model, single.task, single.examples, mix, on_progress))
        for single in singles
    ]


def retention(single: SourceResult, merged: Rows) -> Retention:
    """Return how much of a source's score is kept by another adapter's rows of the same items."""
    metric = METRICS[single.task.metric]
    value, low, high = kept_fraction(metric, single.rows, merged)
    return Retention(
        adapter=single.adapter,
        task=single.task.name,
        metric=metric.name,
        single=metric.aggregate(single.rows),
        merged=metric.aggregate(merged),
        value=value,
        low=low,
        high=high,
        n=len(merged),
    )


def kept_fraction(metric: Metric, single: Rows, merged: Rows) -> tuple[float, float, float]:
    """Return merged / single with its 95 % interval; for a perplexity single / merged.

    The difference is bootstrapped over paired items, and divided by the source's score.
    """
    single_value, merged_value = metric.aggregate(single), metric.aggregate(merged)
    if math.isfinite(single_value) and not math.isfinite(merged_value):
        return 0.0, 0.0, 0.0  # overflowing numbers keep nothing
    if metric.kind == "likelihood":
        increase, low, high = paired_difference(merged, single, mean_loss)
        return math.exp(-increase), math.exp(-high), math.exp(-low)
    if single_value == 0:
        return 1.0, 1.0, 1.0
    gain, low, high = paired_difference(merged, single, metric.statistic)
    return 1 + gain / single_value, max(1 + low / single_value, 0.0), 1 + high / single_value


def mean_and_lowest(results: Sequence[Retention]) -> tuple[float, float]:
    """Return the mean and the lowest retention."""
    values = [result.value for result in results]
    return fmean(values), min(values)


@dataclass(frozen=True)
class ValidationItems:
    """Validation items of a source's task as token ids, and the source's mean loss per token (nats)."""

    encoded: Sequence[Encoded]
    loss: float


def validation_items(
    model: AdapterModel, tasks: Mapping[str, Sequence[Task]], limit: int
) -> list[ValidationItems]:
    """Return at most `limit` validation items of every task, with the source's loss on them."""
    items = []
    for adapter, source_tasks in tasks.items():
        for task in source_tasks:
            examples = sample(task.split("validation"), limit)
            encoded = encode_examples(
                model.backbone.tokenizer, task.contract, examples, max_length=ROW_LENGTH
            )
            if encoded:
                loss = _mean_loss(model, encoded, as_mix(adapter))
                items.append(ValidationItems(encoded, loss))
    return items


def excess_loss(model: AdapterModel, items: Sequence[ValidationItems], mix: Mix) -> float:
    """Return the loss per token (nats) of a mix above that of the sources, the mean over tasks."""
    return fmean(_mean_loss(model, task.encoded, mix) - task.loss for task in items)


def drift(
    model: AdapterModel, prompts: Sequence[tuple[int, ...]], source: Mix, derived: Mix
) -> float:
    """Return the mean KL (nats) of the source's next token from the derived one's, over token-id prompts."""
    requests = [Request(prompt, mix) for mix in (source, derived) for prompt in prompts]
    source_logits, derived_logits = next_token_logits(model, requests).split(len(prompts))
    return mean_kl(source_logits, derived_logits)


def mean_kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """Return the mean KL(p || q) (nats) of next tokens, from logits (prompts, vocab)."""
    p, q = (logits.double().log_softmax(-1) for logits in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _mean_loss(model: AdapterModel, encoded: Sequence[Encoded], mix: Mix) -> float:
    """Return the mean loss per answer token (nats)."""
    batches = (
        pack(rows, ROW_LENGTH) for rows, _ in in_order(encoded, num_rows=ROWS, length=ROW_LENGTH)
    )
    sums = token_loss_sums(model, batches, lambda num_rows: model.mixing([mix] * num_rows))
    return float(sums[0] / sums[1])


def _judged_rows(
    model: AdapterModel,
    task: Task,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Callable[[str, int], None],
) -> Rows:
    on_judged = partial(on_progress, task.name)
    return judge(model, task, examples, mix, on_judged, details=False).rows
