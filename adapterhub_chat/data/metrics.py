"""Metrics as pure functions of texts and likelihoods, with bootstrap intervals.

An entry of METRICS has a kind, which tells the evaluator how to obtain answers, and a statistic over rows of
per-item numbers. `label_rows`, `answer_rows` and `likelihood_rows` make those rows; the reported value and
its bootstrap interval are the same statistic of the same rows.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adapterhub_chat.errors import DataError

Rows = npt.NDArray[np.float64]
"""(..., items, columns): the columns depend on the metric's kind."""
Statistic = Callable[[Rows], Any]
"""(..., items, columns) -> (...): one number for each resample."""
MetricFunction = Callable[[str, Sequence[str]], float]
"""(guess, accepted answers) -> a value from 0 to 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_MAX_CHUNK_NUMBERS = 4_000_000


def normalize_answer(text: str) -> str:
    """Return `text` normalised as in SQuAD: without case, punctuation, articles and extra white space.

    A text of nothing else ("@", "The The") is only case-folded, so that an empty guess does not match it.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = (
        c for c in folded if c not in string.punctuation and unicodedata.category(c)[0] != "P"
    )
    without_articles = _ARTICLES.sub(" ", "".join(letters))
    return " ".join((without_articles if without_articles.strip() else folded).split())


def answer_tokens(text: str) -> list[str]:
    """Return the normalised words; each Chinese or Japanese character is a token."""
    return _TOKEN.findall(normalize_answer(text))


def exact_match(guess: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if the normalised guess is one of the accepted answers."""
    tokens = answer_tokens(guess)
    return float(any(tokens == answer_tokens(answer) for answer in accepted))


def token_f1(guess: str, accepted: Sequence[str]) -> float:
    """Return the best F1 of tokens (harmonic mean of precision and recall) over the accepted answers."""
    tokens = Counter(answer_tokens(guess))
    return max((_overlap(tokens, Counter(answer_tokens(a))) for a in accepted), default=0.0)


def _overlap(guess: Counter[str], answer: Counter[str]) -> float:
    total = guess.total() + answer.total()
    return 2 * (guess & answer).total() / total if total else 1.0


def accuracy(golds: Sequence[str], guesses: Sequence[str]) -> float:
    """Return the share of right labels."""
    return METRICS["accuracy"].aggregate(label_rows(golds, guesses))


def macro_f1(golds: Sequence[str], guesses: Sequence[str]) -> float:
    """Return the mean F1 over the labels that occur among golds or guesses."""
    return METRICS["macro_f1"].aggregate(label_rows(golds, guesses))


def perplexity(neg_log_likelihoods: Sequence[float], token_counts: Sequence[int]) -> float:
    """Return exp of the mean negative log likelihood of a token (nats)."""
    return METRICS["perplexity"].aggregate(likelihood_rows(neg_log_likelihoods, token_counts))


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Return the share of distinct n-grams; low values mean repetition (arxiv.org/abs/1510.03055)."""
    tokens_of_texts = [answer_tokens(text) for text in texts]
    grams = [tuple(t[i : i + n]) for t in tokens_of_texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def label_rows(golds: Sequence[str], guesses: Sequence[str]) -> Rows:
    """Return rows of (gold, guess) as label numbers."""
    number = {label: i for i, label in enumerate(sorted({*golds, *guesses}))}
    return np.array([(number[a], number[b]) for a, b in zip(golds, guesses, strict=True)], float)


def answer_rows(
    judge: MetricFunction, guesses: Sequence[str], accepted: Sequence[Sequence[str]]
) -> Rows:
    """Return rows of one number: the metric of the guess."""
    return np.array([(judge(g, a),) for g, a in zip(guesses, accepted, strict=True)], float)


def likelihood_rows(neg_log_likelihoods: Sequence[float], token_counts: Sequence[int]) -> Rows:
    """Return rows of (negative log likelihood summed over the answer's tokens, their number)."""
    return np.array(list(zip(neg_log_likelihoods, token_counts, strict=True)), float)


def _accuracy_of(rows: Rows) -> Any:
    return (rows[..., 0] == rows[..., 1]).mean(axis=-1)


def _macro_f1_of(rows: Rows) -> Any:
    labels = np.unique(rows)[:, None, None]
    gold, guess = rows[..., 0].reshape(-1, rows.shape[-2]), rows[..., 1].reshape(-1, rows.shape[-2])
    hits = ((gold == labels) & (guess == labels)).sum(axis=-1)
    occurrences = (gold == labels).sum(axis=-1) + (guess == labels).sum(axis=-1)
    f1 = 2 * hits / np.maximum(occurrences, 1)
    return (f1.sum(axis=0) / (occurrences > 0).sum(axis=0)).reshape(rows.shape[:-2])


def _mean_of(rows: Rows) -> Any:
    return rows[..., 0].mean(axis=-1)


def mean_loss(rows: npt.ArrayLike) -> Any:
    """Return the mean negative log likelihood of a token, over rows of `likelihood_rows`."""
    numbers = np.asarray(rows, float)
    return numbers[..., 0].sum(axis=-1) / numbers[..., 1].sum(axis=-1)


def _perplexity_of(rows: Rows) -> Any:
    return np.exp(mean_loss(rows))


@dataclass(frozen=True, slots=True)
class Metric:
    """An entry of METRICS."""

    name: str
    kind: Literal["label", "answer", "likelihood"]
    """label: score every label by likelihood. answer: generate and compare. likelihood: of the
    reference answer."""
    higher_is_better: bool
    statistic: Statistic
    judge: MetricFunction | None = None
    """Compares one answer; set for metrics of kind "answer" only."""

    def aggregate(self, rows: Rows) -> float:
        """Return the metric of all rows; raise DataError when there are none."""
        if not len(rows):
            raise DataError(f"{self.name}: there is nothing to judge (no items)")
        return float(self.statistic(rows))


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "label", True, _accuracy_of),
        Metric("macro_f1", "label", True, _macro_f1_of),
        Metric("exact_match", "answer", True, _mean_of, exact_match),
        Metric("token_f1", "answer", True, _mean_of, token_f1),  # arxiv.org/abs/1606.05250
        Metric("perplexity", "likelihood", False, _perplexity_of),
    )
}


def judge_misfits(metric: str, labels: Mapping[str, str]) -> Iterator[str]:
    """Yield the reasons why `metric` cannot score answers from this label set."""
    if metric not in METRICS:
        yield f"metric: unknown metric {metric!r}; known: {', '.join(sorted(METRICS))}"
    elif METRICS[metric].kind == "label" and len(labels) < 2:
        yield f"labels: {metric} chooses between labels; give two or more"
    elif METRICS[metric].kind != "label" and labels:
        yield f"labels: {metric} judges free text, so there can be no labels"
    if len(set(labels.values())) < len(labels):
        yield "labels: two labels have the same words"


def bootstrap_interval(
    items: npt.ArrayLike,
    statistic: Statistic,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of `statistic` over `items` (rows, or plain numbers)."""
    rows = np.asarray(items, float)
    if not len(rows):
        raise DataError("bootstrap: there is nothing to resample (no items)")
    rows = rows.reshape(len(rows), -1)
    rng = np.random.default_rng(seed)
    per_chunk = max(1, _MAX_CHUNK_NUMBERS // rows.size)
    values = [
        statistic(
            rows[rng.integers(len(rows), size=(min(per_chunk, resamples - start), len(rows)))]
        )
        for start in range(0, resamples, per_chunk)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    one: npt.ArrayLike, other: npt.ArrayLike, statistic: Statistic
) -> tuple[float, float, float]:
    """Return statistic(one) - statistic(other) over the same items, and its 95 % interval.

    The two rows of an item are resampled together, so that the difficulty of items cancels out.
    """
    pairs = np.stack([np.asarray(one, float), np.asarray(other, float)], axis=1)
    width = pairs.shape[-1]

    def difference(rows: Rows) -> Any:
        return statistic(rows[..., :width]) - statistic(rows[..., width:])

    flat = pairs.reshape(len(pairs), -1)
    return (float(difference(flat)), *bootstrap_interval(flat, difference))
