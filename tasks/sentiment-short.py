"""The short reviews of `sentiment` alone, in the same splits: one sentence each."""

from adapterhub_chat.data.task import Task, load_task


def task() -> Task:
    """Return the task."""
    source = load_task("sentiment")
    return Task(
        name="sentiment-short",
        contract=source.contract,
        metric=source.metric,
        load=lambda: source.splits.where(lambda e: e.fields["register"] == "short"),
        about="Is a one-sentence movie review negative or positive?",
        licence=source.licence,
        sources=source.sources,
    )
