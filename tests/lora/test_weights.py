"""AdapterWeights by themselves: derived values and copies."""

from dataclasses import replace

import pytest
import torch

from adapterhub_chat.lora.weights import Head


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_is_finite_belongs_to_one_copy_of_the_weights(make_weights, bad):
    weights = make_weights()
    assert weights.is_finite
    module, (a, b) = next(iter(weights.factors.items()))
    broken_b = b.clone()
    broken_b[0, 0] = bad
    broken = weights.with_factors({**weights.factors, module: (a, broken_b)})
    assert not broken.is_finite
    assert broken.with_factors(weights.factors).is_finite
    assert not replace(weights, head=Head(torch.full((2, 4), bad), torch.zeros(2))).is_finite


def test_checked_weights_are_not_read_again(make_weights):
    """The guard has read every number; a copy with other factors loses that mark."""
    weights = make_weights().shapes_only()  # meta tensors have no numbers to read
    assert replace(weights, checked=True).is_finite
    assert not replace(weights, checked=True).with_factors(weights.factors).checked


def test_weights_are_frozen(make_weights):
    weights = make_weights()
    with pytest.raises(AttributeError):
        weights.rslora = True
    with pytest.raises(AttributeError):
        weights.is_finite = False
