"""The engine: whatever joins, leaves, is cancelled, evicted or replaced, a row equals that row alone."""

import gc
import math
import random
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico import VOCABULARY, alone, some_requests

from adapterhub_chat import AdapterHub
from adapterhub_chat.errors import (
    AdapterError,
    NoRoomError,
    QueueFullError,
    UnknownNameError,
    UsageError,
)
from adapterhub_chat.inference.decoder import ModuleDecoder, StepInput
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.fetching import MAX_PREFETCHES
from adapterhub_chat.inference.fused_decoder import FusedDecoder, _reordered, make_decoder
from adapterhub_chat.inference.kv_cache import KVCache, common_prefix_length
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.devices import pick_dtype
from adapterhub_chat.model.source import LoadedOnly
from adapterhub_chat.types import as_mix

ROOT = Path(__file__).parents[2]
LONG = Sampling(max_new_tokens=24, ignore_eos=True)


@pytest.fixture
def loaded(model, make_weights):
    for n in range(6):
        model.load(f"a{n}", make_weights(seed=n, rank=3 + 2 * n))
    return model


@pytest.fixture
def engine(loaded):
    return Engine(loaded, rows=8, chunk=32)


class WrappedDecoder:
    """Another decoder's forward, to be watched or broken by a test."""

    def __init__(self, model):
        self.inner = make_decoder(model)
        self.max_length, self.takes_chunks = self.inner.max_length, self.inner.takes_chunks
        self.new_cache, self.recompute_length = self.inner.new_cache, self.inner.recompute_length
        self.early_states = self.inner.early_states

    def forward(self, cache, inputs, plan):
        return self.inner.forward(cache, inputs, plan)


def assert_all_released(model, make_weights):
    """Every adapter that is loaded can be evicted: no row holds a slot."""
    weights = make_weights(rank=64)
    model.slots.budget = make_size(model, weights)
    model.load("last", weights)
    assert model.names == ("last",)


# ---- rows are independent ------------------------------------------------------------------------------


def test_requests_that_join_and_leave_equal_those_run_alone(engine, loaded):
    requests = some_requests(40)
    tickets = [engine.submit(r) for r in requests[:10]]
    for request in requests[10:]:
        engine.step()  # the others are in the middle of their texts
        tickets.append(engine.submit(request))
    for request, ticket in zip(requests, tickets, strict=True):
        assert ticket.result().ids == alone(loaded, request).ids
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("native", [True, False])
def test_decoders_agree(loaded, native, monkeypatch, tmp_path):
    """Fused, with and without native products, and transformers' own modules give the same tokens."""
    monkeypatch.setenv("ADAPTERHUB_NATIVE", "1" if native else "0")
    decoders = [make_decoder(loaded, tmp_path), ModuleDecoder(loaded, loaded.backbone.kv_shapes)]
    assert isinstance(decoders[0], FusedDecoder)
    assert (decoders[0]._products is not None) == native
    engines = [Engine(loaded, decoder=decoder) for decoder in decoders]
    assert [engine.decoder for engine in engines] == decoders
    for request in some_requests(12, seed=1):
        first, second = (engine.submit(request).result().ids for engine in engines)
        assert first == second
    ids = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    first, second = (decoder.early_states(ids) for decoder in decoders)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    shorter = decoders[0].early_states(ids[:, :9])  # later tokens change nothing
    torch.testing.assert_close(shorter, first[:, :9], rtol=1e-5, atol=1e-5)


def test_rows_of_a_4bit_backbone_equal_those_run_alone(pico_folder, make_weights):
    """A 4-bit backbone runs its layers' own products; rows are independent there too."""
    model = AdapterModel(
        load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize="nf4")
    )
    for n in range(6):
        model.load(f"a{n}", make_weights(seed=n))
    requests = some_requests(24, seed=2)
    together = Engine(model, rows=8)
    tickets = [together.submit(r) for r in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        assert ticket.result().ids == alone(model, request).ids


class Library(LoadedOnly):
    """Loads adapters when they are acquired, as a registry does."""

    def __init__(self, model, make_weights, count):
        super().__init__(model.slots)
        self.prefetched = []
        self.model, self.lock = model, threading.Lock()
        self.weights = {f"a{n}": make_weights(seed=n, rank=4) for n in range(count)}
        self.loaded = []

    def load(self, name):
        with self.lock:
            self.loaded.append(name)
            self.model.load(name, self.weights[name])

    def acquire(self, mix):
        return self.model.slots.acquire(mix, self.load)

    def prefetch(self, mix):
        self.prefetched.append(str(mix))


def test_bf16_logits_equal_those_of_transformers_modules(pico_folder, tmp_path):
    """On every processor: oneDNN's products refuse bf16 on one without instructions for it."""
    model = AdapterHub(str(pico_folder), tmp_path, dtype="bf16", device="cpu").model
    steps = [
        StepInput(0, torch.tensor([[5, 6, 7], [8, 9, 0]]), [0, 0], [3, 2]),
        StepInput(0, torch.tensor([[10], [11]]), [3, 2], [1, 1]),
    ]
    logits = []
    for decoder in (make_decoder(model), ModuleDecoder(model, model.backbone.kv_shapes)):
        cache = decoder.new_cache()
        cache.reserve(2, 64)
        logits.append(torch.stack([decoder.forward(cache, step, None) for step in steps]).float())
    fused, expected = logits
    assert isinstance(make_decoder(model), FusedDecoder)
    assert float((fused - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 200])
def test_a_reordered_weight_gives_the_same_product(rows):
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(96, 40), torch.randn(96), torch.randn(rows, 40)
    reordered, product = _reordered(weight)
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(product(x, reordered, bias).double(), exact, atol=1e-4, rtol=1e-4)
    assert reordered.is_mkldnn == torch.backends.mkldnn.is_available()  # else it is slow


@pytest.mark.slow
@pytest.mark.skipif(
    pick_dtype(None, torch.device("cpu")) != torch.bfloat16,
    reason="no bf16 instructions: fp32 is the default here, and it is held to equality",
)
def test_in_bf16_only_near_ties_differ():
    """SmolLM2 with the shipped adapters: a text equals that of the row alone up to a token whose two
    largest logits differ by a rounding step of bf16 (0.125 for logits from 16 on), which a batch may swap."""
    hub = AdapterHub("smollm2-135m", ROOT / "adapters", dtype="bf16", device="cpu")
    rng, sampling = random.Random(0), Sampling(max_new_tokens=24, ignore_eos=True, logprobs=2)
    questions = [f"Tell me about {word}." for word in ("Paris", "rivers", "old films", "bread")]
    encoded = hub.backbone.tokenizer(questions).input_ids
    requests = [
        Request(tuple(rng.choice(encoded)), as_mix(name), sampling)
        for name in ["qa", "generation", "sentiment", None, {"qa": 0.5, "generation": 0.5}] * 5
    ]
    engine = Engine(hub.model, rows=16)
    tickets = [engine.submit(request) for request in requests]
    num_equal = 0
    for request, ticket in zip(requests, tickets, strict=True):
        got, wanted = ticket.result(), alone(hub.model, request)
        if got.ids == wanted.ids:
            num_equal += 1
            continue
        first = common_prefix_length(got.ids, wanted.ids)
        (_, best), (_, second) = wanted.logprobs[first].likeliest
        assert best - second <= 0.25
    assert num_equal >= 12


def make_size(model, weights):
    """Bytes of a slot for weights of this rank."""
    return model.slots._layout(weights)[1]


# ---- prompts in chunks, prefixes -------------------------------------------------------------------


def test_a_long_prompt_does_not_delay_other_rows(engine):
    sampling = Sampling(max_new_tokens=5, ignore_eos=True)
    first = engine.submit(Request((5, 6), sampling=sampling))
    engine.step()
    long = engine.submit(Request(tuple(range(3, 253)), sampling=Sampling(max_new_tokens=2)))
    for _ in range(4):  # one token each
        engine.step()
    assert len(first.completion.ids) == 5
    assert not long.done
    assert long.result().prompt_tokens == 250


def test_a_shared_prefix_is_computed_once(loaded):
    engine, start = Engine(loaded), tuple(range(3, 60))
    first = engine.submit(Request((*start, 7), as_mix("a1"), LONG)).result()
    again = Request((*start, 9, 11), as_mix("a1"), LONG)
    second = engine.submit(again).result()
    assert first.reused_tokens == 0
    assert second.reused_tokens == len(start)
    assert second.ids == alone(loaded, again).ids


def test_prefixes_are_keyed_by_content_not_by_name(loaded, make_weights):
    engine, prompt = Engine(loaded), tuple(range(3, 60))
    engine.submit(Request(prompt, as_mix("a1"), LONG)).result()
    loaded.load("a1", make_weights(seed=99))
    fresh = engine.submit(Request(prompt, as_mix("a1"), LONG)).result()
    assert fresh.reused_tokens == 0
    assert fresh.ids == alone(loaded, Request(prompt, as_mix("a1"), LONG)).ids
    for other in (None, "a2", {"a1": 0.5}):
        assert engine.submit(Request(prompt, as_mix(other), LONG)).result().reused_tokens == 0


def test_the_same_content_under_two_names_shares_prefixes(model, make_weights):
    weights, prompt = make_weights(seed=4), tuple(range(3, 60))
    for name in ("one", "two"):
        model.load(name, weights, identity="the same bytes")
    engine = Engine(model)
    engine.submit(Request(prompt, as_mix("one"), LONG)).result()
    reused = engine.submit(Request(prompt, as_mix("two"), LONG)).result()
    assert reused.reused_tokens == len(prompt) - 1  # the last token gives the logits


def test_keys_and_values_stay_within_cache_bytes_also_after_a_long_row(loaded):
    token_bytes = make_decoder(loaded).new_cache().token_bytes
    budget = 6 * 192 * token_bytes
    engine = Engine(loaded, cache_bytes=budget, prefix_bytes=0)
    for length in (8, 8, 300, 8, 8, 8, 300, 8):
        tickets = [engine.submit(Request((44,) * length, sampling=LONG)) for _ in range(9)]
        max_running = 0
        while not all(ticket.done for ticket in tickets):
            engine.step()
            max_running = max(max_running, engine.running)
            assert engine.cache_nbytes <= budget
        assert max_running >= (9 if length == 8 else 2)
    small = Engine(loaded, cache_bytes=1, prefix_bytes=0)  # one request may always run
    assert len(small.submit(Request((44,), sampling=LONG)).result().ids) == 24


# ---- sampling -------------------------------------------------------------------------------------


def test_logprobs_equal_those_of_the_model(engine, loaded):
    rules = Sampling(max_new_tokens=5, ignore_eos=True, logprobs=3)
    done = engine.submit(Request((44, 45), as_mix("a2"), rules)).result()
    assert [p.token for p in done.logprobs] == list(done.ids)
    ids = [44, 45]
    for item in done.logprobs:
        with torch.no_grad(), loaded.mixing([as_mix("a2")]):
            wanted = loaded.backbone.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert item.logprob == pytest.approx(float(wanted[item.token]), abs=1e-4)
        assert [t for t, _ in item.likeliest] == wanted.topk(3).indices.tolist()
        assert item.likeliest[0] == (item.token, item.logprob)
        ids.append(item.token)


def test_top_k_samples_only_the_likeliest_tokens(engine, loaded):
    greedy = engine.submit(Request((44,), sampling=LONG)).result()
    hot = Sampling(max_new_tokens=24, ignore_eos=True, temperature=5.0, top_k=1, seed=1)
    assert engine.submit(Request((44,), sampling=hot)).result().ids == greedy.ids
    wide = Sampling(
        max_new_tokens=24, ignore_eos=True, temperature=5.0, top_k=3, seed=1, logprobs=3
    )
    for item in engine.submit(Request((44,), sampling=wide)).result().logprobs:
        assert item.token in {token for token, _ in item.likeliest}


def test_a_strong_repetition_penalty_repeats_nothing(engine):
    free = engine.submit(Request((44,), sampling=LONG)).result()
    assert len(set(free.ids)) < len(free.ids)
    rules = Sampling(max_new_tokens=24, ignore_eos=True, repetition_penalty=1e4)
    done = engine.submit(Request((44,), sampling=rules)).result()
    assert len({*done.ids, 44}) == 25


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("repetition_penalty", math.inf),
    ],
)
def test_invalid_sampling_is_refused(field, value):
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})


# ---- ends ----------------------------------------------------------------------------------------


def test_a_cancelled_request_ends_with_the_text_so_far(engine, loaded, make_weights):
    request = Request((44, 5), as_mix("a1"), LONG)
    running, waiting = engine.submit(request), engine.submit(request)
    for _ in range(5):
        engine.step()
    running.cancel()
    done = running.result()
    assert done.reason == "cancelled"
    assert 1 <= len(done.ids) < 24
    assert done.ids == waiting.result().ids[: len(done.ids)]
    assert_all_released(loaded, make_weights)


def test_a_deadline_ends_waiting_and_running_requests(loaded):
    engine = Engine(loaded, rows=1)
    slow = engine.submit(Request((44,), sampling=Sampling(max_new_tokens=400, ignore_eos=True)))
    late = engine.submit(Request((44,), sampling=LONG, deadline=0.0))
    time.sleep(0.01)
    assert late.result().reason == "deadline"
    assert late.result().text == ""
    assert not slow.done
    slow.cancel()
    ends = engine.submit(Request((44,), sampling=Sampling(400, ignore_eos=True), deadline=0.05))
    assert ends.result().reason in {"deadline", "length"}


def test_a_full_queue_refuses_or_blocks(loaded):
    engine = Engine(loaded, rows=1, queue=2)
    first = [engine.submit(Request((44,), sampling=LONG)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(Request((44,)))
    third = engine.submit(Request((44,), sampling=LONG), block=True)
    assert third.result().ids == first[0].result().ids


def test_an_exception_in_on_text_ends_that_request_only(engine):
    def broken(piece):
        raise ValueError("no more")

    bad = engine.submit(Request((44,), as_mix("a1"), LONG), broken)
    good = engine.submit(Request((44,), as_mix("a1"), LONG))
    assert len(good.result().ids) == 24
    with pytest.raises(ValueError, match="no more"):
        bad.result()


def test_a_failed_step_ends_the_running_requests_and_later_ones_are_answered(loaded, make_weights):
    class FailsOnce(WrappedDecoder):
        fails = False

        def forward(self, *arguments):
            if self.fails:
                self.fails = False
                raise RuntimeError("out of memory")
            return super().forward(*arguments)

    engine = Engine(loaded, decoder=FailsOnce(loaded))
    request = Request((44, 5), as_mix("a1"), LONG)
    running = engine.submit(request)
    engine.step()
    engine.decoder.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        running.result()
    assert engine.submit(request).result().ids == alone(loaded, request).ids
    assert_all_released(loaded, make_weights)


def overflowing(make_weights):
    """An adapter whose weights are finite, and whose logits are not."""
    weights = make_weights(seed=1)
    return weights.with_factors({m: (a, b * 1e30) for m, (a, b) in weights.factors.items()})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}])
def test_a_row_with_nan_logits_ends_alone_and_leaves_no_nan(loaded, make_weights, sampling):
    """Attention gives masked positions weight zero, but zero times a NaN left in the cache is NaN."""
    loaded.load("wild", overflowing(make_weights))
    engine = Engine(loaded, rows=2, prefix_bytes=2**20)
    rules = Sampling(max_new_tokens=40, ignore_eos=True, **sampling)
    fine = Request(tuple(range(20, 30)), as_mix("a0"), rules)
    wild = Request(tuple(range(40, 90)), as_mix("wild"), rules)
    wanted = alone(loaded, fine).ids
    tickets = [engine.submit(r) for r in (wild, fine, wild, fine, fine)]
    for ticket in tickets:
        if ticket.request is fine:
            assert ticket.result().ids == wanted
        else:
            with pytest.raises(AdapterError, match="wild: the logits are not finite"):
                ticket.result()
    assert_all_released(loaded, make_weights)


def test_a_request_without_memory_for_its_cache_fails_alone(loaded, make_weights, monkeypatch):
    engine = Engine(loaded)
    rules = Sampling(max_new_tokens=30, ignore_eos=True)
    short = Request(tuple(range(20, 30)), as_mix("a0"), rules)
    wanted = alone(loaded, short).ids
    going = engine.submit(short)
    engine.step()
    enlarged, calls = KVCache._enlarged, iter(range(100))

    def fails(self, *args):
        if next(calls) == 1:  # some tensors are allocated already
            raise MemoryError("no memory")
        return enlarged(self, *args)

    monkeypatch.setattr(KVCache, "_enlarged", fails)
    long = engine.submit(Request(tuple(range(3, 290)), as_mix("a1"), rules))
    with pytest.raises(MemoryError):
        long.result()
    assert going.result().ids == wanted
    assert len(engine.submit(replace(long.request, mix=as_mix("a0"))).result().ids) == 30
    assert_all_released(loaded, make_weights)


def test_unknown_adapters_fail_alone(engine):
    unknown, fine = (engine.submit(Request((44,), as_mix(name), LONG)) for name in ("x", "a1"))
    with pytest.raises(UnknownNameError, match="'x'"):
        unknown.result()
    assert len(fine.result().ids) == 24


def test_all_invalid_prompts_are_named(engine):
    with pytest.raises(
        UsageError, match=r"prompt 0 is empty.*prompt 2 has 600 tokens.*at most 511"
    ):
        engine.check([Request(()), Request((1,)), Request((1,) * 600)])


def test_a_text_ends_at_the_backbones_max_length(loaded):
    engine = Engine(loaded)
    done = engine.submit(
        Request(tuple([7] * 500), sampling=Sampling(max_new_tokens=100, ignore_eos=True))
    ).result()
    assert (len(done.ids), done.reason) == (12, "length")


def test_many_threads_share_one_engine(engine, loaded):
    requests = some_requests(24, seed=5)
    expected = [alone(loaded, r).ids for r in requests]
    got = [None] * len(requests)

    def ask(n):
        got[n] = engine.submit(requests[n]).result().ids

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == expected


def test_serve_answers_requests_that_nobody_drives(engine):
    stopping = threading.Event()
    server = threading.Thread(target=engine.serve, args=(stopping,))
    server.start()
    try:
        ticket = engine.submit(Request((44,), as_mix("a1"), LONG))
        until = time.monotonic() + 30
        while not ticket.done and time.monotonic() < until:
            time.sleep(0.01)
        assert len(ticket.completion.ids) == 24
    finally:
        stopping.set()
        server.join(10)
    assert not server.is_alive()


# ---- adapters that are not loaded yet --------------------------------------------------------------


def test_other_rows_run_while_an_adapter_is_loaded(loaded, make_weights):
    gate = threading.Event()

    class Slow(LoadedOnly):
        def acquire(self, mix):
            if "late" in mix.names and "late" not in loaded.slots:
                assert gate.wait(30)
                loaded.load("late", make_weights(seed=50))
            return super().acquire(mix)

    loaded.use_source(Slow(loaded.slots))
    engine = Engine(loaded, load_in_thread=True)
    late = engine.submit(Request((44,), as_mix("late"), LONG))
    quick = engine.submit(Request((44,), as_mix("a1"), LONG))
    assert len(quick.result().ids) == 24
    assert not late.done
    gate.set()
    assert late.result().ids == alone(loaded, Request((44,), as_mix("late"), LONG)).ids


@pytest.mark.parametrize("load_in_thread", [True, False])
def test_requests_wait_for_slots_and_fail_if_there_can_be_none(model, make_weights, load_in_thread):
    library = Library(model, make_weights, 4)
    model.slots.budget = 2 * make_size(model, library.weights["a0"])
    model.use_source(library)
    engine = Engine(model, load_in_thread=load_in_thread)
    tickets = [engine.submit(Request((44, n), as_mix(f"a{n}"), LONG)) for n in range(4)]
    assert [len(t.result().ids) for t in tickets] == [24] * 4
    assert model.slots.nbytes <= model.slots.budget
    three = as_mix({f"a{n}": 0.25 for n in range(3)})
    with pytest.raises(NoRoomError, match=r"hub.unload"):
        engine.submit(Request((44,), three, LONG)).result()


def test_waiting_requests_prefetch_adapters(model, make_weights):
    """Those of the first requests in the queue, once each, before there is a row or a slot."""
    library = Library(model, make_weights, 40)
    model.use_source(library)
    model.slots.budget = 2 * make_size(model, library.weights["a0"])
    engine = Engine(model, rows=1, load_in_thread=True)
    tickets = [engine.submit(Request((44, n + 3), as_mix(f"a{n}"), LONG)) for n in range(30)]
    for _ in range(12):
        engine.step()
    assert 0 < len(library.prefetched) <= MAX_PREFETCHES + 12
    assert all(t.result().ids for t in tickets)
    assert len(library.prefetched) == len({*library.prefetched})


def test_the_least_recently_used_adapter_is_evicted(model, make_weights):
    library = Library(model, make_weights, 4)
    model.use_source(library)
    model.slots.budget = 3 * make_size(model, library.weights["a0"])
    engine = Engine(model)
    for name in ("a0", "a1", "a2", "a0", "a3"):  # a1 is the least recently used when a3 comes
        engine.submit(Request((44,), as_mix(name), LONG)).result()
    assert set(model.names) == {"a0", "a2", "a3"}
    assert library.loaded == ["a0", "a1", "a2", "a3"]


def test_ranks_share_a_budget_and_nothing_is_evicted_in_vain(model, make_weights):
    """Under a budget free bytes serve every rank; where no eviction suffices, all stay."""
    small, large = make_weights(rank=8), make_weights(rank=64)
    model.slots.budget = make_size(model, large)  # eight small ones
    for n in range(8):
        model.load(f"s{n}", small)
    assert len(model.names) == 8
    held = model.slots.hold(as_mix("s3"))
    with pytest.raises(NoRoomError):
        model.load("large", large)
    assert len(model.names) == 8
    model.slots.release(held)
    model.load("large", large)
    assert model.names == ("large",)
    model.load("s0", small)
    assert model.names == ("s0",)
    assert model.slots.nbytes <= model.slots.budget


def test_a_plan_is_reused_until_the_batch_changes_and_then_freed(loaded):
    plans = []

    class Recorder(WrappedDecoder):
        def forward(self, cache, inputs, plan):
            plans.append(weakref.ref(plan))
            return super().forward(cache, inputs, plan)

    engine = Engine(loaded, prefix_bytes=0, decoder=Recorder(loaded))
    tickets = [engine.submit(Request((44, 45), as_mix(f"a{n}"), LONG)) for n in range(3)]
    for ticket in tickets:
        ticket.result()
    assert len(plans) == 24
    assert len({id(plan) for plan in plans[1:]}) == 1  # one for the prompts, one for 23 steps
    gc.collect()
    assert not any(plan() for plan in plans)  # a plan would keep its slots


def test_a_running_row_ends_at_its_deadline(loaded):
    engine = Engine(loaded)
    rules = Sampling(max_new_tokens=400, ignore_eos=True)
    late = engine.submit(Request((44,), as_mix("a1"), rules, deadline=0.2))
    engine.drive(lambda: engine.running == 1)
    time.sleep(0.2)  # a fast machine makes all 400 tokens in that time
    done = late.result()
    assert done.reason == "deadline"
    assert 0 < len(done.ids) < 400


def test_newer_prompts_of_another_mix_do_not_overtake_an_old_one(loaded):
    """Prompts of one mix are computed together, but the mix of the oldest one comes first."""
    engine = Engine(loaded, rows=8, chunk=16, prefix_bytes=0)
    long = tuple(range(3, 35))
    engine.submit(Request(long, as_mix("a0"), LONG))
    last = engine.submit(Request(long, as_mix("a5"), LONG))
    newer = []
    for n in range(6):
        engine.step()
        newer.append(engine.submit(Request((*long, 40 + n), as_mix("a0"), LONG)))
    assert last.result().ids == alone(loaded, last.request).ids

    def first_token_time(ticket):
        return ticket.submitted + ticket.result().first_token_seconds

    assert first_token_time(last) < min(map(first_token_time, newer))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=30))
def test_slots_never_overlap_and_stay_within_their_budget(slots_of, events):
    slots, weights, size = slots_of
    slots.budget, held = 3 * size, []
    for n, what in events:
        name = f"n{n}"
        if what == 0:
            try:
                slots.load(name, weights)
            except NoRoomError:
                assert len({r for h in held for r, _ in h.weights}) >= 3
        elif what >= 3:  # filled ahead, then taken or refused
            with slots.stage(lambda own: own is weights) as ahead:
                before = slots.names
                ahead.fill(weights)
                ahead.fill(weights)
                assert slots.names == before
                if what == 3 and len({r for h in held for r, _ in h.weights}) < 3:
                    slots.load(name, weights, None, ahead)
        elif what == 1 and name in slots:
            held.append(slots.hold(as_mix(name)))
        elif held:
            slots.release(held.pop(n % len(held)))
        assert slots.nbytes <= slots.budget
        assert_no_overlap(slots, held)
    for lease in held:
        slots.release(lease)
    assert_all_can_be_freed(slots, weights)


def assert_all_can_be_freed(slots, weights):
    """After all adapters are unloaded, as many fit as the budget allows: three."""
    for name in slots.names:
        slots.unload(name)
    for n in range(3):
        slots.load(f"new{n}", weights)
    assert slots.names == ("new0", "new1", "new2")
    for name in slots.names:
        slots.unload(name)


def assert_no_overlap(slots, leases):
    """No two of the adapters that are named or leased share a slot."""
    named = [slots.hold(as_mix(name)) for name in slots.names]
    records = {r for lease in [*leases, *named] for r, _ in lease.weights}
    assert len({(id(r.place[0]), r.place[1]) for r in records}) == len(records)
    for lease in named:
        slots.release(lease)


@pytest.fixture(scope="module")
def slots_of(pico_folder):
    model = AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cpu"))
    weights = initial_weights(model.shapes, rank=4, alpha=8, seed=0)
    return model.slots, weights, make_size(model, weights)


def test_a_pinned_adapter_is_not_evicted(model, make_weights):
    model.slots.budget = 2 * make_size(model, make_weights(rank=4))
    model.slots.pinned.add("x0")
    for n in range(5):
        model.load(f"x{n}", make_weights(seed=n, rank=3))
    assert model.names == ("x0", "x4")


def test_slots_are_sized_by_rank(model, make_weights):
    """A large adapter does not enlarge small slots, and rows of both ranks run in one batch."""
    model.load("small", make_weights(rank=4, seed=1))
    before = model.slots.nbytes
    model.load("large", make_weights(rank=60, seed=2))
    assert model.slots.nbytes == before * 9  # a slot of rank 8 and one of rank 64
    names = ["small", "large", None, {"small": 0.5, "large": 2.0}]
    engine = Engine(model)
    tickets = [engine.submit(Request((44, 45), as_mix(n), LONG)) for n in names]
    for name, ticket in zip(names, tickets, strict=True):
        assert ticket.result().ids == alone(model, Request((44, 45), as_mix(name), LONG)).ids
        with torch.no_grad(), model.mixing([as_mix(name)]):
            logits = model.backbone.model(torch.tensor([[44, 45]])).logits[0, -1]
        assert ticket.result().ids[0] == int(logits.argmax())
