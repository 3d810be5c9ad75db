"""A shelf with bounded memory, which several threads load from: what is loaded is what the pool has."""

import threading
import time

import pytest
import torch
from conftest import keep_adapter

from adapterhub_chat import AdapterHub
from adapterhub_chat.errors import NoRoomError
from adapterhub_chat.manifest import Under
from adapterhub_chat.requests import Request
from adapterhub_chat.sampling import Sampling
from adapterhub_chat.types import as_mix

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


def test_more_adapters_than_there_is_room_for(hub, bounded):
    tight = bounded(1)
    names = ["a", "b", None, "c", "a"]
    each = [texts(tight, [name])[0] for name in names]
    assert each == texts(hub, names)
    assert tight.model.slots.nbytes <= tight.model.slots.budget


def test_an_adapter_whose_probe_was_never_asked_needs_no_second_slot(hub, bounded):
    (hub.pool.root / ".probes").unlink()
    tight = bounded(1)
    for name in "abc":
        tight.load(name)
        assert tight.model.names == (name,)


def test_a_stack_for_which_there_never_is_room_is_said(hub, bounded):
    manifest = hub.pool.manifest("b")
    under = Under(name="a", sha256=hub.pool.manifest("a").sha256)
    hub.pool.describe("b", manifest.model_copy(update={"stack": (under,), "probe": None}))
    tight = bounded(1)
    tight.load("b")
    ticket = tight.engine.submit(Request(PROMPT, as_mix("b"), RULES))
    stop = time.monotonic() + 20
    tight.engine.drive(lambda: ticket.done or time.monotonic() > stop)
    assert isinstance(ticket.error, NoRoomError)
    assert len(texts(bounded(2), ["b"])) == 1


def test_what_is_loaded_inside_inference_mode_can_be_written_outside(hub, bounded, make_weights):
    keep_adapter(hub, make_weights(rank=16, seed=7), "wide")
    tight = bounded(2)
    with torch.inference_mode():
        tight.load("wide")
    tight.unload("wide")
    keep_adapter(tight, make_weights(rank=12, seed=8), "narrow")  # into the same slot, in part
    assert tight.model.names == ("narrow",)


@pytest.mark.parametrize("change", ["keep", "rollback"])
def test_a_new_version_that_has_no_room_beside_the_old_one_is_the_next_ones(
    hub, bounded, make_weights, change
):
    keep_adapter(hub, make_weights(seed=9), "a")
    new = texts(hub, ["a"])
    hub.rollback("a")
    old = texts(hub, ["a"])
    assert new != old
    tight = bounded(1)
    tight.load("a")
    running = tight.model.acquire(as_mix("a"))
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


def test_an_old_version_that_was_read_early_does_not_replace_a_new_one(
    hub, make_weights, monkeypatch
):
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
    assert hub._shelf.known("a").manifest == hub.pool.manifest("a")
    here, wanted = hub.model.weights("a"), read("a").weights
    for module, (_, b) in wanted.factors.items():
        torch.testing.assert_close(here.factors[module][1], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_default_adapter_is_nobody_elses(pico_folder, tmp_path, make_weights, quantize):
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
