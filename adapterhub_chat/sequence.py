"""Tasks one after another: a new adapter for each, the earlier ones left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adapterhub_chat.jobs import Job
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.train import Event, Trained, train


def train_sequence(
    model: AdapterModel, jobs: Sequence[Job], *, on_event: Callable[[Event], None] = lambda _: None
) -> Iterator[tuple[str, Trained]]:
    """Yield each adapter when it is finished; stop after one that was interrupted.

    Every adapter has its own factors and the backbone is frozen, so an earlier one cannot be forgotten.
    """
    for job in jobs:
        (trained,) = train(model, [job], on_event=on_event).values()
        yield job.name, trained
        if trained.stopped == "interrupted":
            return
