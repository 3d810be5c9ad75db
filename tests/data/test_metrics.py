"""Metrics: pinned by hand, and by what must hold for any data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_chat.data import metrics
from adapterhub_chat.data.metrics import (
    METRICS,
    accuracy,
    answer_rows,
    bootstrap_interval,
    distinct_n,
    exact_match,
    label_rows,
    likelihood_rows,
    macro_f1,
    mean_loss,
    normalize_answer,
    paired_difference,
    perplexity,
    token_f1,
)
from adapterhub_chat.errors import DataError

LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Bill of Rights.", "bill of rights"),
        ("an Apple, a day", "apple day"),
        ("Theatre", "theatre"),
        ("«Œuvre» — $5!", "œuvre 5"),
        ("你好，世界！", "你好世界"),
        ("ＡＢＣ１２", "abc12"),
        ("@", "@"),
        ("The The", "the the"),
        ("", ""),
    ],
)
def test_normalized_answers(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_reference():
    assert exact_match("the Swan!", ["Gar Saxon", "swan"]) == 1.0
    assert exact_match("a swan song", ["swan"]) == 0.0
    assert exact_match("你 好。", ["你好"]) == 1.0
    assert exact_match("", ["@"]) == 0.0, "an empty guess is no answer"


@pytest.mark.parametrize(
    ("guess", "references", "f1"),
    [
        ("in Paris", ["Paris"], 2 / 3),
        ("Paris", ["London", "the city of Paris"], 0.5),
        ("paris paris", ["paris"], 2 / 3),
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("北京市", ["北京"], 4 / 5),
        ("用 Python 写", ["用python写的"], 6 / 7),
        ("anything", [], 0.0),
    ],
)
def test_token_f1(guess, references, f1):
    assert token_f1(guess, references) == pytest.approx(f1)


@given(st.text(), st.text())
def test_token_f1_is_symmetric_and_bounded(a, b):
    assert 0 <= token_f1(a, [b]) == token_f1(b, [a]) <= 1
    assert token_f1(a, [a]) == exact_match(a, [a]) == 1
    assert exact_match(a, [b]) <= token_f1(a, [b])


def test_label_metrics_by_hand():
    golds, guesses = ["n", "n", "n", "p"], ["n", "n", "p", "p"]
    assert accuracy(golds, guesses) == 0.75
    assert macro_f1(golds, guesses) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(["a", "a"], ["b", "b"]) == 0.0
    assert macro_f1(["x", "y"], ["x", "y"]) == 1.0


@given(LABELS)
def test_macro_f1_ignores_order_and_names(pairs):
    golds, guesses = zip(*pairs, strict=True)
    value = macro_f1(golds, guesses)
    assert macro_f1(golds[::-1], guesses[::-1]) == pytest.approx(value)
    other = {"a": "z", "b": "y", "c": "x"}
    assert macro_f1([other[g] for g in golds], [other[g] for g in guesses]) == pytest.approx(value)
    assert 0 <= value <= 1


def test_perplexity_weighs_tokens_not_answers():
    assert perplexity([math.log(2) * 3, math.log(8)], [3, 1]) == pytest.approx(2**1.5)


def test_distinct_n():
    assert distinct_n(["so so so"], 1) == pytest.approx(1 / 3)
    assert distinct_n(["one two three"], 2) == 1.0
    assert distinct_n(["one"], 2) == 0.0
    assert distinct_n(["好好好"], 1) == pytest.approx(1 / 3)


def test_the_table_says_what_to_do():
    assert {name: m.kind for name, m in METRICS.items()} == {
        "accuracy": "label",
        "macro_f1": "label",
        "exact_match": "answer",
        "token_f1": "answer",
        "perplexity": "likelihood",
    }
    assert [name for name, m in METRICS.items() if not m.higher_is_better] == ["perplexity"]
    for metric in METRICS.values():
        assert (metric.judge is not None) == (metric.kind == "answer")
        with pytest.raises(DataError, match=metric.name):
            metric.aggregate(np.empty((0, 2)))


ROWS = {
    "accuracy": label_rows("aabbc", "abbbc"),
    "macro_f1": label_rows("aabbc", "abbbc"),
    "exact_match": answer_rows(exact_match, ["a1", "b", "c"], [["a1"], ["x"], ["c", "y"]]),
    "token_f1": answer_rows(token_f1, ["a1 b1", "b", "c"], [["a1"], ["x"], ["c", "y"]]),
    "perplexity": likelihood_rows([3.0, 1.5, 0.2], [2, 5, 1]),
}


@pytest.mark.parametrize("name", METRICS)
def test_statistics_of_stacked_resamples_are_those_of_each(name):
    rows, statistic = ROWS[name], METRICS[name].statistic
    picks = np.random.default_rng(0).integers(len(rows), size=(50, len(rows)))
    one_by_one = [METRICS[name].aggregate(rows[pick]) for pick in picks]
    assert np.allclose(statistic(rows[picks]), one_by_one)


@pytest.mark.parametrize("name", METRICS)
def test_the_interval_holds_the_value_and_repeats(name):
    statistic, value = METRICS[name].statistic, METRICS[name].aggregate(ROWS[name])
    low, high = bootstrap_interval(ROWS[name], statistic, seed=3)
    assert low <= value <= high
    assert low < high
    assert bootstrap_interval(ROWS[name], statistic, seed=3) == (low, high)
    inner = bootstrap_interval(ROWS[name], statistic, seed=3, level=0.5)
    assert low <= inner[0] <= inner[1] <= high


def test_the_interval_is_the_textbook_one_for_a_mean(monkeypatch):
    items = np.random.default_rng(1).normal(10, 2, size=400)
    monkeypatch.setattr(metrics, "_MAX_CHUNK_NUMBERS", 3_000)  # many chunks
    low, high = bootstrap_interval(items, METRICS["token_f1"].statistic, resamples=4_000)
    half = 1.96 * items.std() / math.sqrt(len(items))
    assert low == pytest.approx(items.mean() - half, abs=0.02)
    assert high == pytest.approx(items.mean() + half, abs=0.02)
    again = bootstrap_interval(items, METRICS["token_f1"].statistic, resamples=4_000)
    other = bootstrap_interval(items, METRICS["token_f1"].statistic, resamples=4_000, seed=1)
    assert again == (low, high) != other


def test_one_item_has_no_width_and_none_is_an_error():
    assert bootstrap_interval([0.5], METRICS["token_f1"].statistic) == (0.5, 0.5)
    with pytest.raises(DataError, match="no items"):
        bootstrap_interval([], METRICS["token_f1"].statistic)


def test_a_paired_difference_forgets_what_is_hard_for_both_sides():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 100, 200)
    one = np.stack([hard + rng.normal(1, 0.1, 200), np.ones(200)], axis=1)
    other = np.stack([hard, np.ones(200)], axis=1)
    value, low, high = paired_difference(one, other, mean_loss)
    assert value == pytest.approx(mean_loss(one) - mean_loss(other))
    assert 0.9 < low < value < high < 1.1
    alone = bootstrap_interval(one, mean_loss)
    assert alone[1] - alone[0] > 50 * (high - low)
