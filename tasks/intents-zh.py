"""Which command to a smart home is it? Chinese sentences, the same labels in every language."""

from adapterhub_chat.smart_home import COMMANDS, LICENCE, SOURCE, commands
from adapterhub_chat.task import Task, split_examples


def task() -> Task:
    """Return the task."""
    return Task(
        name="intents-zh",
        contract=COMMANDS,
        metric="accuracy",
        load=lambda: split_examples(commands("zh-CN"), COMMANDS, source="intents-zh"),
        language="zh",
        about="Chinese commands to a smart home, by intent.",
        licence=LICENCE,
        sources=(SOURCE,),
    )
