"""search: the adapters on a Hub that fit a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adapterhub_chat.artifact.card import REPO, fingerprint_tag
from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.remote.client import HubClient, plain

Fit = Literal["exact", "unverified", "other weights"]
ORDER: tuple[Fit, ...] = ("exact", "unverified", "other weights")


@dataclass(frozen=True)
class Found:
    """An adapter on a Hub, as its card describes it: nothing of this was checked yet."""

    repo: str
    fit: Fit
    """exact: its fingerprint is this backbone's. unverified: only the base model's name is known. other
    weights: its fingerprint is that of other weights under the same name."""
    downloads: int
    tasks: tuple[str, ...]
    scores: tuple[tuple[str, str, float], ...]
    """Task, metric, value."""


def search(backbone: Backbone, hub: HubClient, text: str, author: str, limit: int) -> list[Found]:
    """Return adapters for a backbone, by its fingerprint and by its base model's name."""
    own = fingerprint_tag(backbone.fingerprint)
    asset = ASSETS.get(backbone.name)
    base = (asset and asset.upstream) or backbone.name
    asked = [[own]] + [[f"base_model:{base}"]] * bool(REPO.fullmatch(base))
    entries = {
        entry["id"]: entry
        for tags in asked
        for entry in hub.find(tags, text, author, limit)
        if isinstance(entry.get("id"), str) and REPO.fullmatch(entry["id"])
    }
    found = [_found(entry, own) for entry in entries.values()]
    found.sort(key=lambda one: (ORDER.index(one.fit), -one.downloads))
    return found[:limit]


def _found(entry: dict[str, Any], own: str) -> Found:
    said = entry.get("tags")
    tags = [tag for tag in said if isinstance(tag, str)] if isinstance(said, list) else []
    prints = [tag for tag in tags if tag.startswith("adapterhub-") and tag != "adapterhub-chat"]
    fit: Fit = "exact" if own in prints else "other weights" if prints else "unverified"
    downloads = entry.get("downloads")
    scores = tuple(_scores(entry.get("cardData")))
    return Found(
        repo=entry["id"],
        fit=fit,
        downloads=downloads if isinstance(downloads, int) else 0,
        tasks=tuple(dict.fromkeys(task for task, _, _ in scores)),
        scores=scores,
    )


def _scores(card: Any) -> list[tuple[str, str, float]]:
    """Return what a card's model-index says; a card may hold anything."""
    try:
        return [
            (plain(result["task"]["name"]), plain(metric["type"]), float(metric["value"]))
            for model in card["model-index"]
            for result in model["results"]
            for metric in result["metrics"][:1]  # the second is the backbone's
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return []
