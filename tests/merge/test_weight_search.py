"""The search for merge weights: minimum, budget, bounds and seeds."""

import math

import pytest

from adapterhub_chat.errors import UsageError
from adapterhub_chat.merge.weight_search import MAX_WEIGHT, search_weights


def bowl(centre):
    """A narrow valley whose axes are not those of the weights."""

    def loss(weights):
        gaps = [w - c for w, c in zip(weights, centre, strict=True)]
        return sum(g * g for g in gaps) + 8 * sum(gaps) ** 2

    return loss


@pytest.mark.parametrize("centre", [(0.4,), (0.9, -0.6), (0.2, 1.1, -0.3), (0.5, 0.1, -1.0, 0.7)])
def test_search_finds_the_minimum(centre):
    actual = search_weights(bowl(centre), len(centre), budget=400, seed=1)
    assert actual == pytest.approx(centre, abs=0.02)


def test_search_keeps_budget_and_bounds():
    seen = []
    for budget in (1, 2, 5, 6, 17, 40):
        seen.clear()
        actual = search_weights(lambda w: seen.append(w) or -sum(w), 3, budget=budget)
        assert len(seen) == budget
        assert actual == max(seen, key=sum)
        assert all(-MAX_WEIGHT <= weight <= MAX_WEIGHT for weights in seen for weight in weights)


def test_simple_choices_are_evaluated_first():
    seen = []
    search_weights(lambda w: seen.append(w) or 0.0, 2, budget=4)
    assert seen == [[0.5, 0.5], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_equal_seeds_give_equal_weights():
    one, again, other = (search_weights(bowl((0.3, -0.2)), 2, budget=30, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_nan_is_never_chosen():
    assert search_weights(lambda w: math.nan if w[0] > 0.4 else w[0] ** 2, 1, budget=30)[0] <= 0.4


@pytest.mark.parametrize(("count", "budget"), [(0, 5), (2, 0)])
def test_empty_search_is_an_error(count, budget):
    with pytest.raises(UsageError, match="needs a source and a try"):
        search_weights(lambda _: 0.0, count, budget=budget)
