"""Packed attention against torch's, in float64: values and gradients, grouped queries, both masks."""

import pytest
import torch
from torch.nn import functional

from adapterhub_chat.model import attention
from adapterhub_chat.model.attention import packed_attention


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("full_mask", [True, False])
def test_packed_attention_equals_torchs(heads, groups, full_mask):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = normal(2, heads, 5, 8), normal(2, groups, 5, 8), normal(2, groups, 5, 8)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask.masked_fill_(torch.ones(5, 5, dtype=torch.bool).triu(1), torch.finfo(torch.float64).min)
    mask[1, :, 3:, :3] = torch.finfo(torch.float64).min  # a second example in the row
    used_mask = mask.expand(-1, heads, -1, -1).contiguous() if full_mask else mask
    repeated = [t.repeat_interleave(heads // groups, 1) for t in (key, value)]
    wanted = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    got = packed_attention(query, key, value, used_mask, 0.3)
    torch.testing.assert_close(got, wanted.transpose(1, 2))
    upstream = torch.randn(got.shape, dtype=torch.float64)
    leaves = (query, key, value)
    gradients = torch.autograd.grad(got, leaves, upstream)
    expected = torch.autograd.grad(wanted, leaves, upstream.transpose(1, 2))
    torch.testing.assert_close(gradients, expected)


def test_large_scores_keep_their_differences_in_bf16():
    """A vector added to all keys does not change the softmax, but costs the rest its bits in bf16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(3))
    key = key + 20 * torch.randn(16, generator=generator)
    query, key, value = (t.bfloat16().requires_grad_() for t in (query, key, value))
    mask = torch.zeros(1, 1, 32, 32)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    wanted = packed_attention(*exact, mask.double(), 0.25)
    got = packed_attention(query, key, value, mask.bfloat16(), 0.25)
    assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 0.02
    upstream = torch.randn(got.shape, generator=generator)
    gradients = torch.autograd.grad(got, (query, key, value), upstream.bfloat16())
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert float((gradient - reference).norm() / reference.norm()) < 0.05


def test_packed_attention_is_used_for_training_only(model, monkeypatch):
    calls = []
    plain = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a: calls.append(1) or plain(*a))
    ids = torch.tensor([[5, 9, 60, 31]])
    mask = torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        inference = model.backbone.model(ids, attention_mask=mask).logits
    assert not calls
    training = model.backbone.model(ids, attention_mask=mask).logits
    assert len(calls) == 2
    torch.testing.assert_close(training, inference)
