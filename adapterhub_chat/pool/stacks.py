"""Stacks: adapters that stand on others, known by their content; which of the pool those are, and all as one.

A stack f_S o T is T's own folder; its manifest names the source that T was trained under by its hash. A row
of it is a row of both, so it shares a forward with the source, other stacks on it, and the backbone.
"""

from __future__ import annotations

from contextlib import suppress

from adapterhub_chat.artifact.manifest import Manifest, Under
from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.lora.weights import AdapterWeights, concatenate
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.stored import Stored


def standing(pool: Pool, manifest: Manifest) -> list[str]:
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


def _found(pool: Pool, under: Under) -> str | None:
    """Return the adapter with this content: the one that was called so, else any."""
    for name in (under.name, *pool.names()):
        with suppress(AdapterError):
            manifest = pool.manifest(name) if name in pool else None
            if manifest and manifest.sha256 == under.sha256:
                return name
    return None


def flat(pool: Pool, stored: Stored) -> AdapterWeights:
    """Return all that an adapter computes as one plain adapter: a stack's ranks side by side."""
    if stored.manifest is None or not stored.manifest.stack:
        return stored.weights
    under = [pool.load(name).weights for name in standing(pool, stored.manifest)]
    return concatenate([*under, stored.weights])
