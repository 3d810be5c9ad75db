"""Which command to a smart home is it? Spanish sentences, the same labels in every language."""

from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task

from ._intents import COMMANDS, LICENCE, SOURCE, commands


def task() -> Task:
    """Return the task."""
    return Task(
        name="intents-es",
        contract=COMMANDS,
        metric="accuracy",
        load=lambda: split_examples(commands("es"), COMMANDS, source="intents-es"),
        language="es",
        about="Spanish commands to a smart home, by intent.",
        licence=LICENCE,
        sources=(SOURCE,),
    )
