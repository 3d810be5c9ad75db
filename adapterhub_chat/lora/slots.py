"""Slots: which adapter lives where in device memory, under a budget of bytes.

Slots of one layout (sites and rank bucket) are allocated a few at a time, under a budget one at a time (what
is free then is free for every layout), and used again and again. The least recently used adapter makes room;
one that is in use or pinned is never evicted nor overwritten: a name that is loaded anew gets another slot,
and the old content goes when its last user has left.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch

from adapterhub_chat.errors import NoRoomError, UnknownNameError
from adapterhub_chat.lora.bank import Bank, BankLayout
from adapterhub_chat.lora.plan import MixPlace, Plan
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.types import BACKBONE, Mix

SEGMENT = 4
"""Slots that are allocated together where nothing bounds them."""
SMALLEST_RANK = 8
"""Ranks are rounded up to a power of two from here on: few layouts, and products of fast widths."""

NewBank = Callable[[Sequence[str], int, int, int], Bank]
"""(modules, slots, rank, labels) -> an empty bank."""

Write = Callable[[Bank, int, AdapterWeights], None]
"""Puts an adapter into a slot of a bank."""

_fresh, _clock = itertools.count(), itertools.count()


@dataclass(eq=False)
class Resident:
    """One adapter's content in a slot."""

    place: MixPlace
    identity: str
    """Its content's hash, else something that no other content has."""
    like: AdapterWeights
    """Modules, ranks and alphas; the factors have shapes only."""
    users: int = 0
    current: bool = True
    """Whether a name means this content."""
    used: int = field(default_factory=lambda: next(_clock))
    """When it was held last: larger is later."""


@dataclass(frozen=True)
class Lease:
    """A mix whose adapters stay as they are now, whatever is loaded or unloaded, until it is released."""

    mix: Mix
    weights: tuple[tuple[Resident, float], ...] = ()

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """What the mix computes: contents and weights, whatever the adapters are called."""
        return tuple(sorted((resident.identity, weight) for resident, weight in self.weights))


@dataclass(eq=False)
class _Segment:
    bank: Bank
    free: list[int] = field(default_factory=list)


class Slots:
    """Names, slots, users and the budget. Safe from several threads; no lock is held while numbers move."""

    def __init__(
        self, new_bank: NewBank, budget: int | None = None, write: Write = Bank.write
    ) -> None:
        """Start empty; `budget` bounds the bytes of all slots (None: no bound), `write` fills one."""
        self.budget = budget
        self.pinned: set[str] = set()
        self.loads = 0
        """How often an adapter was put into a slot."""
        self._new_bank, self._write = new_bank, write
        self._names: dict[str, Resident] = {}
        self._segments: list[_Segment] = []
        self._layouts: dict[tuple[tuple[str, ...], int, int], tuple[BankLayout, int]] = {}
        self._likes: dict[object, AdapterWeights] = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are here, in the order of loading."""
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether an adapter of that name is here."""
        return name in self._names

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(segment.bank.nbytes() for segment in self._segments)

    def load(
        self,
        name: str,
        weights: AdapterWeights,
        identity: str | None = None,
        ahead: StagedSlot | None = None,
    ) -> None:
        """Put an adapter into a slot; under a name in use it replaces that adapter for new users.

        The slot that was filled `ahead` with these weights is taken, where there is one. Raises NoRoomError,
        with nothing changed, when the budget is spent on adapters in use.
        """
        place = ahead.take(weights) if ahead else None
        if place is None:
            with self._lock:
                place = self._room(weights, name)
            self._fill(place, weights)
        like = self._like(weights)
        with self._lock:
            self._forget(name)
            own = f"unnamed content {next(_fresh)}" if identity is None else identity
            self._names[name] = Resident(place, own, like)
            self.loads += 1

    @contextmanager
    def ahead(self, fits: Callable[[AdapterWeights], bool]) -> Iterator[StagedSlot]:
        """Give who fills a slot ahead of `load`; a slot that was not taken is free again after the block."""
        own = StagedSlot(self, fits)
        try:
            yield own
        finally:
            own.clear()

    def fill_free(self, weights: AdapterWeights) -> MixPlace | None:
        """Fill a slot that nobody has and that nobody must leave for it; None where there is none."""
        with self._lock:
            place = self._free(weights)
        if place is not None:
            self._fill(place, weights)
        return place

    def _fill(self, place: MixPlace, weights: AdapterWeights) -> None:
        try:
            self._write(*place, weights)
        except BaseException:
            self.give_back(place)
            raise

    def give_back(self, place: MixPlace) -> None:
        """Make a slot free that no name means and nobody uses."""
        with self._lock:
            segment = next(s for s in self._segments if s.bank is place[0])
            segment.free.append(place[1])

    def unload(self, name: str) -> None:
        """Take the name away; the slot is free when its last user has left."""
        with self._lock:
            self._resident(name)
            self._forget(name)

    def weights(self, name: str) -> AdapterWeights:
        """Return a copy of an adapter's numbers, as they were rounded when it was loaded."""
        with self.borrowed(self.hold(Mix(((name, 1.0),)))) as held:
            resident = held.weights[0][0]
            bank, slot = resident.place
            return bank.read(slot, resident.like)

    def hold(self, mix: Mix) -> Lease:
        """Keep the mix's adapters until `release`; raise UnknownNameError for one that is not here."""
        with self._lock:
            found = tuple((self._resident(name), weight) for name, weight in mix.weights)
            for resident, _ in found:
                resident.users += 1
                resident.used = next(_clock)
            return Lease(mix, found)

    def acquire(self, mix: Mix, load: Callable[[str], None]) -> Lease:
        """Hold a mix after `load(name)` for each adapter that is not here.

        Each is held as soon as it is there, so that the next one's load cannot evict it. Raises what
        `load` raises, NoRoomError for one.
        """
        with ExitStack() as stack:
            for name in mix.names:
                stack.enter_context(self._one(name, load))
            return self.hold(mix)

    @contextmanager
    def _one(self, name: str, load: Callable[[str], None]) -> Iterator[None]:
        held = None
        while held is None:
            if name not in self:
                load(name)
            with suppress(UnknownNameError):  # evicted in between, by somebody else's load
                held = self.hold(Mix(((name, 1.0),)))
        with self.borrowed(held):
            yield

    def release(self, held: Lease) -> None:
        """End what `hold` began."""
        with self._lock:
            for resident, _ in held.weights:
                resident.users -= 1
                if not resident.users and not resident.current:
                    self.give_back(resident.place)

    @contextmanager
    def borrowed(self, held: Lease) -> Iterator[Lease]:
        """Release what is held when the block ends."""
        try:
            yield held
        finally:
            self.release(held)

    def _like(self, weights: AdapterWeights) -> AdapterWeights:
        """Return modules, shapes and alphas without numbers, one object for all that agree in them."""
        key = (*weights.shapes.items(), *weights.alphas.items()), weights.rslora, weights.labels
        if (found := self._likes.get(key)) is None:
            found = self._likes.setdefault(key, weights.shapes_only())
        return found

    # -- inside, under the lock --------------------------------------------------------------------

    def _resident(self, name: str) -> Resident:
        if name not in self._names:
            cure = "Load it first with hub.load(name)."
            raise UnknownNameError("adapter", name, [*self._names, BACKBONE], cure)
        return self._names[name]

    def _forget(self, name: str) -> None:
        old = self._names.pop(name, None)
        if old is not None:
            old.current = False
            if not old.users:
                self.give_back(old.place)

    def _room(self, weights: AdapterWeights, name: str) -> MixPlace:
        """Return a slot of the right layout that nobody has: a free one, a new one, or after evictions.

        Raises NoRoomError before anybody has to go in vain.
        """
        place = self._free(weights)
        if place is None:
            self._check_room(self._layout(weights)[1], name)
        while place is None:
            if not self._drop_an_empty_segment():
                self._forget(self._idle()[0])
            place = self._free(weights)
        return place

    def _free(self, weights: AdapterWeights) -> MixPlace | None:
        """Return a slot of the right layout that is free or that the budget still allows."""
        layout, size = self._layout(weights)
        for segment in self._segments:
            if segment.free and segment.bank.layout == layout:
                return segment.bank, segment.free.pop()
        if self.budget is not None and self.nbytes + size > self.budget:
            return None
        slots, (modules, rank, labels) = SEGMENT if self.budget is None else 1, _kind(weights)
        bank = self._new_bank(modules, slots, rank, labels)
        self._segments.append(_Segment(bank, list(range(slots - 1))))
        return bank, slots - 1

    def _layout(self, weights: AdapterWeights) -> tuple[BankLayout, int]:
        """Return the layout that these weights need, and the bytes of a slot of it."""
        kind = modules, rank, labels = _kind(weights)
        if kind not in self._layouts:
            trial = self._new_bank(modules, 0, rank, labels)
            self._layouts[kind] = trial.layout, trial.slot_bytes
        return self._layouts[kind]

    def _drop_an_empty_segment(self) -> bool:
        for segment in self._segments:
            if len(segment.free) == segment.bank.slots:
                self._segments.remove(segment)
                return True
        return False

    def _idle(self) -> list[str]:
        """Return the adapters that may be evicted, the least recently used first."""
        idle = [n for n, r in self._names.items() if not r.users and n not in self.pinned]
        return sorted(idle, key=lambda name: self._names[name].used)

    def _check_room(self, size: int, wanted: str) -> None:
        """Raise NoRoomError where even without all idle adapters there were no room for so many bytes."""
        assert self.budget is not None
        idle = sum(self._names[name].place[0].slot_bytes for name in self._idle())
        free = sum(len(s.free) * s.bank.slot_bytes for s in self._segments)
        if self.nbytes - free - idle + size <= self.budget:
            return
        raise NoRoomError(
            f"adapter {wanted!r} needs {size / 2**20:.1f} MiB, and the {self.budget / 2**20:.1f} MiB "
            f"for loaded adapters are all in use ({', '.join(self._names) or 'nothing is loaded'}); "
            "call hub.unload(name), take names out of hub.model.slots.pinned, wait for running requests, "
            "or give AdapterHub more adapter_bytes"
        )


class StagedSlot:
    """A slot that is filled before anybody knows whether its adapter may be used; see Slots.ahead."""

    def __init__(self, slots: Slots, fits: Callable[[AdapterWeights], bool]) -> None:
        """Have filled none; what does not fit is left for `load` to refuse."""
        self._slots, self._fits = slots, fits
        self._filled: tuple[MixPlace, AdapterWeights] | None = None

    def fill(self, weights: AdapterWeights) -> None:
        """Fill a free slot, if there is one; what was filled before is free again."""
        self.clear()
        place = self._slots.fill_free(weights) if self._fits(weights) else None
        self._filled = None if place is None else (place, weights)

    def take(self, weights: AdapterWeights) -> MixPlace | None:
        """Return the slot that has these very weights, and leave it to the caller."""
        if self._filled is None or self._filled[1] is not weights:
            return None
        place, self._filled = self._filled[0], None
        return place

    def clear(self) -> None:
        """Give the slot back that nobody took."""
        if self._filled is not None:
            self._slots.give_back(self._filled[0])
            self._filled = None


def _kind(weights: AdapterWeights) -> tuple[tuple[str, ...], int, int]:
    """Return what decides about a layout: modules, rank bucket, labels."""
    rank = SMALLEST_RANK
    while rank < weights.max_rank:
        rank *= 2
    return tuple(weights.factors), rank, weights.labels


def plan_of(held: Sequence[Lease]) -> Plan | None:
    """Return the plan that gives row i the mix `held[i]`; None when no row has an adapter."""
    residents = list(dict.fromkeys(r for one in held for r, _ in one.weights))
    if not residents:
        return None
    column = {resident: n for n, resident in enumerate(residents)}
    matrix = torch.zeros(len(held), len(residents))
    for row, one in enumerate(held):
        for resident, weight in one.weights:
            matrix[row, column[resident]] += weight
    plan = Plan([resident.place for resident in residents], matrix)
    return None if plan.empty else plan
