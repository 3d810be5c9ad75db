"""Scores of adapters on tasks with bootstrap intervals, beside the backbone's on the same items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.data.metrics import (
    METRICS,
    Rows,
    answer_rows,
    bootstrap_interval,
    distinct_n,
    label_rows,
    likelihood_rows,
)
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.inference.generate import answers
from adapterhub_chat.inference.likelihood import ROW_LENGTH, Progress, label_scores, sequence_losses
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Example, Mix, PromptContract, Score

NUM_DIVERSITY_SAMPLES = 48
"""Answers generated to measure diversity where the metric is a likelihood."""


@dataclass(frozen=True)
class Judged:
    """Per-item numbers of one adapter on one task, in the form that its metric takes."""

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
    """Measure one mix on examples of a task; `details` of a likelihood task take as long as the rest."""
    metric, contract = METRICS[task.metric], task.contract
    if metric.kind == "label":
        guesses = _guess_labels(model, contract, examples, mix, on_progress)
        rows = label_rows([e.answer for e in examples], guesses)
        second = "macro_f1" if task.metric == "accuracy" else "accuracy"
        return Judged(rows, {second: METRICS[second].aggregate(rows)})
    if metric.kind == "answer":
        mixes = [mix] * len(examples)
        texts = answers(model, contract, examples, mixes, on_progress=on_progress)
        accepted = [e.accepted for e in examples]
        judges = {m.name: m.judge for m in METRICS.values() if m.judge is not None}
        by_metric = {name: answer_rows(j, texts, accepted) for name, j in judges.items()}
        others = {n: METRICS[n].aggregate(r) for n, r in by_metric.items() if n != task.metric}
        return Judged(by_metric[task.metric], others)
    encoded = encode_examples(model.backbone.tokenizer, contract, examples, max_length=ROW_LENGTH)
    losses = sequence_losses(model, encoded, mix, on_progress=on_progress).flatten().tolist()
    return Judged(
        likelihood_rows(losses, [len(e.continuations[0]) for e in encoded]),
        _diversity(model, contract, examples[:NUM_DIVERSITY_SAMPLES], mix) if details else {},
    )


def _guess_labels(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Progress,
) -> list[str]:
    """Return the most likely label of each example, out of the labels of its contract."""
    guesses = [""] * len(examples)
    by_labels: defaultdict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        by_labels[tuple((example.contract or contract).labels.items())].append(i)
    for labels, indices in by_labels.items():
        labelled = replace(contract, labels=dict(labels))
        shares = label_scores(model, labelled, [examples[i] for i in indices], mix, on_progress)
        for i, best in zip(indices, shares.argmax(-1).tolist(), strict=True):
            guesses[i] = labels[best][0]
    return guesses


def _diversity(
    model: AdapterModel, contract: PromptContract, examples: Sequence[Example], mix: Mix
) -> dict[str, float]:
    texts = answers(model, contract, examples, [mix] * len(examples), seed=0)
    return {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}


def score(adapter: str, task: Task, judged: Judged, backbone: Judged | None) -> Score:
    """Return the metric with its 95 % interval, beside the backbone's value on the same items."""
    metric = METRICS[task.metric]
    low, high = bootstrap_interval(judged.rows, metric.statistic)
    return Score(
        adapter=adapter,
        task=task.name,
        metric=task.metric,
        value=metric.aggregate(judged.rows),
        low=low,
        high=high,
        n=len(judged.rows),
        backbone_value=None if backbone is None else metric.aggregate(backbone.rows),
        details=judged.details,
    )


def evaluate(
    model: AdapterModel,
    adapters: Sequence[tuple[str, Mix]],
    tasks: Sequence[tuple[Task, Sequence[Example]]],
    *,
    on_progress: Callable[[str, int], None] = lambda _task, _n: None,
) -> list[Score]:
    """Return a Score for every adapter on every task's examples; the backbone is measured once a task."""
    scores = []
    for task, examples in tasks:
        on_judged = partial(on_progress, task.name)
        backbone = judge(model, task, examples, Mix(), on_judged)
        for name, mix in adapters:
            judged = backbone if mix == Mix() else judge(model, task, examples, mix, on_judged)
            result = score(name, task, judged, backbone)
            scores.append(replace(result, precision=model.backbone.precision))
    return scores


def judge_task(
    model: AdapterModel,
    task: Task,
    adapters: Sequence[tuple[str, Mix]],
    limit: int,
    listeners: Listeners = SILENT,
) -> list[Score]:
    """Score adapters on (at most `limit` of) a task's test split; raise DataError when it is empty."""
    examples = sample(task.split("test"), limit)
    if not examples:
        raise DataError(f"task {task.name!r} has no test examples")
    return evaluate(model, adapters, [(task, examples)], on_progress=listeners.on_judged)
