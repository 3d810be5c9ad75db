"""Means over groups of tokens, against a loop in float64."""

import torch

from adapterhub_chat.model.pooling import group_means


def test_group_means_equal_a_loop_and_empty_groups_are_zero():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 7, generator=generator).requires_grad_()
    groups = torch.randint(0, 4, (50,), generator=generator)
    means = group_means(states, groups, 6)
    wanted = torch.zeros(6, 7, dtype=torch.float64)
    for group in range(4):
        wanted[group] = states.double()[groups == group].mean(0)
    torch.testing.assert_close(means.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(means[4:], torch.zeros(2, 7))
    (gradient,) = torch.autograd.grad(means.sum(), states)
    assert bool(gradient.isfinite().all())


def test_half_precision_states_are_added_in_float32():
    states = torch.full((3000, 1), 1.0009765625, dtype=torch.float16)
    mean = group_means(states, torch.zeros(3000, dtype=torch.long), 1)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((1, 1), 1.0009765625))
