"""Which command to a smart home is it? German sentences, the same labels in every language."""

from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task

from ._intents import COMMANDS, LICENCE, SOURCE, commands


def task() -> Task:
    """Return the task."""
    return Task(
        name="intents-de",
        contract=COMMANDS,
        metric="accuracy",
        load=lambda: split_examples(commands("de"), COMMANDS, source="intents-de"),
        language="de",
        about="German commands to a smart home, by intent.",
        licence=LICENCE,
        sources=(SOURCE,),
    )
