"""HostCache: adapters that were read from disk and checked, cached in the host's memory.

Each entry keeps the version of its folder: a folder that has changed since is read again. The least recently
used entries are evicted first. On a CPU the slots lie in the same memory, so the default budget is 0 there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from adapterhub_chat.files import version_of
from adapterhub_chat.pool.stored import FILES, Stored

DEFAULT_RAM_BYTES = 2**30
"""Default budget in bytes where the slots are in another device's memory."""


def ram_budget(ram_bytes: int | None, device: str) -> int:
    """Return the budget in bytes: `ram_bytes`, or by default 0 on a CPU and 1 GiB on other devices."""
    if ram_bytes is not None:
        return ram_bytes
    return 0 if device == "cpu" else DEFAULT_RAM_BYTES


class HostCache:
    """An LRU cache of adapters by folder, bounded in bytes. Thread-safe."""

    def __init__(self, budget: int) -> None:
        """Start empty."""
        self.budget, self.nbytes = budget, 0
        self.num_hits = 0
        """Number of lookups that the cache answered."""
        self._entries: OrderedDict[Path, tuple[Stored, object]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: Path) -> Stored | None:
        """Return the cached adapter of a folder, None if there is none or the folder has changed."""
        with self._lock:
            entry = self._entries.get(folder)
            if entry is None:
                return None
            if entry[1] != version_of(folder, FILES):
                self._drop(folder)
                return None
            self._entries.move_to_end(folder)
            self.num_hits += 1
            return entry[0]

    def put(self, stored: Stored, version: object) -> None:
        """Cache an adapter that was read from this version of its folder, if it fits the budget."""
        size = stored.weights.nbytes
        if not version:
            return  # the folder was deleted meanwhile
        with self._lock:
            if stored.path in self._entries:
                self._drop(stored.path)
            while self._entries and self.nbytes + size > self.budget:
                self._drop(next(iter(self._entries)))
            if size <= self.budget:
                self._entries[stored.path] = stored, version
                self.nbytes += size

    def _drop(self, folder: Path) -> None:
        stored, _ = self._entries.pop(folder)
        self.nbytes -= stored.weights.nbytes
