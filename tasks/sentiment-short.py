"""The short reviews of `sentiment` alone, in the same splits: one sentence each."""

from functools import partial

from adapterhub_chat.splits import Splits
from adapterhub_chat.task import Task, load_task


def load(whole: Task) -> Splits:
    """Keep the one-sentence reviews."""
    parts = {
        split: tuple(e for e in examples if e.fields["register"] == "short")
        for split, examples in whole.splits.parts.items()
    }
    return Splits(parts)


def task() -> Task:
    """Return the task."""
    whole = load_task("sentiment")
    return Task(
        name="sentiment-short",
        contract=whole.contract,
        metric=whole.metric,
        load=partial(load, whole),
        about="Is a one-sentence movie review negative or positive?",
        licence=whole.licence,
        sources=whole.sources,
    )
