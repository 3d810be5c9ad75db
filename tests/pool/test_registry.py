"""A registry with bounded memory, which several threads load from: what is loaded is what the pool has."""

import random
import threading
import time
from functools import partial

import pytest
import torch
from pico import keep_adapter

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.manifest import StackBase
from adapterhub_chat.errors import AdapterError, NoRoomError, UsageError
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.pool.registry import _identity
from adapterhub_chat.transfer.candidates import _temporarily_loaded as on_trial
from adapterhub_chat.types import Mix, as_mix

RULES = Sampling(max_new_tokens=6, ignore_eos=True)
PROMPT = tuple(range(20, 30))


@pytest.fixture
def bounded(hub, pico_folder, make_weights):
    """bounded(slots) -> a hub on a pool of a, b, c of rank 4, with memory for so many of them."""
    for seed, name in enumerate("abc", 1):
        keep_adapter(hub, make_weights(seed=seed), name)
    size = hub.model.slots._layout(make_weights())[1]

    def make(slots, **options):
        options = {"dtype": "fp32", "device": "cpu", "adapter_bytes": slots * size, **options}
        return AdapterHub(str(pico_folder), hub.pool.root, **options)

    return make


def texts(hub, names):
    return hub.generate(["good film"] * len(names), names, max_new_tokens=6, ignore_eos=True)


def test_more_adapters_than_slots(hub, bounded):
    tight = bounded(1)
    names = ["a", "b", None, "c", "a"]
    each = [texts(tight, [name])[0] for name in names]
    assert each == texts(hub, names)
    assert tight.model.slots.nbytes <= tight.model.slots.budget


def test_a_first_probe_needs_no_second_slot(hub, bounded):
    (hub.pool.root / ".probes").unlink()
    tight = bounded(1)
    for name in "abc":
        tight.load(name)
        assert tight.model.names == (name,)


def test_a_refused_load_frees_the_slot_that_it_had_staged(hub, bounded):
    file = hub.pool.path("a") / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    tight = bounded(1)
    with pytest.raises(AdapterError, match="sha256"):  # known only after the slot was filled
        tight.load("a")
    assert tight.model.names == ()
    tight.load("b")
    assert tight.model.names == ("b",)
    assert tight.model.slots.nbytes <= tight.model.slots.budget


def test_a_transfer_candidate_is_not_evicted_by_other_loads(bounded, make_weights):
    tight = bounded(2)
    with on_trial(tight.model, make_weights(seed=9)) as mix:
        before = tight.model.slots.num_loads
        chat = threading.Thread(target=lambda: [texts(tight, [name]) for name in "abc"])
        chat.start()
        chat.join()
        assert tight.model.slots.num_loads > before + 2
        with tight.model.mixing([mix]):
            assert mix.names[0] in tight.model.names
    assert tight.model.names == ("c",)
    assert not tight.model.slots.pinned


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_a_stack_that_can_never_fit_is_an_error(hub, bounded):
    manifest = hub.pool.manifest("b")
    under = StackBase(name="a", sha256=hub.pool.manifest("a").sha256)
    hub.pool.describe("b", manifest.model_copy(update={"stack": (under,), "probe": None}))
    tight = bounded(1)
    tight.load("b")
    ticket = tight.engine.submit(Request(PROMPT, as_mix("b"), RULES))
    stop = time.monotonic() + 20
    tight.engine.drive(lambda: ticket.done or time.monotonic() > stop)
    assert isinstance(ticket.error, NoRoomError)
    assert len(texts(bounded(2), ["b"])) == 1


def test_slots_loaded_in_inference_mode_can_be_overwritten_outside(hub, bounded, make_weights):
    keep_adapter(hub, make_weights(rank=16, seed=7), "wide")
    tight = bounded(2)
    with torch.inference_mode():
        tight.load("wide")
    tight.unload("wide")
    keep_adapter(tight, make_weights(rank=12, seed=8), "narrow")  # into the same slot, in part
    assert tight.model.names == ("narrow",)


@pytest.mark.parametrize("change", ["keep", "rollback"])
def test_a_new_version_without_room_is_loaded_by_the_next_request(
    hub, bounded, make_weights, change
):
    keep_adapter(hub, make_weights(seed=9), "a")
    new = texts(hub, ["a"])
    hub.rollback("a")
    old = texts(hub, ["a"])
    assert new != old
    tight = bounded(1)
    tight.load("a")
    running = tight.model.source.acquire(as_mix("a"))
    before = tight.model.slots.names
    if change == "rollback":
        tight.rollback("a")
    else:
        with pytest.raises(NoRoomError):  # the probe needs a slot: nothing is saved
            keep_adapter(tight, make_weights(seed=9), "a")
        assert tight.model.slots.names == before
    tight.model.slots.release(running)
    assert texts(tight, ["a"]) == (new if change == "rollback" else old)
    assert texts(bounded(1), ["a"]) == texts(tight, ["a"])


def test_a_stale_read_does_not_replace_a_new_version(hub, make_weights, monkeypatch):
    keep_adapter(hub, make_weights(seed=1), "a")
    reading, read = threading.Event(), hub.pool.load

    def slowly(*args):
        stored = read(*args)
        reading.set()
        time.sleep(0.3)  # in which the other one would save and load its version
        return stored

    monkeypatch.setattr(hub.pool, "load", slowly)
    loader = threading.Thread(target=hub.load, args=("a",))
    loader.start()
    reading.wait(10)
    keep_adapter(hub, make_weights(seed=2), "a")
    loader.join(10)
    assert hub._registry.known("a").manifest == hub.pool.manifest("a")
    here, wanted = hub.model.weights("a"), read("a").weights
    for module, (_, b) in wanted.factors.items():
        torch.testing.assert_close(here.factors[module][1], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_default_adapter_does_not_affect_requests_with_their_own(
    pico_folder, tmp_path, make_weights, quantize
):
    """The engine's rows have mixes of their own, also where the layers' own products are used."""
    own = AdapterHub(
        str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu", quantize=quantize
    )
    keep_adapter(own, make_weights(seed=1))
    wanted = texts(own, [None, "toy"])
    ids = torch.tensor([PROMPT])
    states = own.engine.decoder.early_states(ids)
    with own.use("toy"):
        assert texts(own, [None, "toy"]) == wanted
        torch.testing.assert_close(own.engine.decoder.early_states(ids), states)


# ---- between the disk and the slots ------------------------------------------------------------------


def test_a_cached_adapter_is_not_read_from_disk_again(hub, bounded):
    names = ["a", "b", "c", "a", "b", "c"]
    wanted = [texts(hub, [name])[0] for name in names]
    tight = bounded(1, ram_bytes=10**6)
    cache = tight._registry.host_cache
    assert [texts(tight, [name])[0] for name in names] == wanted
    assert cache.num_hits == 3
    assert 0 < cache.nbytes <= cache.budget
    assert bounded(1)._registry.host_cache.budget == 0  # a CPU's slots are this memory themselves


@pytest.mark.parametrize("change", ["save", "rollback", "describe", "break"])
def test_an_adapter_that_changed_on_disk_is_read_again(hub, bounded, make_weights, change):
    keep_adapter(hub, make_weights(seed=9), "a")
    tight = bounded(1, ram_bytes=10**6)
    for name in "ab":
        tight.load(name)
    if change == "save":
        keep_adapter(hub, make_weights(seed=11), "a")
    elif change == "rollback":
        hub.rollback("a")
    elif change == "describe":
        new = hub.pool.manifest("a").model_copy(update={"about": "other words"})
        hub.pool.describe("a", new)
    else:
        file = hub.pool.path("a") / "adapter_model.safetensors"
        broken = bytearray(file.read_bytes())
        broken[-1] ^= 1
        file.write_bytes(broken)
        with pytest.raises(AdapterError, match="sha256"):
            tight.load("a")
        return
    assert tight._registry.host_cache.num_hits == 0
    tight.load("a")
    assert tight._registry.host_cache.num_hits == 0
    assert tight._registry.known("a").manifest == hub.pool.manifest("a")
    assert texts(tight, ["a"]) == texts(bounded(1), ["a"])


def test_a_cached_adapter_can_be_loaded_under_other_names(hub, bounded):
    tight = bounded(3, ram_bytes=10**6)
    folder = hub.pool.path("a")
    assert [tight.load("a", "x"), tight.load("a"), tight.load(folder, "y")] == ["x", "a", "y"]
    tight.unload("a")
    assert tight.load("a") == "a"
    assert tight._registry.host_cache.num_hits == 3
    assert tight.load(folder) == "a"


def test_the_host_cache_has_a_budget(hub, bounded):
    size = hub.pool.load("a").weights.nbytes
    tight = bounded(1, ram_bytes=2 * size)
    for name in "abc":
        tight.load(name)
    cache = tight._registry.host_cache
    assert cache.nbytes == 2 * size
    assert cache.get(hub.pool.root / "a") is None
    assert cache.get(hub.pool.root / "c") is not None
    assert bounded(1, ram_bytes=size - 1).load("a") == "a"  # too large to be kept: read each time


def test_a_prefetched_adapter_is_loaded_without_the_disk(hub, bounded, monkeypatch):
    tight = bounded(1, ram_bytes=10**6)
    tight.model.source.prefetch(as_mix("a"))
    tight.model.source.prefetch(as_mix("nobody"))  # whoever asks for it is told
    assert tight.model.names == ()
    monkeypatch.setattr(tight.pool, "load", None)
    assert texts(tight, ["a"]) == texts(hub, ["a"])


def test_a_request_waits_while_all_slots_are_in_use(hub, bounded):
    """Also the very first one for an adapter: its contract is known before it has a slot."""
    tight = bounded(1)
    (hub.pool.root / ".probes").unlink()  # so that the probe, too, finds no slot
    running = tight.engine.submit(Request(PROMPT, tight._registry.resolve(["a"])[0], RULES))
    tight.engine.drive(lambda: tight.engine.running == 1)
    assert texts(tight, ["b"]) == texts(hub, ["b"])
    assert running.result().reason == "length"
    tight.model.slots.pinned.add("b")
    with pytest.raises(NoRoomError):  # for which nobody will make room
        texts(tight, ["c"])


def test_a_new_version_serves_new_requests_and_the_old_one_those_that_run(
    hub, bounded, make_weights
):
    """Through the engine, and back again by one call."""
    long = Sampling(max_new_tokens=40, ignore_eos=True)
    request = Request(PROMPT, as_mix("a"), long)

    def ask():
        return hub.engine.submit(request)

    hub.load("a")
    old = ask().result().ids
    running = ask()
    hub.engine.drive(lambda: hub.engine.running == 1)
    hub.engine.step()
    keep_adapter(hub, make_weights(seed=9), "a")
    new = ask()
    assert running.result().ids == old
    assert new.result().ids != old
    hub.rollback("a")
    assert ask().result().ids == old
    hub.rollback("a")
    assert ask().result().ids == new.result().ids


# ---- all at once --------------------------------------------------------------------------------------


class Publisher:
    """Publishes adapters into a hub's pool, and remembers every content that there ever was."""

    def __init__(self, hub, make_weights, count):
        self.hub, self.make, self.contents = hub, make_weights, {}
        for n in range(count):
            self.publish(f"a{n}", seed=n)

    def publish(self, name, seed):
        keep_adapter(self.hub, self.make(seed=seed, rank=(4, 12)[seed % 2]), name)
        stored = self.hub.pool.load(name)
        self.contents[_identity(stored)] = name, stored.weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "load_in_thread"), [(None, True), (None, False), ("nf4", True)]
)
def test_five_hundred_requests_over_fifty_adapters(
    pico_folder, tmp_path, make_weights, quantize, load_in_thread
):
    """Joins, cancels, evictions, re-publishes and rollbacks go on: a request is answered by a content that
    its adapter's name had, the one that it began with, and by no other."""
    options = {"dtype": "fp32", "device": "cpu", "quantize": quantize}
    make = partial(AdapterHub, str(pico_folder), tmp_path / "pool", **options)
    publisher, rng, began = Publisher(make(), make_weights, 50), random.Random(7), {}
    size = publisher.hub.model.slots._layout(make_weights(rank=12))[1]
    own = publisher.hub = make(adapter_bytes=14 * size, ram_bytes=200_000)
    slots = own.model.slots
    engine = Engine(own.model, rows=12, chunk=64, load_in_thread=load_in_thread)
    start = engine._batch.start
    engine._batch.start = lambda row: (began.update({row.ticket: row.lease.key}), start(row))
    tickets, refused = [], 0
    for n in range(500):
        prompt = tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 70)))
        rules = Sampling(max_new_tokens=rng.randrange(1, 20), ignore_eos=rng.random() < 0.5)
        choice = rng.choice([None, *(f"a{n}" for n in range(50))])
        tickets.append(engine.submit(Request(prompt, as_mix(choice), rules)))
        if rng.random() < 0.6:
            engine.step()
        if rng.random() < 0.1:
            rng.choice(tickets).cancel()
        try:
            if rng.random() < 0.1:
                publisher.publish(f"a{rng.randrange(50)}", seed=1000 + n)
            if n % 50 == 49:
                own.rollback(f"a{rng.randrange(50)}")
        except (UsageError, NoRoomError):  # it has no earlier version, or all are in use just now
            refused += 1
        assert slots.nbytes <= slots.budget
    done = [ticket.result() for ticket in tickets]
    assert engine.running == engine.waiting == 0
    reasons = [completion.reason for completion in done]
    assert 10 < reasons.count("cancelled") < 100
    assert len({key[0][0] for key in began.values() if key}) > 60  # contents that answered
    assert refused < 10
    slots.budget = None
    for ticket, key in began.items():
        check_against_its_content(ticket, key, publisher)


def check_against_its_content(ticket, key, publisher):
    """The text, or its beginning when it was cancelled, is what the content gives alone."""
    request, got, mix, model = ticket.request, ticket.completion, Mix(), publisher.hub.model
    if key:
        name, weights = publisher.contents[key[0][0]]
        assert name == request.mix.names[0]
        model.load("probe", weights)
        mix = as_mix("probe")
    alone = Engine(model, prefix_bytes=0).submit(Request(request.prompt, mix, request.sampling))
    wanted = alone.result()
    assert got.ids == (wanted.ids[: len(got.ids)] if got.reason == "cancelled" else wanted.ids)
