"""The gate: whether a candidate improves on the baseline, and which candidate is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterhub_chat.data.metrics import METRICS, Rows, paired_difference
from adapterhub_chat.errors import DataError

MIN_ITEMS = 5
"""Smallest number of items for a verdict: a bootstrap interval of one or two has hardly any width."""
VerdictWord = Literal["helps", "neutral", "hurts"]


@dataclass(frozen=True)
class TransferVerdict:
    """The gain of a candidate over the baseline on the same items; positive is better whatever the metric."""

    word: VerdictWord
    gain: float
    low: float
    high: float


def verdict(metric: str, candidate: Rows, baseline: Rows) -> TransferVerdict:
    """Return the verdict on a candidate, with the paired 95 % bootstrap interval of its gain.

    `helps`: the whole interval is above zero; `hurts`: it is below; else, or with fewer than MIN_ITEMS items,
    `neutral`. Raises DataError without items.
    """
    if not len(candidate):
        raise DataError("the gate has no target items with labels to judge by")
    definition = METRICS[metric]
    first, second = (candidate, baseline) if definition.higher_is_better else (baseline, candidate)
    gain, low, high = paired_difference(first, second, definition.statistic)
    word: VerdictWord = "helps" if low > 0 else "hurts" if high < 0 else "neutral"
    word = word if len(candidate) >= MIN_ITEMS else "neutral"
    return TransferVerdict(word, gain, low, high)


def best(verdicts: Mapping[str, TransferVerdict], baseline: str) -> str:
    """Return the candidate with the best lower bound among those that help, else the baseline."""
    helping = {name: v for name, v in verdicts.items() if v.word == "helps" and name != baseline}
    return max(helping, key=lambda name: helping[name].low) if helping else baseline


def stratified(labels: Sequence[str], count: int, order: Sequence[int]) -> list[int]:
    """Return the indices of `count` items: the labels in turn, the items of a label in the given order."""
    by_label: dict[str, list[int]] = {}
    for index in order:
        by_label.setdefault(labels[index], []).append(index)
    chosen: list[int] = []
    while len(chosen) < count and any(by_label.values()):
        for indices in by_label.values():
            if indices and len(chosen) < count:
                chosen.append(indices.pop(0))
    return sorted(chosen)
