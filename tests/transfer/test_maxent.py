"""Maximum-entropy weights against their definition; the gate against constructed results."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adapterhub_chat.errors import DataError
from adapterhub_chat.transfer.gate import MIN_ITEMS, best, stratified, verdict
from adapterhub_chat.transfer.maxent import (
    balanced,
    drawn,
    effective_size,
    lam_for,
    principal,
    reweighted,
    tilt,
)


def kl_to_uniform(weights):
    """The KL divergence, in nats, of weights that sum to 1 from equal weights."""
    weights = weights.double()
    return float(torch.special.xlogy(weights, weights * len(weights)).sum())


LIKELIHOOD = st.lists(st.floats(-30, 0), min_size=3, max_size=40).map(torch.tensor)


@given(LIKELIHOOD)
def test_multiplier_1_gives_the_plain_formula(log_likelihood):
    shares = log_likelihood.double().exp()
    torch.testing.assert_close(tilt(log_likelihood, 1.0), shares / shares.sum())
    kept = reweighted(log_likelihood, share=0.0, max_weight=math.inf)
    assert kept.lam == 1
    torch.testing.assert_close(kept.weights, len(shares) * shares / shares.sum())


@given(LIKELIHOOD, st.floats(0.05, 0.9), st.integers(0, 9))
def test_weights_at_a_level_have_the_smallest_kl_to_the_uniform(values, part, seed):
    values = values.double()
    low, high = float(values.mean()), float(values.max())
    if high - low < 1e-3:
        return
    level = low + part * (high - low)
    weights = tilt(values, lam_for(values, level))
    assert float(weights @ values) == pytest.approx(level, abs=1e-6)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):  # others, moved towards the best item until they reach the level, too
        other = torch.rand(len(values), generator=generator, dtype=torch.float64)
        other /= other.sum()
        mean = float(other @ values)
        if mean < level:
            step = (level - mean) / (high - mean)
            other = (1 - step) * other
            other[values.argmax()] += step
        assert float(other @ values) >= level - 1e-9
        assert kl_to_uniform(other) >= kl_to_uniform(weights) - 1e-9


@given(LIKELIHOOD, st.floats(0.1, 0.95))
def test_the_effective_sample_size_has_a_lower_bound(values, share):
    weighting = reweighted(values, share=share, max_weight=math.inf)
    assert 0 <= weighting.lam <= 1
    assert weighting.effective >= share - 1e-6
    assert float(weighting.weights.mean()) == pytest.approx(1)
    if weighting.lam < 1:
        assert weighting.effective == pytest.approx(share, abs=1e-4)


def test_large_weights_are_clipped_and_counted():
    values = torch.zeros(100)
    values[0] = 10.0
    weighting = reweighted(values, share=0.0, max_weight=5.0)
    assert weighting.clipped == 1
    assert float(weighting.weights.max()) == 5
    assert float(weighting.weights.mean()) == pytest.approx(1)


@pytest.mark.parametrize("level", [-5.0, 0.0, 1.0])
def test_an_unreachable_level_is_refused_with_the_nearest(level):
    with pytest.raises(
        DataError, match=r"the nearest is -1\b" if level > -1 else r"the nearest is -2\b"
    ):
        lam_for(torch.tensor([-1.0, -3.0]), level)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [-math.inf, 0.0], []])
def test_non_finite_likelihoods_are_refused(bad):
    with pytest.raises(DataError, match="to weigh"):
        reweighted(torch.tensor(bad))


def test_balancing_matches_the_means():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(4000, 5, generator=generator)
    target = torch.randn(900, 5, generator=generator) * 0.5 + torch.tensor([0.5, 0, -0.3, 0, 0])
    weighting = balanced(source, target, ridge=1e-4)
    moved = (weighting.weights[:, None] * source).mean(0)
    torch.testing.assert_close(moved, target.mean(0).double(), atol=0.01, rtol=0)
    assert weighting.residual < 0.01
    assert 0.2 < weighting.effective < 1


def test_balancing_minimises_its_dual():
    """At the minimum the gradient is zero: the weighted mean misses the goal by ridge * lam alone."""
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(n, 3, generator=generator) for n in (500, 80))
    loose, tight = (balanced(source, target, ridge=r) for r in (1.0, 1e-6))
    assert tight.residual < 1e-4 < loose.residual


def test_equal_features_give_equal_weights():
    source = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    weighting = balanced(source, source)
    torch.testing.assert_close(
        weighting.weights, torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_balancing_keeps_the_effective_sample_size():
    """A target far away: the ridge grows until the stated share counts, and what is left is said."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(200, 4, generator=generator)
    target = torch.randn(50, 4, generator=generator) + 4.0
    free = balanced(source, target, share=0, max_weight=1e9)
    kept = balanced(source, target, share=0.3)
    assert free.effective < 0.3 <= kept.effective
    assert kept.residual > free.residual
    assert "no multiplier brings" in kept.note
    assert f"leaves {kept.residual:.2f}" in kept.note
    assert not balanced(source, source, share=0.3).note


@pytest.mark.parametrize("source", [torch.ones(6, 3), torch.randn(1, 3)])
def test_identical_source_examples_get_equal_weights(source):
    weighting = balanced(*principal(source.double(), torch.randn(4, 3).double(), 2))
    assert weighting.weights.tolist() == [1.0] * len(source)
    assert weighting.note == "the source's examples all look the same, so they count alike"
    with pytest.raises(DataError, match="no source or target examples"):
        balanced(source.double(), torch.zeros(0, 3).double())


def test_the_residual_is_that_of_the_clipped_weights():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(200, 3, generator=generator).double()
    target = torch.randn(50, 3, generator=generator).double() + 1.5
    weighting = balanced(source, target, share=0.0, max_weight=3.0)
    assert weighting.clipped > 0
    moved = (weighting.weights[:, None] * source).mean(0)
    left = ((moved - target.mean(0)) / source.std(0)).abs().max()
    assert weighting.residual == pytest.approx(float(left), rel=1e-6)


def test_principal_directions_keep_distances():
    generator = torch.Generator().manual_seed(4)
    plan = torch.randn(2, 30, generator=generator)
    source, target = (torch.randn(n, 2, generator=generator) @ plan for n in (60, 20))
    one, other = principal(source, target, 16)
    assert one.shape == (60, 2)
    assert other.shape == (20, 2)
    torch.testing.assert_close(  # distances are kept
        torch.cdist(one, other), torch.cdist(source.double(), target.double()), atol=1e-6, rtol=1e-6
    )


def test_non_finite_features_are_refused():
    good, bad = torch.ones(5, 2), torch.full((5, 2), torch.nan)
    for one, other in ((good, bad), (bad, good)):
        with pytest.raises(DataError, match="not finite"):
            balanced(one, other)


# ---- the gate ------------------------------------------------------------------------------------


def rows(*right):
    """Rows of the accuracy metric: label and guess."""
    return np.array([[1.0, 1.0 if r else 0.0] for r in right])


GOOD, FAIR, BAD = rows(*[1] * 40), rows(*[1, 0] * 20), rows(*[0] * 40)


def test_verdicts_are_helps_hurts_and_neutral():
    assert verdict("accuracy", GOOD, FAIR).word == "helps"
    assert verdict("accuracy", BAD, FAIR).word == "hurts"
    same = verdict("accuracy", FAIR, FAIR)
    assert (same.word, same.gain) == ("neutral", 0)


def test_too_few_items_give_a_neutral_verdict():
    """The bootstrap interval of a single item has no width at all."""
    for count in (1, 2, MIN_ITEMS - 1, MIN_ITEMS):
        good, bad = (rows(*[right] * count) for right in (1, 0))
        assert verdict("accuracy", good, bad).word == ("neutral" if count < MIN_ITEMS else "helps")


def test_a_positive_gain_is_better_for_every_metric():
    low, high = (np.array([[loss, 1.0]] * 30) for loss in (0.5, 2.0))
    assert verdict("perplexity", low, high).word == "helps"
    assert verdict("perplexity", high, low).word == "hurts"


def test_a_verdict_without_items_is_refused():
    with pytest.raises(DataError, match="no target items"):
        verdict("accuracy", rows(), rows())


def test_the_best_helping_candidate_is_chosen_or_else_the_baseline():
    verdicts = {
        "target": verdict("accuracy", FAIR, FAIR),
        "good": verdict("accuracy", GOOD, FAIR),
        "bad": verdict("accuracy", BAD, FAIR),
    }
    assert best(verdicts, "target") == "good"
    assert best({n: v for n, v in verdicts.items() if n != "good"}, "target") == "target"


def test_stratified_items_have_every_label():
    labels = ["a"] * 50 + ["b"] * 3
    chosen = stratified(labels, 6, range(53))
    assert [labels[i] for i in chosen].count("b") == 3
    assert len(chosen) == 6
    assert len(effective_chosen := set(chosen)) == 6
    assert effective_chosen <= set(range(53))
    assert effective_size(torch.ones(4)) == 4


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=30), st.integers(1, 60))
def test_examples_are_drawn_in_proportion_to_their_weights(weights, count):
    assume(sum(weights) > 0.01)
    weighting = drawn(torch.tensor(weights), count)
    assert len(weighting) == count
    for index, weight in enumerate(weights):
        wanted = count * weight / sum(weights)
        assert abs(weighting.count(index) - wanted) < 1.001


def test_non_finite_weights_are_refused():
    with pytest.raises(DataError, match="1 of 2 numbers"):
        drawn(torch.tensor([1.0, float("nan")]), 3)
