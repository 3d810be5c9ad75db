"""The router of a registry: what is learnt of its adapters' messages, and whom a message is for."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.artifact.manifest import MANIFEST, Manifest
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.data.inputs import listed, text
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, AdapterHubError, ConfigError, UsageError
from adapterhub_chat.pool.names import ADAPTER_NAME
from adapterhub_chat.pool.provenance import load_trained_task
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.arrow import alignment, arrows
from adapterhub_chat.route.choice import AdapterScorers, Cascade, Route, abstention
from adapterhub_chat.route.learn import learn_routing, scorers_of, usable_routing
from adapterhub_chat.route.message_features import (
    early_layer_features,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.types import AUTO, AdapterChoice, Mix

MEMORY = 8
"""Earlier messages of a conversation that are asked when nobody is close to the last one."""
CASCADES = 2
"""Sets of adapters whose cascades are kept ready: tens of megabytes each."""


@dataclass(frozen=True)
class _Seen:
    """A manifest as it was when its file looked like this."""

    stamp: tuple[int, ...]
    manifest: Manifest | None


class Router:
    """Chooses adapters of a registry by what their manifests say of their messages; thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Know nothing yet: prototypes are made ready when they are first asked for."""
        self._registry = registry
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._judges: dict[str, tuple[Manifest | None, AdapterScorers | None]] = {}
        self._cascades: dict[tuple[tuple[str, AdapterScorers], ...], Cascade] = {}
        self._arrows: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    def route(
        self,
        messages: Sequence[Any],
        *,
        previous: str | None = None,
        top: int = 1,
        among: Iterable[str] | None = None,
    ) -> list[Route]:
        """Return whom each message is for; see AdapterHub.route."""
        texts = [text(message, f"message {i}") for i, message in enumerate(messages, 1)]
        if top < 1:
            raise UsageError(f"top={top}: a mix has at least one adapter")
        names = self._names() if among is None else self._chosen(among)
        judges = self._ready(names)
        if not judges:
            return [self._by_arrows(given, names) for given in texts]
        told = [i for i, given in enumerate(texts) if given.strip()]
        model, own = (
            self._registry.model,
            tokenize_messages(self._registry.model, [texts[i] for i in told]),
        )
        found = self._seated(judges).routes(
            token_features(model, own),
            lambda places: early_layer_features(model, [own[place] for place in places]),
            top=top,
            previous=previous,
        )
        routes = dict(zip(told, found, strict=True))
        return [routes.get(i, abstention("the message is empty")) for i in range(len(texts))]

    def conversations(self, rows: Sequence[Sequence[str]]) -> list[Route]:
        """Return whom each conversation is for, of which the user's messages are given, one or more.

        The last one decides. Where no adapter is close to it, the nearest before it that is somebody's does.
        """
        found = self.route([row[-1] for row in rows])
        lost = [i for i, route in enumerate(found) if route.abstained]
        earlier = [(i, message) for i in lost for message in rows[i][-1 - MEMORY : -1]]
        if not earlier:
            return found
        routes = self.route([message for _, message in earlier])
        for (i, _), route in zip(earlier, routes, strict=True):  # the nearest is the last
            if not route.abstained:
                why = f"no adapter is close, so the conversation stays with {route.adapter}"
                found[i] = replace(route, confidence=found[i].confidence, reason=why)
        return found

    def choose(
        self, choices: Sequence[AdapterChoice], rows: Sequence[Sequence[str]]
    ) -> list[AdapterChoice]:
        """Return one choice a row, with "auto" replaced by whom the row's messages are for."""
        chosen = list(choices)
        if len(chosen) != len(rows):
            raise UsageError(f"{len(rows)} rows but {len(chosen)} adapters: give one per row")
        if auto := [i for i, choice in enumerate(chosen) if choice == AUTO]:
            routes = self.conversations([rows[i] for i in auto])
            for i, route in zip(auto, routes, strict=True):
                chosen[i] = route.mix
        return chosen

    def _chosen(self, among: Iterable[str]) -> list[str]:
        """Return names that are loaded or in the pool; raise UnknownNameError for another."""
        names, loaded = listed(among, "among"), self._loaded()
        if not names:
            raise UsageError("among=[] leaves nobody to choose; name adapters, or leave it out")
        return [n if n in loaded else self._registry.pool.path(n).name for n in names]

    def _names(self) -> list[str]:
        """Return the adapters of the pool, and what else is loaded."""
        return list(dict.fromkeys([*self._registry.pool.names(), *self._loaded()]))

    def _loaded(self) -> list[str]:
        """Return what is loaded, without what is only on trial."""
        return [name for name in self._registry.model.names if ADAPTER_NAME.fullmatch(name)]

    def _ready(self, names: Iterable[str]) -> dict[str, AdapterScorers]:
        """Return the judges of those adapters that say what their messages look like, on this backbone."""
        with self._lock:
            found = {name: self._judge(name) for name in names}
        return {name: judge for name, judge in found.items() if judge is not None}

    def _seated(self, judges: Mapping[str, AdapterScorers]) -> Cascade:
        """Return the judges' cascade: one of the last few where they are the same."""
        key = tuple(judges.items())
        found = self._cascades.get(key) or Cascade(judges)
        kept = {key: found, **self._cascades}
        self._cascades = dict(list(kept.items())[:CASCADES])
        return found

    def _judge(self, name: str) -> AdapterScorers | None:
        """Return an adapter's judges, made anew only where its manifest is another."""
        manifest = self._manifest(name)
        if name not in self._judges or self._judges[name][0] is not manifest:
            routing = usable_routing(self._registry, manifest)
            self._judges[name] = manifest, None if routing is None else scorers_of(routing)
        return self._judges[name][1]

    def _manifest(self, name: str) -> Manifest | None:
        """Return an adapter's manifest, read again only where its file has changed; None if it cannot be."""
        pool, known = self._registry.pool, self._registry.known(name)
        if name not in pool or (known and known.path != pool.root / name):
            return known.manifest if known else None
        try:
            stamp = _stamp(pool.path(name) / MANIFEST)
            if name not in self._seen or self._seen[name].stamp != stamp:
                self._seen[name] = _Seen(stamp, pool.manifest(name))
        except (OSError, AdapterHubError):
            return None
        return self._seen[name].manifest

    def _by_arrows(self, given: str, names: Sequence[str]) -> Route:
        """Return the route by the adapters' own numbers, the last resort."""
        if not given.strip():
            return abstention("the message is empty")
        if not names:
            return abstention("the pool is empty")
        with self._lock:
            found = {name: self._arrows_of(name) for name in names}
        own = {name: vectors for name, vectors in found.items() if len(vectors)}
        if not own:
            return abstention(
                "no adapter says what its messages look like, or shows it by its numbers"
            )
        along = alignment(self._registry.model, given, own)
        best, whole = max(along, key=along.__getitem__), sum(along.values())
        if not whole > 0:  # also where there is nothing to look at
            return abstention("the message lies along no adapter")
        scores = {name: {"share": value / whole, "fit": 0.0} for name, value in along.items()}
        why = f"by their numbers alone: the message lies most along {best}"
        return Route(best, Mix(((best, 1.0),)), along[best] / whole, False, why, scores)

    def _arrows_of(self, name: str) -> Tensor:
        """Return an adapter's arrows, worked out again only where its file has changed."""
        model, pool, known = self._registry.model, self._registry.pool, self._registry.known(name)
        try:
            folder = pool.path(name) if name in pool else known.path if known else None
            if folder is None:  # loaded by its numbers alone
                return arrows(model, model.weights(name))
            stamp = _stamp(folder / WEIGHTS)
            if name not in self._arrows or self._arrows[name][0] != stamp:
                weights = pool.load(name).weights if name in pool else model.weights(name)
                self._arrows[name] = stamp, arrows(model, weights)
        except (OSError, AdapterError):  # damaged or gone: nothing is routed to it
            return torch.zeros(0, 1)
        return self._arrows[name][1]


def _stamp(file: Path) -> tuple[int, ...]:
    """Return what changes when a file does; raise OSError for one that is not there."""
    state = file.stat()
    return state.st_mtime_ns, state.st_size, state.st_ino


def describe_routes(
    registry: Registry, names: Sequence[str], tasks: Sequence[Task] | None
) -> dict[str, Manifest]:
    """Learn the routing of pool members and keep it in manifest and card; see AdapterHub.learn_routes."""
    learnt, misfits = {}, list[str]()
    for name in names:
        manifest = registry.pool.manifest(name)
        trained = manifest.training.tasks if manifest else ()
        try:
            own = tasks or [load_trained_task(task, name) for task in trained]
        except UsageError as error:
            misfits.append(str(error))
            continue
        routing = learn_routing(registry, own) if manifest and own else None
        if manifest is None:
            misfits.append(f"{name!r} has no manifest to keep it in; adopt it first")
        elif routing is None:
            misfits.append(
                f"{name!r} has too few messages to learn from; name its tasks: tasks=[...]"
            )
        else:
            learnt[name] = manifest.model_copy(update={"routing": routing})
    if misfits:
        raise ConfigError("routes", misfits)
    for name, manifest in learnt.items():
        registry.pool.describe(name, manifest)
        registry.refresh(name)
    return learnt
