"""AdapterFetcher: one load between two steps, errors of loads, and leases that are released."""

import pytest

from adapterhub_chat.errors import NoRoomError, UnknownNameError
from adapterhub_chat.inference.fetching import AdapterFetcher
from adapterhub_chat.inference.requests import Request, Ticket
from adapterhub_chat.model.source import LoadedOnly
from adapterhub_chat.types import as_mix


class Library(LoadedOnly):
    """Loads the adapters "a0" to "a3" when they are acquired."""

    def __init__(self, model, make_weights):
        super().__init__(model.slots)
        self.model = model
        self.weights = {f"a{n}": make_weights(seed=n, rank=4) for n in range(4)}

    def acquire(self, mix):
        return self.model.slots.acquire(mix, lambda n: self.model.load(n, self.weights[n]))


@pytest.fixture
def library(model, make_weights):
    model.use_source(Library(model, make_weights))
    return model


@pytest.fixture
def one_slot(library):
    """The library over a model with room for one adapter."""
    weights = library.source.weights["a0"]
    library.slots.budget = library.slots._layout(weights)[1]
    return library


def ticket_of(name):
    return Ticket(Request((44,), as_mix(name)), engine=None)


def test_one_adapter_is_loaded_between_two_steps(library):
    fetcher = AdapterFetcher(library, load_in_thread=False)
    first, second = ticket_of("a0"), ticket_of("a1")
    fetcher.begin_step(idle=False)
    assert fetcher.take(first, idle=False) is None  # loaded now, taken in the next step
    assert fetcher.take(second, idle=False) is None
    assert library.names == ("a0",)
    fetcher.begin_step(idle=False)
    lease = fetcher.take(first, idle=False)
    assert [record.place for record, _ in lease.weights]
    assert fetcher.take(second, idle=False) is None
    assert library.names == ("a0", "a1")


@pytest.mark.parametrize("load_in_thread", [True, False])
def test_a_forgotten_request_releases_its_adapters(one_slot, load_in_thread):
    fetcher = AdapterFetcher(one_slot, load_in_thread)
    ticket = ticket_of("a0")
    fetcher.begin_step(idle=True)
    assert fetcher.fetch(ticket, idle=True)
    fetcher.wait(30)
    fetcher.forget(ticket)
    assert not fetcher.pending
    one_slot.slots.release(one_slot.source.acquire(as_mix("a1")))
    assert one_slot.names == ("a1",)


def test_a_request_waits_for_a_slot_unless_nothing_runs(one_slot):
    lease = one_slot.source.acquire(as_mix("a0"))
    several = ticket_of({f"a{n}": 1.0 for n in range(4)})
    fetcher = AdapterFetcher(one_slot, load_in_thread=False)
    fetcher.begin_step(idle=False)
    assert fetcher.take(several, idle=False) is None
    assert fetcher.take(several, idle=False) is None  # no room: it waits
    one_slot.slots.release(lease)
    fetcher.slots_released()
    fetcher.begin_step(idle=True)
    assert fetcher.take(several, idle=True) is None
    with pytest.raises(NoRoomError):
        fetcher.take(several, idle=True)


def test_an_error_of_a_load_is_raised_by_take(model):
    fetcher = AdapterFetcher(model, load_in_thread=False)
    ticket = ticket_of("unknown")
    fetcher.begin_step(idle=True)
    assert fetcher.take(ticket, idle=True) is None
    with pytest.raises(UnknownNameError):
        fetcher.take(ticket, idle=True)
