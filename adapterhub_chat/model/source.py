"""AdapterSource: loads the adapters of a mix for a model's forwards and its engine."""

from __future__ import annotations

from typing import Protocol

from adapterhub_chat.lora.slots import Lease, Slots
from adapterhub_chat.types import Mix


class AdapterSource(Protocol):
    """Loads the adapters of a mix. All methods may be called from several threads."""

    def acquire(self, mix: Mix) -> Lease:
        """Return a lease on the slots of a mix's adapters; load those that are in no slot."""
        ...

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with the adapters that its stacks were trained on, each with its stack's weight."""
        ...

    def prefetch(self, mix: Mix) -> None:
        """Read a mix's adapters into the host's memory without a slot."""
        ...


class LoadedOnly:
    """An AdapterSource of loaded adapters only: it loads nothing and knows no stacks."""

    def __init__(self, slots: Slots) -> None:
        """Use the slots of a model."""
        self._slots = slots

    def acquire(self, mix: Mix) -> Lease:
        """Return a lease on a mix's adapters; raise UnknownNameError for one that is not loaded."""
        return self._slots.hold(mix)

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return the mix unchanged."""
        return mix

    def prefetch(self, mix: Mix) -> None:
        """Do nothing."""
