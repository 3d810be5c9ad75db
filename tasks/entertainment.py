"""Short questions about films, games, series and brands."""

from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task

from ._trivia import SHORT_ANSWER, red_trivia

LISTS = (
    *("2015", "2016", "anime", "disney", "entertainment", "finalfantasy", "gameofthrones"),
    *("games", "harrypotter", "pokemon", "starwars"),
)


def task() -> Task:
    """Return the task."""
    return Task(
        name="entertainment",
        contract=SHORT_ANSWER,
        metric="token_f1",
        load=lambda: split_examples(red_trivia(*LISTS), SHORT_ANSWER, source="entertainment"),
        about="Trivia about films, games and series.",
        licence="GPL-3.0 (fetched, not redistributed)",
        sources=("Red-Trivia==1.1.1",),
    )
