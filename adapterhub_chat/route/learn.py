"""What is learnt of an adapter's messages out of its tasks, for its manifest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.prototype import Routing
from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.inference.generate import generate
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.choice import AdapterScorers
from adapterhub_chat.route.fit import (
    BACKGROUND_RANK,
    GLANCE_RANK,
    MIN_MESSAGES,
    PrototypeScorer,
    fit_prototype,
)
from adapterhub_chat.route.gaussians import fit_mixture
from adapterhub_chat.route.message_features import (
    early_layer_features,
    token_features,
    tokenize_messages,
    width,
    wordless,
)
from adapterhub_chat.route.prototype import GaussianMixture, prototype_of, routing_of
from adapterhub_chat.types import NO_ADAPTER, Example, Split

LEARNT, HELD_OUT, IMAGINED = 1400, 250, 480
"""Messages that a prototype is learnt from and ranks among, and texts of the background."""


def usable_routing(registry: Registry, manifest: Manifest | None) -> Routing | None:
    """Return a manifest's routing, None where there is none or it was learnt on another backbone.

    A glance of other sizes is left out: the messages are then looked at.
    """
    if manifest is None or manifest.routing is None:
        return None
    backbone = registry.model.backbone
    same = not manifest.fingerprint.differences(backbone.fingerprint)
    sizes = width(registry.model), wordless(registry.model)
    routing, glance = manifest.routing, manifest.routing.glance
    if not same or (routing.width, routing.background_width) != sizes:
        return None
    fits = glance is None or (glance.width, glance.background_width) == sizes
    return routing if fits else routing.model_copy(update={"glance": None})


def scorers_of(routing: Routing) -> AdapterScorers:
    """Return who judges by a manifest's routing."""
    glance = None if routing.glance is None else PrototypeScorer(prototype_of(routing.glance))
    return AdapterScorers(PrototypeScorer(prototype_of(routing)), glance)


def learn_routing(registry: Registry, tasks: Sequence[Task]) -> Routing | None:
    """Return what an adapter's messages look like; None where they are too few to tell, and on an encoder."""
    own = messages_in(tasks, "train", LEARNT)
    held_out = messages_in(tasks, "validation", HELD_OUT)
    if len(held_out) < MIN_MESSAGES:
        cut = len(own) * 3 // 4
        own, held_out = own[:cut], own[cut:]
    model = registry.model
    encodes = model.backbone.encodes  # it makes nothing up, so there is no background
    if min(len(own), len(held_out)) < MIN_MESSAGES or encodes or not model.early_block:
        return None
    sketched, seen = _backgrounds(registry)
    texts, held = tokenize_messages(model, own), tokenize_messages(model, held_out)
    return routing_of(
        fit_prototype(early_layer_features(model, texts), early_layer_features(model, held), seen),
        fit_prototype(
            token_features(model, texts), token_features(model, held), sketched, GLANCE_RANK
        ),
    )


def message_of(task: Task, example: Example) -> str:
    """Return what a user would type for an example: its fields, in the template's order, a line each."""
    template = task.contract_of(example).template
    values = (example.fields.get(name, "") for name in placeholders(template))
    return "\n".join(value for value in values if value)


def messages_in(tasks: Sequence[Task], split: Split, limit: int) -> list[str]:
    """Return about `limit` messages as users type them, one from each task in turn."""
    share = -(-limit // len(tasks))
    rows = ([message_of(task, e) for e in sample(task.split(split), share)] for task in tasks)
    return [text for turn in zip_longest(*rows) for text in turn if text is not None]


def _backgrounds(registry: Registry) -> tuple[GaussianMixture, GaussianMixture]:
    """Return the clouds of what the backbone makes up, glances and looks: a pool member's, or made up now."""
    for name in registry.pool.names():
        try:
            routing = usable_routing(registry, registry.pool.manifest(name))
        except AdapterError:
            continue
        if routing is not None and routing.glance is not None:
            return prototype_of(routing.glance).background, prototype_of(routing).background
    model, narrow = registry.model, wordless(registry.model)
    texts = tokenize_messages(model, sample_background(model, IMAGINED))
    return (
        fit_mixture(token_features(model, texts)[:, :narrow], 1, GLANCE_RANK),
        fit_mixture(early_layer_features(model, texts)[:, :narrow], 1, BACKGROUND_RANK),
    )


LENGTHS = (8, 16, 32, 48)
MARK = "\u2402"
"""Stands for the message when the chat template is cut open there."""


def sample_background(model: AdapterModel, count: int, seed: int = 0) -> list[str]:
    """Return about `count` texts sampled from the bare backbone; those that are blank are left out."""
    tokenizer = model.backbone.tokenizer
    start = _opening(tokenizer)
    special, size = set(tokenizer.all_special_ids), len(tokenizer)
    draw = random.Random(seed)
    first = [
        [] if i % 2 else [t for t in [draw.randrange(size)] if t not in special]
        for i in range(count)
    ]
    requests = [
        Request((*start, *own), NO_ADAPTER, Sampling(draw.choice(LENGTHS), 1.0, seed=seed + i))
        for i, own in enumerate(first)
    ]
    texts = [
        tokenizer.decode(own) + text
        for own, text in zip(first, generate(model, requests), strict=True)
    ]
    return [text for text in texts if text.strip()]


def _opening(tokenizer: Any) -> list[int]:
    """Return the ids of a conversation up to where the user's message begins; at least one."""
    rendered = ""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": MARK}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False).partition(MARK)[0]
    ids = tokenizer(rendered, add_special_tokens=False).input_ids if rendered else []
    return list(ids) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
