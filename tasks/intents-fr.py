"""Which command to a smart home is it? French sentences, the same labels in every language."""

from ._intents import intents_task

task = intents_task("fr", "French")
