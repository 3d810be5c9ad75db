"""Ram: adapters that were read and checked once, kept in the host's memory between the disk and the slots.

What an adapter's folder was when it was read goes with it: a folder that has changed since is read again. The
least recently used make room. On a CPU the slots are this memory themselves, and its default is none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from adapterhub_chat.files import version_of
from adapterhub_chat.pool.stored import FILES, Stored

RAM_BYTES = 2**30
"""Bytes, where the slots are in the memory of another device."""


def ram_budget(ram_bytes: int | None, device: str) -> int:
    """Return the bytes to keep: `ram_bytes`, or by default none where the slots are in this memory."""
    if ram_bytes is not None:
        return ram_bytes
    return 0 if device == "cpu" else RAM_BYTES


class HostCache:
    """Adapters by folder, under a budget of bytes. Safe from several threads."""

    def __init__(self, budget: int) -> None:
        """Start empty."""
        self.budget, self.nbytes = budget, 0
        self.hits = 0
        """How often an adapter was found here."""
        self._kept: OrderedDict[Path, tuple[Stored, object]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, folder: Path) -> Stored | None:
        """Return what was read from a folder, None where that was never done or is out of date."""
        with self._lock:
            kept = self._kept.get(folder)
            if kept is None:
                return None
            if kept[1] != version_of(folder, FILES):
                self._drop(folder)
                return None
            self._kept.move_to_end(folder)
            self.hits += 1
            return kept[0]

    def keep(self, stored: Stored, version: object) -> None:
        """Keep what was read while its folder was of this version, if it fits the budget at all."""
        size = stored.weights.nbytes
        if not version:
            return  # its folder is gone by now
        with self._lock:
            if stored.path in self._kept:
                self._drop(stored.path)
            while self._kept and self.nbytes + size > self.budget:
                self._drop(next(iter(self._kept)))
            if size <= self.budget:
                self._kept[stored.path] = stored, version
                self.nbytes += size

    def _drop(self, folder: Path) -> None:
        stored, _ = self._kept.pop(folder)
        self.nbytes -= stored.weights.nbytes
