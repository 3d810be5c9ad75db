"""The router of a registry: chooses adapters for messages by the prototypes in the adapters' manifests."""

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
from adapterhub_chat.data.inputs import as_list, checked_text
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, AdapterHubError, ConfigError, UsageError
from adapterhub_chat.pool.names import ADAPTER_NAME
from adapterhub_chat.pool.provenance import load_trained_tasks
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.arrow import alignment, arrow_vectors
from adapterhub_chat.route.choice import AdapterScorers, Cascade, Route, abstention
from adapterhub_chat.route.learn import learn_routing, scorers_of, usable_routing
from adapterhub_chat.route.message_features import (
    early_layer_features,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.types import AUTO, AdapterChoice, Mix

MAX_EARLIER_MESSAGES = 8
"""Earlier messages of a conversation that are routed when no adapter is close to the last one."""
MAX_CACHED_CASCADES = 2
"""Sets of adapters whose cascades stay in memory: tens of megabytes each."""


@dataclass(frozen=True)
class _CachedManifest:
    """A manifest, and the stamp of the file that it was read from."""

    stamp: tuple[int, ...]
    manifest: Manifest | None


class Router:
    """Chooses adapters of a registry by the prototypes in their manifests; thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Start with empty caches: prototypes are prepared when they are first needed."""
        self._registry = registry
        self._lock = threading.Lock()
        self._manifests: dict[str, _CachedManifest] = {}
        self._scorers: dict[str, tuple[Manifest | None, AdapterScorers | None]] = {}
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
        """Return the route of each message; see AdapterHub.route."""
        texts = [checked_text(message, f"message {i}") for i, message in enumerate(messages, 1)]
        if top < 1:
            raise UsageError(f"top={top}: a mix has at least one adapter")
        names = self._names() if among is None else self._checked_names(among)
        scorers = self._scorers_by_name(names)
        if not scorers:
            return [self._route_by_arrows(message, names) for message in texts]
        model = self._registry.model
        indices = [i for i, message in enumerate(texts) if message.strip()]
        tokenized = tokenize_messages(model, [texts[i] for i in indices])
        routes = self._cascade_of(scorers).routes(
            token_features(model, tokenized),
            lambda chosen: early_layer_features(model, [tokenized[i] for i in chosen]),
            top=top,
            previous=previous,
        )
        by_index = dict(zip(indices, routes, strict=True))
        return [by_index.get(i, abstention("the message is empty")) for i in range(len(texts))]

    def route_conversations(self, rows: Sequence[Sequence[str]]) -> list[Route]:
        """Return the route of each conversation, given as its user messages, one or more.

        The last message decides. Where no adapter is close to it, the latest earlier message with a route
        does.
        """
        routes = self.route([row[-1] for row in rows])
        abstained = [i for i, route in enumerate(routes) if route.abstained]
        earlier = [
            (i, message) for i in abstained for message in rows[i][-1 - MAX_EARLIER_MESSAGES : -1]
        ]
        if not earlier:
            return routes
        earlier_routes = self.route([message for _, message in earlier])
        for (i, _), route in zip(earlier, earlier_routes, strict=True):  # the latest one remains
            if not route.abstained:
                reason = f"no adapter is close, so the conversation stays with {route.adapter}"
                routes[i] = replace(route, confidence=routes[i].confidence, reason=reason)
        return routes

    def resolve_auto(
        self, choices: Sequence[AdapterChoice], rows: Sequence[Sequence[str]]
    ) -> list[AdapterChoice]:
        """Return one choice a row, with "auto" replaced by the route of the row's user messages."""
        resolved = list(choices)
        if len(resolved) != len(rows):
            raise UsageError(f"{len(rows)} rows but {len(resolved)} adapters: give one per row")
        if auto := [i for i, choice in enumerate(resolved) if choice == AUTO]:
            routes = self.route_conversations([rows[i] for i in auto])
            for i, route in zip(auto, routes, strict=True):
                resolved[i] = route.mix
        return resolved

    def _checked_names(self, among: Iterable[str]) -> list[str]:
        """Return names that are loaded or in the pool; raise UnknownNameError for another."""
        names, loaded = as_list(among, "among"), self._loaded()
        if not names:
            raise UsageError("among=[] leaves nobody to choose; name adapters, or leave it out")
        return [n if n in loaded else self._registry.pool.path(n).name for n in names]

    def _names(self) -> list[str]:
        """Return the adapters of the pool, and others that are loaded."""
        return list(dict.fromkeys([*self._registry.pool.names(), *self._loaded()]))

    def _loaded(self) -> list[str]:
        """Return the loaded adapters but those that are loaded temporarily."""
        return [name for name in self._registry.model.names if ADAPTER_NAME.fullmatch(name)]

    def _scorers_by_name(self, names: Iterable[str]) -> dict[str, AdapterScorers]:
        """Return the scorers of those adapters that have prototypes on this backbone."""
        with self._lock:
            scorers = {name: self._scorers_of(name) for name in names}
        return {name: pair for name, pair in scorers.items() if pair is not None}

    def _cascade_of(self, scorers: Mapping[str, AdapterScorers]) -> Cascade:
        """Return the cascade of these scorers, a recently used one if it has the same."""
        key = tuple(scorers.items())
        cascade = self._cascades.get(key) or Cascade(scorers)
        cached = {key: cascade, **self._cascades}
        self._cascades = dict(list(cached.items())[:MAX_CACHED_CASCADES])
        return cascade

    def _scorers_of(self, name: str) -> AdapterScorers | None:
        """Return an adapter's scorers, prepared again only when its manifest has changed."""
        manifest = self._manifest(name)
        if name not in self._scorers or self._scorers[name][0] is not manifest:
            routing = usable_routing(self._registry, manifest)
            self._scorers[name] = manifest, None if routing is None else scorers_of(routing)
        return self._scorers[name][1]

    def _manifest(self, name: str) -> Manifest | None:
        """Return an adapter's manifest, read again only when its file has changed; None if unreadable."""
        pool, loaded = self._registry.pool, self._registry.known(name)
        if name not in pool or (loaded and loaded.path != pool.root / name):
            return loaded.manifest if loaded else None
        try:
            stamp = _file_stamp(pool.path(name) / MANIFEST)
            if name not in self._manifests or self._manifests[name].stamp != stamp:
                self._manifests[name] = _CachedManifest(stamp, pool.manifest(name))
        except (OSError, AdapterHubError):
            return None
        return self._manifests[name].manifest

    def _route_by_arrows(self, message: str, names: Sequence[str]) -> Route:
        """Return the route by the adapters' weights, where no adapter has a prototype."""
        if not message.strip():
            return abstention("the message is empty")
        if not names:
            return abstention("the pool is empty")
        with self._lock:
            arrows = {name: self._arrow_vectors_of(name) for name in names}
        arrows = {name: vectors for name, vectors in arrows.items() if len(vectors)}
        if not arrows:
            return abstention(
                "no adapter says what its messages look like, or shows it by its numbers"
            )
        alignments = alignment(self._registry.model, message, arrows)
        best, total = max(alignments, key=alignments.__getitem__), sum(alignments.values())
        if not total > 0:  # also for NaN, the mean over no tokens
            return abstention("the message lies along no adapter")
        scores = {name: {"share": value / total, "fit": 0.0} for name, value in alignments.items()}
        reason = f"by their numbers alone: the message lies most along {best}"
        return Route(best, Mix(((best, 1.0),)), alignments[best] / total, False, reason, scores)

    def _arrow_vectors_of(self, name: str) -> Tensor:
        """Return an adapter's arrows, computed again only when its file has changed."""
        model, pool = self._registry.model, self._registry.pool
        loaded = self._registry.known(name)
        try:
            folder = pool.path(name) if name in pool else loaded.path if loaded else None
            if folder is None:  # loaded from weights in memory
                return arrow_vectors(model, model.weights(name))
            stamp = _file_stamp(folder / WEIGHTS)
            if name not in self._arrows or self._arrows[name][0] != stamp:
                weights = pool.load(name).weights if name in pool else model.weights(name)
                self._arrows[name] = stamp, arrow_vectors(model, weights)
        except (OSError, AdapterError):  # damaged or deleted: it is not a candidate
            return torch.zeros(0, 1)
        return self._arrows[name][1]


def _file_stamp(file: Path) -> tuple[int, ...]:
    """Return numbers that change when a file does; raise OSError if it does not exist."""
    state = file.stat()
    return state.st_mtime_ns, state.st_size, state.st_ino


def describe_routes(
    registry: Registry, names: Sequence[str], tasks: Sequence[Task] | None
) -> dict[str, Manifest]:
    """Learn the routing of pool members and store it in manifest and card; see AdapterHub.learn_routes."""
    described, misfits = {}, list[str]()
    for name in names:
        manifest = registry.pool.manifest(name)
        try:
            message_tasks = tasks or load_trained_tasks(manifest, name)
        except UsageError as error:
            misfits.append(str(error))
            continue
        routing = learn_routing(registry, message_tasks) if manifest and message_tasks else None
        if manifest is None:
            misfits.append(f"{name!r} has no manifest to keep it in; adopt it first")
        elif routing is None:
            misfits.append(
                f"{name!r} has too few messages to learn from; name its tasks: tasks=[...]"
            )
        else:
            described[name] = manifest.model_copy(update={"routing": routing})
    if misfits:
        raise ConfigError("routes", misfits)
    for name, manifest in described.items():
        registry.pool.describe(name, manifest)
        registry.refresh(name)
    return described
