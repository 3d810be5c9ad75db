"""Masks made of positions: windows and chunks in packed rows and over a cache."""

import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import pack
from adapterhub_chat.model.masks import RowLayout, layout_mask


def seen(layout, predicate):
    return layout_mask(layout, predicate, torch.float32)[:, 0] == 0


def of_batch(batch):
    return RowLayout(batch.positions, batch.positions, batch.visible())


def test_a_window_counts_positions_within_an_example():
    """Two examples in a row: each token sees the last three of its own example, itself among them."""
    batch = pack([[Encoded((5, 6, 7, 8, 9), ((1,),)), Encoded((5, 6, 7, 8), ((1,),))]], 10)
    allowed = seen(of_batch(batch), sliding_window_causal_mask_function(3))[0]
    for start, end in ((0, 5), (5, 9)):
        for token in range(start, end):
            expected = set(range(max(start, token - 2), token + 1))
            assert set(allowed[token].nonzero().flatten().tolist()) == expected


def test_continuations_see_their_prompt_and_never_each_other():
    batch = pack([[Encoded((5, 6, 7), ((1, 2, 3), (4, 5, 6)))]], 8)
    allowed = seen(of_batch(batch), causal_mask_function)[0]
    assert allowed[4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert allowed[6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    windowed = seen(of_batch(batch), sliding_window_causal_mask_function(2))[0]
    assert windowed[5].nonzero().flatten().tolist() == [2, 5]  # position 3, after position 2


def test_chunks_begin_anew_in_each_example():
    batch = pack([[Encoded((5, 6, 7), ((1,),)), Encoded((5, 6, 7, 8), ((1,),))]], 8)
    predicate = chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long))
    allowed = seen(of_batch(batch), predicate)[0]
    assert [allowed[i].nonzero().flatten().tolist() for i in range(7)] == [
        [0], [0, 1], [2], [3], [3, 4], [5], [5, 6],
    ]  # fmt: skip


def test_rows_of_a_cache_have_their_own_positions():
    layout = RowLayout(torch.tensor([[2, 3], [6, 7]]), torch.arange(8)[None])
    allowed = seen(layout, sliding_window_causal_mask_function(4))
    assert allowed[0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert allowed[1, 0].nonzero().flatten().tolist() == [3, 4, 5, 6]
