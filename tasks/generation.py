"""Say the next thing in a friendly conversation."""

import json
import re
from collections.abc import Iterator
from itertools import groupby

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task
from adapterhub_chat.types import Example, Message, PromptContract

CONTRACT = PromptContract(
    system="You are a friendly person chatting.",
    max_new_tokens=40,
    temperature=0.8,
    top_p=0.95,
)
MAX_WORDS = 40
RUDE = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|cunt\w*|dick\w*|cock\w*|pussy|penis|vagina|porn\w*|sex\w*|rape\w*"
    r"|nigg\w*|fag\w*|whore\w*|slut\w*|retard\w*|suicid\w*|kill (yo)?urself|nude\w*|horny)\b",
    re.IGNORECASE,
)


def examples() -> Iterator[Example]:
    """Yield each reply with the turn before it as the prompt, and up to two earlier turns as history."""
    data = json.loads(data_path("chitchat").read_text(encoding="utf-8"))
    for name, conversation in data.items():
        turns = [" ".join(" ".join(m["text"] for m in t).split()) for t in conversation["messages"]]
        for fine, run in groupby(turns, key=is_fine):
            if fine:
                yield from examples_of(list(run), name)


def examples_of(turns: list[str], conversation: str) -> Iterator[Example]:
    """Yield the examples of turns that follow each other; history begins with the user."""
    for i in range(1, len(turns)):
        earlier = turns[i - 3 : i - 1] if i >= 3 else []
        history = (Message("user", earlier[0]), Message("assistant", earlier[1])) if earlier else ()
        yield Example({"text": turns[i - 1]}, turns[i], history=history, group=conversation)


def is_fine(turn: str) -> bool:
    """Return whether a turn is short, inoffensive plain English."""
    return (
        len(turn) > 1
        and re.search("[a-zA-Z]", turn) is not None
        and len(turn.split()) <= MAX_WORDS
        and "http" not in turn
        and not RUDE.search(turn)
    )


def task() -> Task:
    """Return the task."""
    return Task(
        name="generation",
        contract=CONTRACT,
        metric="perplexity",
        load=lambda: split_examples(examples(), CONTRACT, source="generation"),
        about="Open conversation between students; up to three turns of context.",
        licence="MIT",
        sources=("chitchat-dataset==0.9.0",),
    )
