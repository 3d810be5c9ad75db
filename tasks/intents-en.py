"""Which command to a smart home is it? English sentences, the same labels in every language."""

from adapterhub_chat.smart_home import COMMANDS, LICENCE, SOURCE, commands
from adapterhub_chat.task import Task, split_examples


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
