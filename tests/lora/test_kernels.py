"""The three forms: each equals the equation, forward and backward, whatever the mix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_chat.lora.kernels import Batched, Dense, Ragged, choose_form, split_terms

WIDTH, OUT, RANK, TOKENS = 5, 7, 3, 2


def problem(mix, seed=0):
    """x, A, B in float64 and the equation worked out row by row."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = mix.shape

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, a, b = normal(rows, TOKENS, WIDTH), normal(groups, RANK, WIDTH), normal(groups, RANK, OUT)
    y = torch.stack(
        [sum(mix[n, s] * (x[n] @ a[s].T @ b[s]) for s in range(groups)) for n in range(rows)]
    )
    return x, a, b, y


def check(form, mix):
    x, a, b, y = problem(mix)
    got = form.add(torch.zeros_like(y), form.shrink(x, a), b)
    torch.testing.assert_close(got, y)
    gradient = torch.randn(y.shape, dtype=y.dtype)
    wanted = torch.autograd.grad(y, (x, a, b), gradient, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, (x, a, b), gradient), wanted)


def one_hot(groups, weights=None):
    mix = torch.zeros(len(groups), max(groups) + 1, dtype=torch.float64)
    mix[torch.arange(len(groups)), torch.tensor(groups)] = 1.0
    if weights is not None:
        mix *= torch.tensor(weights, dtype=torch.float64)[:, None]
    return mix


@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        ([0], Batched),
        ([0, 0, 1, 1, 2, 2], Batched),
        ([0, 1, 2], Batched),
        ([2, 0, 1, 0, 1, 2], Batched),
        ([0, 0, 0, 1, 1], Batched),
        ([1, 0, 0, 0, 0, 0, 0, 2], Ragged),
    ],
)
def test_one_hot_rows(groups, kind):
    for weights in (None, [0.5 - n for n in range(len(groups))]):
        mix = one_hot(groups, weights)
        form = choose_form(mix)
        assert type(form) is kind
        check(form, mix)


def test_ragged_rows_in_fp32_go_through_grouped_mm():
    """Widths of whole 16 bytes, so that torch's own grouped product runs; float64 takes the loop."""
    mix = one_hot([1, 0, 0, 0, 0, 0, 0, 2]).float()
    form = choose_form(mix)
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*s, generator=generator) for s in ((8, 2, 8), (3, 8, 8), (3, 8, 16)))
    group = mix.argmax(1)
    wanted = torch.stack([x[n] @ a[g].T @ b[g] for n, g in enumerate(group)])
    got = form.add(torch.zeros(8, 2, 16), form.shrink(x, a), b)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_sorted_equal_groups_need_no_index():
    form = choose_form(one_hot([0, 0, 1, 1]))
    assert form.gather is None
    assert form.scatter is None


def test_rows_that_mix_slots():
    mix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, -2.0, 3.0]], dtype=torch.float64)
    form = choose_form(mix)
    assert type(form) is Dense
    check(form, mix)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mix(data):
    rows, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    numbers = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25, -1.5])
    mix = torch.tensor(
        data.draw(
            st.lists(
                st.lists(numbers, min_size=slots, max_size=slots), min_size=rows, max_size=rows
            )
        ),
        dtype=torch.float64,
    )
    mix = mix[(mix != 0).any(1)][:, (mix != 0).any(0)]
    if mix.numel():
        check(choose_form(mix), mix)


def test_non_finite_numbers_stay_in_their_own_group():
    mix = one_hot([0, 1, 1])
    x, a, b, _ = problem(mix)
    with torch.no_grad():
        x[0] = torch.nan
    form = choose_form(mix)
    y = form.add(torch.zeros(3, TOKENS, OUT, dtype=x.dtype), form.shrink(x, a), b)
    _, grad_a, grad_b = torch.autograd.grad(y[1:].sum() + y[0].sum(), (x, a, b))
    assert grad_a[1].isfinite().all()
    assert grad_b[1].isfinite().all()
    assert y[1:].isfinite().all()


def test_in_place_addition_keeps_the_gradient_of_its_input():
    mix = one_hot([0, 0, 1, 1])
    form = choose_form(mix)
    x, a, b, wanted = problem(mix)
    base = torch.randn(4, TOKENS, OUT, dtype=x.dtype, requires_grad=True)
    y = base * 1
    got = form.add(y, form.shrink(x, a), b)
    assert got.data_ptr() == y.data_ptr()
    torch.testing.assert_close(got, base + wanted)
    (gradient,) = torch.autograd.grad(got.square().sum(), (base,))
    torch.testing.assert_close(gradient, 2 * (base + wanted))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5]), min_size=3, max_size=3), max_size=7)
)
def test_terms_sum_up_to_the_mix(rows):
    mix = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    found = split_terms(mix)
    assert torch.equal(sum(found, torch.zeros_like(mix)), mix)
    if len(found) > 1:
        assert all(int((term != 0).sum(1).max()) <= 1 for term in found)


def test_shared_and_task_rows_are_two_one_hot_terms():
    shared = torch.tensor([[1.0, 1, 0, 0], [1.0, 0, 1, 0], [1.0, 0, 0, 1]])
    assert [int((term != 0).any(0).sum()) for term in split_terms(shared)] == [1, 3]
    everywhere = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert len(split_terms(everywhere)) == 1
