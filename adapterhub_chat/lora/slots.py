"""Slots: the loaded adapters in device memory, with LRU eviction under a budget in bytes.

Slots of one layout (sites and rank bucket) are allocated a few at a time, or one at a time under a budget, so
that freed memory can serve any layout; they are reused. The least recently used adapter is evicted first; an
adapter in use or pinned is never evicted or overwritten: reloading its name takes another slot, and the old
content is freed when its last user releases it.
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
from adapterhub_chat.lora.plan import BankSlot, Plan
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.types import BACKBONE, Mix

SEGMENT_SLOTS = 4
"""Number of slots that are allocated together without a budget."""
MIN_RANK_BUCKET = 8
"""Smallest rank bucket; ranks are rounded up to powers of two, for few layouts and fast products."""

NewBank = Callable[[Sequence[str], int, int, int], Bank]
"""(modules, slots, rank, labels) -> an empty bank."""

WriteSlot = Callable[[Bank, int, AdapterWeights], None]
"""Writes an adapter into a slot of a bank."""

_content_ids, _clock = itertools.count(), itertools.count()


@dataclass(eq=False)
class Resident:
    """One adapter's content in a slot."""

    place: BankSlot
    identity: str
    """Hash of the content, else a unique name."""
    template: AdapterWeights
    """Modules, ranks and alphas; the factors are meta tensors."""
    num_users: int = 0
    is_named: bool = True
    """Whether a name refers to this content."""
    last_used: int = field(default_factory=lambda: next(_clock))
    """Logical time of the last use."""


@dataclass(frozen=True)
class Lease:
    """A mix whose adapters stay unchanged in their slots until the lease is released."""

    mix: Mix
    weights: tuple[tuple[Resident, float], ...] = ()

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """Contents and weights of the mix, independent of the adapters' names."""
        return tuple(sorted((resident.identity, weight) for resident, weight in self.weights))


@dataclass(eq=False)
class _Segment:
    bank: Bank
    free: list[int] = field(default_factory=list)


class Slots:
    """The loaded adapters by name, and their slots. Thread-safe; no lock is held while weights are copied."""

    def __init__(
        self, new_bank: NewBank, budget: int | None = None, write: WriteSlot = Bank.write
    ) -> None:
        """Start empty; `budget` bounds the bytes of all slots (None: unbounded), `write` fills a slot."""
        self.budget = budget
        self.pinned: set[str] = set()
        self.num_loads = 0
        """Number of loads so far."""
        self._new_bank, self._write = new_bank, write
        self._names: dict[str, Resident] = {}
        self._segments: list[_Segment] = []
        self._layouts: dict[tuple[tuple[str, ...], int, int], tuple[BankLayout, int]] = {}
        self._templates: dict[object, AdapterWeights] = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether an adapter of that name is loaded."""
        return name in self._names

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(segment.bank.nbytes() for segment in self._segments)

    def load(
        self,
        name: str,
        weights: AdapterWeights,
        identity: str | None = None,
        staged: StagedSlot | None = None,
    ) -> None:
        """Load an adapter into a slot; under an existing name it replaces that adapter for new users.

        A slot that was `staged` with these weights is used. Raises NoRoomError, with nothing changed, when
        adapters in use take the whole budget.
        """
        place = staged.take(weights) if staged else None
        if place is None:
            with self._lock:
                place = self._allocate(weights, name)
            self._fill(place, weights)
        template = self._template(weights)
        with self._lock:
            self._remove_name(name)
            content_id = f"unnamed content {next(_content_ids)}" if identity is None else identity
            self._names[name] = Resident(place, content_id, template)
            self.num_loads += 1

    @contextmanager
    def stage(self, fits: Callable[[AdapterWeights], bool]) -> Iterator[StagedSlot]:
        """Yield a StagedSlot to fill before `load`; it is freed after the block if `load` did not take it."""
        staged = StagedSlot(self, fits)
        try:
            yield staged
        finally:
            staged.clear()

    def fill_free(self, weights: AdapterWeights) -> BankSlot | None:
        """Fill a free slot without evicting an adapter; return None if there is none."""
        with self._lock:
            place = self._find_free_slot(weights)
        if place is not None:
            self._fill(place, weights)
        return place

    def _fill(self, place: BankSlot, weights: AdapterWeights) -> None:
        try:
            self._write(*place, weights)
        except BaseException:
            self.free_slot(place)
            raise

    def free_slot(self, place: BankSlot) -> None:
        """Make a slot free that no name means and nobody uses."""
        with self._lock:
            segment = next(s for s in self._segments if s.bank is place[0])
            segment.free.append(place[1])

    def unload(self, name: str) -> None:
        """Remove a name; the slot is freed when its last user releases it."""
        with self._lock:
            self._resident(name)
            self._remove_name(name)

    def weights(self, name: str) -> AdapterWeights:
        """Return a copy of an adapter's weights, as rounded to the bank's dtype."""
        with self.releasing(self.hold(Mix(((name, 1.0),)))) as lease:
            resident = lease.weights[0][0]
            bank, slot = resident.place
            return bank.read(slot, resident.template)

    def hold(self, mix: Mix) -> Lease:
        """Lease a mix's adapters until `release`; raise UnknownNameError if one is not loaded."""
        with self._lock:
            residents = tuple((self._resident(name), weight) for name, weight in mix.weights)
            for resident, _ in residents:
                resident.num_users += 1
                resident.last_used = next(_clock)
            return Lease(mix, residents)

    def acquire(self, mix: Mix, load: Callable[[str], None]) -> Lease:
        """Lease a mix, after calling `load(name)` for each adapter that is not loaded.

        Each adapter is leased at once, so that loading the next one cannot evict it. Raises what `load`
        raises, such as NoRoomError.
        """
        with ExitStack() as stack:
            for name in mix.names:
                stack.enter_context(self._lease_one(name, load))
            return self.hold(mix)

    @contextmanager
    def _lease_one(self, name: str, load: Callable[[str], None]) -> Iterator[None]:
        lease = None
        while lease is None:
            if name not in self:
                load(name)
            with suppress(UnknownNameError):  # evicted meanwhile by another thread's load
                lease = self.hold(Mix(((name, 1.0),)))
        with self.releasing(lease):
            yield

    def release(self, lease: Lease) -> None:
        """End a lease."""
        with self._lock:
            for resident, _ in lease.weights:
                resident.num_users -= 1
                if not resident.num_users and not resident.is_named:
                    self.free_slot(resident.place)

    @contextmanager
    def releasing(self, lease: Lease) -> Iterator[Lease]:
        """Release a lease at the end of the block."""
        try:
            yield lease
        finally:
            self.release(lease)

    def _template(self, weights: AdapterWeights) -> AdapterWeights:
        """Return the weights' modules, shapes and alphas as a template, shared by equal adapters."""
        key = (*weights.shapes.items(), *weights.alphas.items()), weights.rslora, weights.labels
        if (template := self._templates.get(key)) is None:
            template = self._templates.setdefault(key, weights.shapes_only())
        return template

    # -- called with the lock held -----------------------------------------------------------------

    def _resident(self, name: str) -> Resident:
        if name not in self._names:
            cure = "Load it first with hub.load(name)."
            raise UnknownNameError("adapter", name, [*self._names, BACKBONE], cure)
        return self._names[name]

    def _remove_name(self, name: str) -> None:
        resident = self._names.pop(name, None)
        if resident is not None:
            resident.is_named = False
            if not resident.num_users:
                self.free_slot(resident.place)

    def _allocate(self, weights: AdapterWeights, name: str) -> BankSlot:
        """Return an unused slot of the right layout: a free one, a new one, or one freed by evictions.

        Raises NoRoomError before evicting anything when evictions cannot free enough memory.
        """
        place = self._find_free_slot(weights)
        if place is None:
            self._check_budget(self._layout(weights)[1], name)
        while place is None:
            if not self._free_empty_segment():
                self._remove_name(self._evictable()[0])
            place = self._find_free_slot(weights)
        return place

    def _find_free_slot(self, weights: AdapterWeights) -> BankSlot | None:
        """Return a free or newly allocated slot of the right layout; None if the budget allows none."""
        layout, size = self._layout(weights)
        for segment in self._segments:
            if segment.free and segment.bank.layout == layout:
                return segment.bank, segment.free.pop()
        if self.budget is not None and self.nbytes + size > self.budget:
            return None
        slots, (modules, rank, labels) = (
            SEGMENT_SLOTS if self.budget is None else 1,
            _layout_key(weights),
        )
        bank = self._new_bank(modules, slots, rank, labels)
        self._segments.append(_Segment(bank, list(range(slots - 1))))
        return bank, slots - 1

    def _layout(self, weights: AdapterWeights) -> tuple[BankLayout, int]:
        """Return the layout that these weights need, and the size of its slots in bytes."""
        key = modules, rank, labels = _layout_key(weights)
        if key not in self._layouts:
            empty_bank = self._new_bank(modules, 0, rank, labels)
            self._layouts[key] = empty_bank.layout, empty_bank.slot_bytes
        return self._layouts[key]

    def _free_empty_segment(self) -> bool:
        for segment in self._segments:
            if len(segment.free) == segment.bank.slots:
                self._segments.remove(segment)
                return True
        return False

    def _evictable(self) -> list[str]:
        """Return the adapters that may be evicted, least recently used first."""
        names = [n for n, r in self._names.items() if not r.num_users and n not in self.pinned]
        return sorted(names, key=lambda name: self._names[name].last_used)

    def _check_budget(self, size: int, name: str) -> None:
        """Raise NoRoomError when `size` bytes do not fit even after evicting all idle adapters."""
        assert self.budget is not None
        evictable_bytes = sum(self._names[name].place[0].slot_bytes for name in self._evictable())
        free_bytes = sum(len(s.free) * s.bank.slot_bytes for s in self._segments)
        if self.nbytes - free_bytes - evictable_bytes + size <= self.budget:
            return
        raise NoRoomError(
            f"adapter {name!r} needs {size / 2**20:.1f} MiB, and the {self.budget / 2**20:.1f} MiB "
            f"for loaded adapters are all in use ({', '.join(self._names) or 'nothing is loaded'}); "
            "call hub.unload(name), take names out of hub.model.slots.pinned, wait for running requests, "
            "or give AdapterHub more adapter_bytes"
        )


class StagedSlot:
    """A slot that is filled before its adapter is admitted; see Slots.stage."""

    def __init__(self, slots: Slots, fits: Callable[[AdapterWeights], bool]) -> None:
        """Start without a slot; weights that do not fit are not staged, and `load` refuses them."""
        self._slots, self._fits = slots, fits
        self._filled: tuple[BankSlot, AdapterWeights] | None = None

    def fill(self, weights: AdapterWeights) -> None:
        """Fill a free slot, if there is one; a slot that was filled before is freed."""
        self.clear()
        place = self._slots.fill_free(weights) if self._fits(weights) else None
        self._filled = None if place is None else (place, weights)

    def take(self, weights: AdapterWeights) -> BankSlot | None:
        """Return the slot that holds these weights and pass its ownership to the caller; None without one."""
        if self._filled is None or self._filled[1] is not weights:
            return None
        place, self._filled = self._filled[0], None
        return place

    def clear(self) -> None:
        """Free the slot if it was not taken."""
        if self._filled is not None:
            self._slots.free_slot(self._filled[0])
            self._filled = None


def _layout_key(weights: AdapterWeights) -> tuple[tuple[str, ...], int, int]:
    """Return the key of a layout: modules, rank bucket, labels."""
    rank = MIN_RANK_BUCKET
    while rank < weights.max_rank:
        rank *= 2
    return tuple(weights.factors), rank, weights.labels


def plan_for(leases: Sequence[Lease]) -> Plan | None:
    """Return the plan that gives row i the mix `leases[i]`; None when no row has an adapter."""
    residents = list(dict.fromkeys(r for lease in leases for r, _ in lease.weights))
    if not residents:
        return None
    column = {resident: n for n, resident in enumerate(residents)}
    matrix = torch.zeros(len(leases), len(residents))
    for row, lease in enumerate(leases):
        for resident, weight in lease.weights:
            matrix[row, column[resident]] += weight
    plan = Plan([resident.place for resident in residents], matrix)
    return None if plan.empty else plan
