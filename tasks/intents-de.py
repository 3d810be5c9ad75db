"""Which command to a smart home is it? German sentences, the same labels in every language."""

from ._intents import intents_task

task = intents_task("de", "German")
