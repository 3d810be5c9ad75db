"""Which command to a smart home is it? French sentences, the same labels in every language."""

from adapterhub_chat.data.splits import split_examples
from adapterhub_chat.data.task import Task

from ._intents import COMMANDS, LICENCE, SOURCE, commands


def task() -> Task:
    """Return the task."""
    return Task(
        name="intents-fr",
        contract=COMMANDS,
        metric="accuracy",
        load=lambda: split_examples(commands("fr"), COMMANDS, source="intents-fr"),
        language="fr",
        about="French commands to a smart home, by intent.",
        licence=LICENCE,
        sources=(SOURCE,),
    )
