"""Which command to a smart home is it? English sentences, the same labels in every language."""

from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task

from ._intents import COMMANDS, LICENCE, SOURCE, commands


def task() -> Task:
    """Return the task."""
    return Task(
        name="intents-en",
        contract=COMMANDS,
        metric="accuracy",
        load=lambda: split_examples(commands("en"), COMMANDS, source="intents-en"),
        language="en",
        about="English commands to a smart home, by intent.",
        licence=LICENCE,
        sources=(SOURCE,),
    )
