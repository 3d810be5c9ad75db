"""AdapterSource: where a model's forwards and its engine take a mix's adapters from."""

from __future__ import annotations

from typing import Protocol

from adapterhub_chat.lora.slots import Lease, Slots
from adapterhub_chat.types import Mix


class AdapterSource(Protocol):
    """Loads what a mix names. All methods may be called from several threads."""

    def acquire(self, mix: Mix) -> Lease:
        """Return the slots of a mix's adapters, held until released; load first what is in no slot."""
        ...

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with the adapters that its stacks were trained on, each as heavy as its stack."""
        ...

    def prefetch(self, mix: Mix) -> None:
        """Read a mix's adapters into the host's memory, before there is a slot for them."""
        ...


class LoadedOnly:
    """An AdapterSource of the loaded adapters alone: it reads nothing and knows no stacks."""

    def __init__(self, slots: Slots) -> None:
        """Take the slots of a model."""
        self._slots = slots

    def acquire(self, mix: Mix) -> Lease:
        """Return the slots of a mix's adapters; raise UnknownNameError for one that is not loaded."""
        return self._slots.hold(mix)

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return the mix as it is."""
        return mix

    def prefetch(self, mix: Mix) -> None:
        """Do nothing."""
