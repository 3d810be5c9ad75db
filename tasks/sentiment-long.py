"""The ends of long reviews of `sentiment` alone, in the same splits: another register than one sentence."""

from functools import partial

from adapterhub_chat.splits import Splits
from adapterhub_chat.task import Task, load_task


def load(whole: Task) -> Splits:
    """Keep the long reviews."""
    parts = {
        split: tuple(e for e in examples if e.fields["register"] == "long")
        for split, examples in whole.splits.parts.items()
    }
    return Splits(parts)


def task() -> Task:
    """Return the task."""
    whole = load_task("sentiment")
    return Task(
        name="sentiment-long",
        contract=whole.contract,
        metric=whole.metric,
        load=partial(load, whole),
        about="Is the end of a long movie review negative or positive?",
        licence=whole.licence,
        sources=whole.sources,
    )
