"""What is learnt of an adapter's messages out of its tasks, for its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from adapterhub_chat.clouds import Cloud, cloud_of
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.imagine import imagined
from adapterhub_chat.jobs import sample
from adapterhub_chat.looks import glances, looks, read, width, wordless
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.prompt import placeholders
from adapterhub_chat.route import (
    BACKGROUND_RANK,
    FEWEST,
    GLANCE_RANK,
    Judge,
    Judges,
    learn,
)
from adapterhub_chat.routing import Routing, routing_of
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task
from adapterhub_chat.types import Example, Split

LEARNT, HELD_OUT, IMAGINED = 1400, 250, 480
"""Messages that a prototype is learnt from and ranks among, and texts of the background."""


def usable_routing(shelf: Shelf, manifest: Manifest | None) -> Routing | None:
    """Return a manifest's routing, None where there is none or it was learnt on another backbone.

    A glance of other sizes is left out: the messages are then looked at.
    """
    if manifest is None or manifest.routing is None:
        return None
    backbone = shelf.model.backbone
    same = not manifest.fingerprint.differences(backbone.fingerprint)
    sizes = width(shelf.model), wordless(shelf.model)
    routing, glance = manifest.routing, manifest.routing.glance
    if not same or (routing.width, routing.background_width) != sizes:
        return None
    fits = glance is None or (glance.width, glance.background_width) == sizes
    return routing if fits else routing.model_copy(update={"glance": None})


def judges_of(routing: Routing) -> Judges:
    """Return who judges by a manifest's routing."""
    glance = routing.glance
    return Judges(Judge(routing.prototype()), None if glance is None else Judge(glance.prototype()))


def learn_routing(shelf: Shelf, tasks: Sequence[Task]) -> Routing | None:
    """Return what an adapter's messages look like; None where they are too few to tell, and on an encoder."""
    own = messages_in(tasks, "train", LEARNT)
    held_out = messages_in(tasks, "validation", HELD_OUT)
    if len(held_out) < FEWEST:
        cut = len(own) * 3 // 4
        own, held_out = own[:cut], own[cut:]
    model = shelf.model
    encodes = model.backbone.encodes  # it makes nothing up, so there is no background
    if min(len(own), len(held_out)) < FEWEST or encodes or not model.early_block:
        return None
    sketched, seen = _backgrounds(shelf)
    texts, held = read(model, own), read(model, held_out)
    return routing_of(
        learn(looks(model, texts), looks(model, held), seen),
        learn(glances(model, texts), glances(model, held), sketched, GLANCE_RANK),
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


def _backgrounds(shelf: Shelf) -> tuple[Cloud, Cloud]:
    """Return the clouds of what the backbone makes up, glances and looks: a pool member's, or made up now."""
    for name in shelf.pool.names():
        try:
            routing = usable_routing(shelf, shelf.pool.manifest(name))
        except AdapterError:
            continue
        if routing is not None and routing.glance is not None:
            return routing.glance.prototype().background, routing.prototype().background
    model, narrow = shelf.model, wordless(shelf.model)
    texts = read(model, imagined(model, IMAGINED))
    return (
        cloud_of(glances(model, texts)[:, :narrow], 1, GLANCE_RANK),
        cloud_of(looks(model, texts)[:, :narrow], 1, BACKGROUND_RANK),
    )
