"""Packed attention against torch's, in float64: values and gradients, grouped queries, both masks."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from adapterhub_chat.errors import UsageError
from adapterhub_chat.model import attention
from adapterhub_chat.model.attention import explicit_attention, packed_attention


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


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [None, 1.5])
def test_soft_caps_and_sinks_are_the_formula(softcap, sink):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 5, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(hidden, torch.finfo(torch.float32).min)
    sinks = None if sink is None else torch.full((4,), sink)
    got = explicit_attention(query, key, value, mask, 0.4, softcap, sinks)
    for row, head, token in ((0, 0, 0), (1, 1, 3), (1, 3, 4)):
        scores = 0.4 * key[row, head // 2, : token + 1] @ query[row, head, token]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        total = scores.exp().sum() + (0 if sink is None else torch.tensor(sink).exp())
        wanted = (scores.exp() / total) @ value[row, head // 2, : token + 1]
        torch.testing.assert_close(got[row, token, head], wanted, atol=1e-6, rtol=1e-5)
    for form in (None, (~hidden).expand(2, 1, 5, 5)):
        other = explicit_attention(query, key, value, form, 0.4, softcap, sinks)
        torch.testing.assert_close(other, got)


def test_values_may_be_narrower_than_keys():
    query, key = torch.randn(1, 4, 6, 12), torch.randn(1, 4, 6, 12)
    value = torch.randn(1, 4, 6, 8)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e30)
    wanted = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    got = packed_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(got, wanted.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_an_option_that_brings_unknown_numbers_is_refused():
    tensor = torch.randn(1, 2, 3, 4)
    with pytest.raises(UsageError, match="indices"):
        attention._attention(nn.Identity(), tensor, tensor, tensor, None, indices=torch.zeros(1))
