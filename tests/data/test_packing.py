"""Packing: nothing lost, nothing shared, and the loss of every example what it is alone."""

import itertools
from collections import Counter, deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import epochs, fill_rows, in_order, pack
from adapterhub_chat.inference.likelihood import sum_by_owner, token_losses

LENGTH = 24
tokens = st.lists(st.integers(3, 250), min_size=1, max_size=8).map(tuple)
encoded = st.builds(Encoded, tokens, st.lists(tokens, min_size=1, max_size=2).map(tuple))


def alone(model, example):
    """-log p of each continuation by plain transformers, one sequence at a time."""
    losses = []
    for continuation in example.continuations:
        ids = torch.tensor([[*example.prompt, *continuation]])
        with torch.no_grad():
            logits = model.backbone.model(ids).logits[0].log_softmax(-1)
        start = len(example.prompt) - 1
        steps = logits[start : start + len(continuation)]
        losses.append(-float(steps[range(len(continuation)), list(continuation)].sum()))
    return losses


@settings(max_examples=20, deadline=None)
@given(examples=st.lists(encoded, min_size=1, max_size=9))
def test_packed_losses_equal_the_unpacked_ones(shared_model, examples):
    rows = fill_rows(deque(examples), num_rows=20, length=LENGTH)
    batch = pack(rows, LENGTH)
    with torch.no_grad():
        losses = token_losses(shared_model.answer_logits(batch), batch.targets)
    packed = [e for row in rows for e in row]
    wanted = [x for e in packed for x in alone(shared_model, e)]
    got = sum_by_owner(losses, batch.owners, len(wanted))
    torch.testing.assert_close(got, torch.tensor(wanted), atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def shared_model(pico_folder):
    from adapterhub_chat.model.adapter_model import AdapterModel
    from adapterhub_chat.model.backbone import load_backbone

    return AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cpu"))


@settings(max_examples=50, deadline=None)
@given(st.lists(encoded, max_size=40), st.integers(1, 4))
def test_every_example_comes_once_in_rows_that_hold_it(examples, num_rows):
    seen = []
    for rows, indices in in_order(examples, num_rows=num_rows, length=LENGTH):
        assert len(rows) <= num_rows
        assert all(sum(e.num_inputs for e in row) <= LENGTH for row in rows)
        assert [examples[i] for i in indices] == [e for row in rows for e in row]
        seen += indices
    assert sorted(seen) == list(range(len(examples)))


def test_a_stream_repeats_with_its_seed_and_uses_every_example_alike():
    examples = [Encoded((i + 3,) * (3 + i % 5), ((1, 2),)) for i in range(30)]

    def first(seed, n=40):
        stream = epochs(examples, num_rows=2, length=LENGTH, seed=seed)
        return list(itertools.islice(stream, n))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert all(len(rows) == 2 for rows in first(1))
    counts = Counter(e for rows in first(1, 100) for row in rows for e in row)
    assert set(counts) == set(examples)
    assert max(counts.values()) - min(counts.values()) <= 3


def test_rows_are_well_filled():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 90, (400,), generator=generator).tolist()
    examples = [Encoded((5,) * size, ((6, 2),)) for size in sizes]
    stream = epochs(examples, num_rows=2, length=256, seed=0)
    used = [sum(e.num_inputs for row in next(stream) for e in row) for _ in range(50)]
    assert sum(used) / (50 * 512) > 0.93


def test_padding_attends_to_itself_and_gives_no_nan(shared_model):
    batch = pack([[Encoded((5, 6), ((7, 2),))]], LENGTH)
    assert int((batch.segments >= 0).sum()) == 3
    mask = batch.mask(torch.float32)[0, 0]
    assert (mask[:3, 3:] < 0).all()
    with torch.no_grad():
        assert shared_model.answer_logits(batch).isfinite().all()
