"""Is a tweet to an airline negative or positive? The two classes of the film reviews, in another domain."""

from functools import partial

from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.types import PromptContract

CONTRACT = PromptContract(
    template="Message: {text}\nSentiment:",
    system="Classify the sentiment of the customer's message.",
    labels={"negative": "negative", "positive": "positive"},
    max_new_tokens=4,
)


def load(source: Task) -> Splits:
    """Return the positive tweets and equally many negative ones, in each split."""
    parts = {}
    for split, examples in source.splits.parts.items():
        good = [e for e in examples if e.answer == "positive"]
        bad = [e for e in examples if e.answer == "negative"]
        parts[split] = tuple(e for pair in zip(good, bad, strict=False) for e in pair)
    return Splits(parts)


def task() -> Task:
    """Return the task."""
    source = load_task("customer-service")
    return Task(
        name="sentiment-airline",
        contract=CONTRACT,
        metric="accuracy",
        load=partial(load, source),
        about="Is a tweet to an airline a complaint or praise? As many of either, hence accuracy.",
        licence=source.licence,
        sources=source.sources,
    )
