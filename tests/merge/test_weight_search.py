"""The search for merge weights: it finds what is there, within its budget, again by the same seed."""

import math

import pytest

from adapterhub_chat.errors import UsageError
from adapterhub_chat.merge.weight_search import MOST, search_weights


def bowl(centre):
    """A narrow valley whose axes are not those of the weights."""

    def loss(weights):
        gaps = [w - c for w, c in zip(weights, centre, strict=True)]
        return sum(g * g for g in gaps) + 8 * sum(gaps) ** 2

    return loss


@pytest.mark.parametrize("centre", [(0.4,), (0.9, -0.6), (0.2, 1.1, -0.3), (0.5, 0.1, -1.0, 0.7)])
def test_it_finds_the_lowest_point(centre):
    found = search_weights(bowl(centre), len(centre), budget=400, seed=1)
    assert found == pytest.approx(centre, abs=0.02)


def test_it_keeps_to_its_budget_and_its_bounds():
    seen = []
    for budget in (1, 2, 5, 6, 17, 40):
        seen.clear()
        found = search_weights(lambda w: seen.append(w) or -sum(w), 3, budget=budget)
        assert len(seen) == budget
        assert found == max(seen, key=sum)
        assert all(-MOST <= weight <= MOST for weights in seen for weight in weights)


def test_the_plain_choices_come_first():
    seen = []
    search_weights(lambda w: seen.append(w) or 0.0, 2, budget=4)
    assert seen == [[0.5, 0.5], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_equal_seeds_give_equal_weights():
    one, again, other = (search_weights(bowl((0.3, -0.2)), 2, budget=30, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_what_is_no_number_is_never_chosen():
    assert search_weights(lambda w: math.nan if w[0] > 0.4 else w[0] ** 2, 1, budget=30)[0] <= 0.4


@pytest.mark.parametrize(("count", "budget"), [(0, 5), (2, 0)])
def test_nothing_to_search_is_an_error(count, budget):
    with pytest.raises(UsageError, match="needs a source and a try"):
        search_weights(lambda _: 0.0, count, budget=budget)
