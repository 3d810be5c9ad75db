"""Stacks: adapters that stand on others, known by their content; which of the pool those are, and all as one.

A stack f_S o T is T's own folder; its manifest names the source that T was trained under by its hash. A row
of it is a row of both, so it shares a forward with the source, other stacks on it, and the backbone.
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
    """Return the names, in the pool, of the adapters that a stack stands on; none for a plain adapter.

    Raises AdapterError naming each that is missing or has other content by now, and the cure.
    """
    names, lost = [], []
    for under in manifest.stack:
        name = _found(pool, under)
        if name is None:
            there = "has other content by now" if under.name in pool else "is not there"
            lost.append(
                f"it stands on {under.name!r} (sha256 {under.sha256[:12]}...), which {there} in {pool.root}: "
                f"put that version back (hub.rollback({under.name!r}), or pull it), or transfer again"
            )
        else:
            names.append(name)
    if lost:
        raise AdapterError(join_misfits(f"stack {manifest.name!r} cannot be used", lost), lost)
    return names


def _found(pool: Pool, under: StackBase) -> str | None:
    """Return the adapter with this content: the one that was called so, else any."""
    for name in (under.name, *pool.names()):
        with suppress(AdapterError):
            manifest = pool.manifest(name) if name in pool else None
            if manifest and manifest.sha256 == under.sha256:
                return name
    return None


def flattened(pool: Pool, stored: Stored) -> AdapterWeights:
    """Return all that an adapter computes as one plain adapter: a stack's ranks side by side."""
    if stored.manifest is None or not stored.manifest.stack:
        return stored.weights
    under = [pool.load(name).weights for name in stack_bases(pool, stored.manifest)]
    return concatenate([*under, stored.weights])


class Stacks:
    """Which adapters are beneath those that a registry has, and the mixes that contain them."""

    def __init__(
        self,
        model: AdapterModel,
        pool: Pool,
        known: Mapping[str, LoadedAdapter],
        load: Callable[[str], object],
    ) -> None:
        """Look names up in `known`, which the registry changes, and `load` what is another version."""
        self.model, self.pool = model, pool
        self._known, self._load = known, load

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with what its stacks stand on, each as heavy as its stack.

        Raises AdapterError for a stack under which something is missing or has changed.
        """
        weights = dict(mix.weights)
        for name, weight in mix.weights:
            known = self._known.get(name)
            unread = known is None and name not in self.model.slots and name in self.pool
            manifest = known.manifest if known else None
            manifest = self.pool.manifest(name) if unread else manifest
            for under in self.standing(manifest):
                weights[under] = weights.get(under, 0.0) + weight
        return as_mix(weights) if len(weights) > len(mix.weights) else mix

    def standing(self, manifest: Manifest | None) -> list[str]:
        """Return what a stack stands on, by name; what is loaded need not be looked up."""
        if manifest is None or not manifest.stack:
            return []
        loaded = [self._known.get(under.name) for under in manifest.stack]
        hashes = [one.manifest.sha256 if one and one.manifest else "" for one in loaded]
        if hashes == [under.sha256 for under in manifest.stack]:
            return [under.name for under in manifest.stack]
        names = stack_bases(self.pool, manifest)
        for name, under in zip(names, manifest.stack, strict=True):
            here = self._known.get(name)
            if here and (here.manifest is None or here.manifest.sha256 != under.sha256):
                self._load(name)  # the pool has it, and here is another version
        return names

    def beside(self, trial: str, manifest: Manifest | None) -> Mix:
        """Return the mix of an adapter on trial: with what it stands on."""
        return Mix(tuple((name, 1.0) for name in (trial, *self.standing(manifest))))
