"""A step that fails ends the request that makes it fail; the others go on and give the same text."""

import pytest
import torch
from pico import alone

from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.fused_decoder import make_decoder
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.types import as_mix

RULES = Sampling(max_new_tokens=12, ignore_eos=True)
POISON = 77


@pytest.fixture
def loaded(model, make_weights):
    for n in range(3):
        model.load(f"a{n}", make_weights(seed=n, rank=3 + 2 * n))
    return model


class FailingDecoder:
    """A decoder that fails whenever a row's new tokens hold POISON, or when many rows decode together."""

    def __init__(self, model, max_rows=99):
        self.inner, self.max_rows = make_decoder(model), max_rows
        self.max_length, self.takes_chunks = self.inner.max_length, self.inner.takes_chunks
        self.new_cache, self.recompute_length = self.inner.new_cache, self.inner.recompute_length
        self.early_states = self.inner.early_states

    def forward(self, cache, inputs, plan):
        if (inputs.ids == POISON).any() or len(inputs.ids) > self.max_rows:
            raise RuntimeError("the step failed")
        return self.inner.forward(cache, inputs, plan)


def requests(*prompts):
    return [Request(p, as_mix(f"a{n % 3}"), RULES) for n, p in enumerate(prompts)]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_only_the_failing_request_ends_with_the_error(loaded, position):
    prompts = [(5, 6, 7), (9, 10), (11, 12, 13, 14), (20,)]
    prompts[position] = (5, POISON, 7)
    asked = requests(*prompts)
    engine = Engine(loaded, decoder=FailingDecoder(loaded))
    tickets = [engine.submit(request) for request in asked]
    for n, (ticket, request) in enumerate(zip(tickets, asked, strict=True)):
        if n == position:
            with pytest.raises(RuntimeError, match="the step failed"):
                ticket.result()
        else:
            assert ticket.result().ids == alone(loaded, request).ids


def test_requests_that_run_already_go_on_after_a_failed_prefill(loaded):
    first, bad = requests((5, 6, 7), (POISON, 8))
    engine = Engine(loaded, decoder=FailingDecoder(loaded))
    running = engine.submit(first)
    for _ in range(4):
        engine.step()
    failing = engine.submit(bad)
    with pytest.raises(RuntimeError, match="the step failed"):
        failing.result()
    assert running.result().ids == alone(loaded, first).ids


def test_a_text_that_ended_in_the_failed_step_is_complete(loaded):
    """It takes its only token in the prefill of a step whose decoding fails."""
    short = Request((5, 6, 7), as_mix("a1"), Sampling(max_new_tokens=1, ignore_eos=True))
    (long,) = requests((9, 10))
    decoder = FailingDecoder(loaded)
    engine = Engine(loaded, decoder=decoder)
    running = engine.submit(long)
    for _ in range(3):
        engine.step()
    plain, calls = decoder.forward, []

    def forward(cache, inputs, plan):
        calls.append(len(inputs.ids))
        if len(calls) == 2:  # the decoding after the prefill
            raise RuntimeError("the step failed")
        return plain(cache, inputs, plan)

    decoder.forward = forward
    done = engine.submit(short)
    assert running.result().ids == alone(loaded, long).ids
    assert done.result().ids == alone(loaded, short).ids


def test_sampled_text_is_the_same_after_a_restart(loaded):
    rules = Sampling(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
    request = Request((5, 6, 7), as_mix("a1"), rules)
    engine = Engine(loaded, decoder=FailingDecoder(loaded))
    running = engine.submit(request)
    for _ in range(4):
        engine.step()
    failing = engine.submit(Request((POISON,), as_mix(None), rules))
    assert running.result().ids == alone(loaded, request).ids
    assert failing.done


def test_cancelled_requests_end_while_others_are_tried_again(loaded):
    asked = requests((5, 6, 7), (9, POISON), (11, 12))
    engine = Engine(loaded, decoder=FailingDecoder(loaded))
    tickets = [engine.submit(request) for request in asked]
    engine.step()
    tickets[2].cancel()
    assert tickets[0].result().ids == alone(loaded, asked[0]).ids
    assert tickets[2].result().reason == "cancelled"
    assert not engine.running


def test_token_ids_beyond_the_embedding_are_refused(loaded):
    num_ids = len(loaded.backbone.model.get_input_embeddings().weight)
    engine = Engine(loaded)
    good = engine.submit(Request((5, 6), as_mix(None), RULES))
    for bad in (num_ids, -1):
        with pytest.raises(UsageError, match=f"id out of range: .* 0 to {num_ids - 1}"):
            engine.submit(Request((5, bad), as_mix(None), RULES))
    assert len(good.result().ids) == 12
    assert torch.isfinite(torch.tensor(good.result().ids).float()).all()
