"""Stacks: adapters that were trained on top of others; finds those base adapters by their content hash.

A stack f_S o T is stored as the adapter T; its manifest names the hash of the source S that T was trained
under. A row of the stack is a mix of S and T, so it shares a forward with S, with other stacks and with the
backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from adapterhub_chat.artifact.manifest import Manifest, StackBase
from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.lora.weights import AdapterWeights, concatenate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.stored import LoadedAdapter, Stored
from adapterhub_chat.types import Mix, as_mix


def stack_bases(pool: Pool, manifest: Manifest) -> list[str]:
    """Return the pool names of a stack's base adapters; none for a plain adapter.

    Raises AdapterError naming each base that is missing or has changed, and the cure.
    """
    names, misfits = [], []
    for base in manifest.stack:
        name = _find_by_content(pool, base)
        if name is None:
            state = "has other content by now" if base.name in pool else "is not there"
            misfits.append(
                f"it stands on {base.name!r} (sha256 {base.sha256[:12]}...), which {state} in {pool.root}: "
                f"put that version back (hub.rollback({base.name!r}), or pull it), or transfer again"
            )
        else:
            names.append(name)
    if misfits:
        raise AdapterError(
            join_misfits(f"stack {manifest.name!r} cannot be used", misfits), misfits
        )
    return names


def _find_by_content(pool: Pool, base: StackBase) -> str | None:
    """Return the name of the adapter with this content, preferring the recorded name; None if absent."""
    for name in (base.name, *pool.names()):
        with suppress(AdapterError):
            manifest = pool.manifest(name) if name in pool else None
            if manifest and manifest.sha256 == base.sha256:
                return name
    return None


def flattened(pool: Pool, stored: Stored) -> AdapterWeights:
    """Return a stack and its bases as one plain adapter, their ranks concatenated."""
    if stored.manifest is None or not stored.manifest.stack:
        return stored.weights
    bases = [pool.load(name).weights for name in stack_bases(pool, stored.manifest)]
    return concatenate([*bases, stored.weights])


class Stacks:
    """Resolves the base adapters of a registry's stacks."""

    def __init__(
        self,
        model: AdapterModel,
        pool: Pool,
        known: Mapping[str, LoadedAdapter],
        load: Callable[[str], object],
    ) -> None:
        """Look names up in `known`, the registry's live mapping; `load` reloads a changed version."""
        self.model, self.pool = model, pool
        self._known, self._load = known, load

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with its stacks' base adapters added, each with the weight of its stack.

        Raises AdapterError for a stack whose base is missing or has changed.
        """
        weights = dict(mix.weights)
        for name, weight in mix.weights:
            loaded = self._known.get(name)
            is_unloaded = loaded is None and name not in self.model.slots and name in self.pool
            manifest = loaded.manifest if loaded else None
            manifest = self.pool.manifest(name) if is_unloaded else manifest
            for base in self.base_names(manifest):
                weights[base] = weights.get(base, 0.0) + weight
        return as_mix(weights) if len(weights) > len(mix.weights) else mix

    def base_names(self, manifest: Manifest | None) -> list[str]:
        """Return the names of a stack's base adapters; searches the pool only when they are not loaded."""
        if manifest is None or not manifest.stack:
            return []
        loaded = [self._known.get(base.name) for base in manifest.stack]
        hashes = [
            adapter.manifest.sha256 if adapter and adapter.manifest else "" for adapter in loaded
        ]
        if hashes == [base.sha256 for base in manifest.stack]:
            return [base.name for base in manifest.stack]
        names = stack_bases(self.pool, manifest)
        for name, base in zip(names, manifest.stack, strict=True):
            current = self._known.get(name)
            if current and (current.manifest is None or current.manifest.sha256 != base.sha256):
                self._load(name)  # the pool's version is the right one, the loaded one is not
        return names

    def trial_mix(self, trial: str, manifest: Manifest | None) -> Mix:
        """Return the mix of a temporarily loaded adapter and its base adapters."""
        return Mix(tuple((name, 1.0) for name in (trial, *self.base_names(manifest))))
