"""search: the adapters on a Hub that fit a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adapterhub_chat.artifact.card import REPO, fingerprint_tag
from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.remote.client import HubClient, printable_line

Fit = Literal["exact", "unverified", "other weights"]
FIT_ORDER: tuple[Fit, ...] = ("exact", "unverified", "other weights")


@dataclass(frozen=True)
class Found:
    """An adapter on a Hub, as its card describes it; none of this is verified."""

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
    exact_tag = fingerprint_tag(backbone.fingerprint)
    asset = ASSETS.get(backbone.name)
    base = (asset and asset.upstream) or backbone.name
    tag_queries = [[exact_tag]] + [[f"base_model:{base}"]] * bool(REPO.fullmatch(base))
    entries = {
        entry["id"]: entry
        for tags in tag_queries
        for entry in hub.list_models(tags, text, author, limit)
        if isinstance(entry.get("id"), str) and REPO.fullmatch(entry["id"])
    }
    results = [_search_result(entry, exact_tag) for entry in entries.values()]
    results.sort(key=lambda result: (FIT_ORDER.index(result.fit), -result.downloads))
    return results[:limit]


def _search_result(entry: dict[str, Any], exact_tag: str) -> Found:
    listed = entry.get("tags")
    tags = [tag for tag in listed if isinstance(tag, str)] if isinstance(listed, list) else []
    fingerprints = [
        tag for tag in tags if tag.startswith("adapterhub-") and tag != "adapterhub-chat"
    ]
    fit: Fit = (
        "exact" if exact_tag in fingerprints else "other weights" if fingerprints else "unverified"
    )
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
    """Return the scores of a card's model-index, none when it is malformed."""
    try:
        return [
            (
                printable_line(result["task"]["name"]),
                printable_line(metric["type"]),
                float(metric["value"]),
            )
            for model in card["model-index"]
            for result in model["results"]
            for metric in result["metrics"][:1]  # the second is the backbone's
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return []
