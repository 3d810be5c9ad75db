"""The ends of long reviews of `sentiment` alone, in the same splits: another register than one sentence."""

from adapterhub_chat.data.task import Task, load_task


def task() -> Task:
    """Return the task."""
    source = load_task("sentiment")
    return Task(
        name="sentiment-long",
        contract=source.contract,
        metric=source.metric,
        load=lambda: source.splits.where(lambda e: e.fields["register"] == "long"),
        about="Is the end of a long movie review negative or positive?",
        licence=source.licence,
        sources=source.sources,
    )
