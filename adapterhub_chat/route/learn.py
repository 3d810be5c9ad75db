"""Fit an adapter's prototypes to the messages of its tasks, for its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.prototype import Routing
from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.background import background_texts
from adapterhub_chat.route.choice import AdapterScorers
from adapterhub_chat.route.fit import (
    BACKGROUND_RANK,
    MIN_MESSAGES,
    TOKEN_RANK,
    PrototypeScorer,
    fit_prototype,
)
from adapterhub_chat.route.gaussians import fit_mixture
from adapterhub_chat.route.message_features import (
    background_width,
    early_layer_features,
    feature_width,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.route.prototype import GaussianMixture, prototype_of, routing_of
from adapterhub_chat.types import Example, Split

NUM_TRAIN_MESSAGES, NUM_HELD_OUT_MESSAGES = 1400, 250
"""Most messages that a prototype is fitted to, and that its quantiles are taken of."""
NUM_BACKGROUND_TEXTS = 480


def usable_routing(registry: Registry, manifest: Manifest | None) -> Routing | None:
    """Return a manifest's routing, None if it has none or one of another backbone.

    A token prototype of other sizes is dropped: all messages are then judged by early-layer features.
    """
    if manifest is None or manifest.routing is None:
        return None
    backbone = registry.model.backbone
    same = not manifest.fingerprint.differences(backbone.fingerprint)
    sizes = feature_width(registry.model), background_width(registry.model)
    routing, token = manifest.routing, manifest.routing.glance
    if not same or (routing.width, routing.background_width) != sizes:
        return None
    fits = token is None or (token.width, token.background_width) == sizes
    return routing if fits else routing.model_copy(update={"glance": None})


def scorers_of(routing: Routing) -> AdapterScorers:
    """Return the scorers of the prototypes in a manifest."""
    token = None if routing.glance is None else PrototypeScorer(prototype_of(routing.glance))
    return AdapterScorers(PrototypeScorer(prototype_of(routing)), token)


def learn_routing(registry: Registry, tasks: Sequence[Task]) -> Routing | None:
    """Return the prototypes of tasks' messages; None if they are too few, and on an encoder.

    Without enough validation messages, a quarter of the training messages is held out instead.
    """
    messages = messages_in(tasks, "train", NUM_TRAIN_MESSAGES)
    held_out = messages_in(tasks, "validation", NUM_HELD_OUT_MESSAGES)
    if len(held_out) < MIN_MESSAGES:
        cut = len(messages) * 3 // 4
        messages, held_out = messages[:cut], messages[cut:]
    model = registry.model
    too_few = min(len(messages), len(held_out)) < MIN_MESSAGES
    if too_few or model.backbone.encodes or not model.early_block:  # an encoder samples no texts
        return None
    token_background, early_background = _backgrounds(registry)
    fitted, ranked = tokenize_messages(model, messages), tokenize_messages(model, held_out)
    early_layer = fit_prototype(
        early_layer_features(model, fitted), early_layer_features(model, ranked), early_background
    )
    token = fit_prototype(
        token_features(model, fitted), token_features(model, ranked), token_background, TOKEN_RANK
    )
    return routing_of(early_layer, token)


def message_of(task: Task, example: Example) -> str:
    """Return what a user would type for an example: its fields in the template's order, a line each."""
    template = task.contract_of(example).template
    values = (example.fields.get(name, "") for name in placeholders(template))
    return "\n".join(value for value in values if value)


def messages_in(tasks: Sequence[Task], split: Split, limit: int) -> list[str]:
    """Return about `limit` messages of a split as users type them, one from each task in turn."""
    share = -(-limit // len(tasks))
    rows = ([message_of(task, e) for e in sample(task.split(split), share)] for task in tasks)
    return [text for turn in zip_longest(*rows) for text in turn if text is not None]


def _backgrounds(registry: Registry) -> tuple[GaussianMixture, GaussianMixture]:
    """Return the background mixtures of token and early-layer features: a pool member's, or fitted now."""
    for name in registry.pool.names():
        try:
            routing = usable_routing(registry, registry.pool.manifest(name))
        except AdapterError:
            continue
        if routing is not None and routing.glance is not None:
            return prototype_of(routing.glance).background, prototype_of(routing).background
    model, width = registry.model, background_width(registry.model)
    texts = tokenize_messages(model, background_texts(model, NUM_BACKGROUND_TEXTS))
    return (
        fit_mixture(token_features(model, texts)[:, :width], 1, TOKEN_RANK),
        fit_mixture(early_layer_features(model, texts)[:, :width], 1, BACKGROUND_RANK),
    )
