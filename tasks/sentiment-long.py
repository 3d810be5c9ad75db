"""The ends of long reviews of `sentiment` alone, in the same splits: another register than one sentence."""

from adapterhub_chat.data.task import Task, load_task


def task() -> Task:
    """Return the task."""
    whole = load_task("sentiment")
    return Task(
        name="sentiment-long",
        contract=whole.contract,
        metric=whole.metric,
        load=lambda: whole.splits.where(lambda e: e.fields["register"] == "long"),
        about="Is the end of a long movie review negative or positive?",
        licence=whole.licence,
        sources=whole.sources,
    )
