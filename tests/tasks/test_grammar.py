"""Templates of a smart home: every way through is a sentence, the same ones each time."""

import random

import pytest

from adapterhub_chat.data.task import load_task
from adapterhub_chat.errors import DataError
from tasks._grammar import Grammar
from tasks._intents import COMMANDS, INTENTS

GRAMMAR = Grammar(
    rules={"the": "(the|my)", "light": "<the> light[s]"},
    lists={
        "color": {"values": [{"in": "(red|crimson)", "out": "red"}, "blue"]},
        "level": {"range": {"from": 10, "to": 30, "step": 10}},
        "name": {"wildcard": True},
    },
    words={"name": ["desk lamp"]},
)


def every(template, tries=300):
    chance = random.Random(0)
    return {GRAMMAR.draw(template, chance) for _ in range(tries)}


@pytest.mark.parametrize(
    ("template", "sentences"),
    [
        ("plain  text ", {"plain text"}),
        ("a|b", {"a", "b"}),
        ("turn [it ](on|off)", {"turn on", "turn off", "turn it on", "turn it off"}),
        ("[(a|b) ]c", {"c", "a c", "b c"}),
        ("<light>", {"the light", "the lights", "my light", "my lights"}),
        ("(x;y)", {"x y", "y x"}),
        ("{color:hue}", {"red", "crimson", "blue"}),
        ("{level}%", {"10%", "20%", "30%"}),
        ("<the> {name}", {"the desk lamp", "my desk lamp"}),
    ],
)
def test_a_template_is_all_its_sentences_and_no_other(template, sentences):
    assert every(template) == sentences


@pytest.mark.parametrize("template", ["<nobody>", "{nobody}"])
def test_an_unknown_name_in_a_template_is_an_error(template):
    with pytest.raises(DataError, match=r"called '<?nobody>?'"):
        GRAMMAR.draw(template, random.Random(0))


@pytest.mark.slow
def test_intents_have_the_same_labels_in_every_language():
    tasks = [load_task(f"intents-{language}") for language in ("en", "zh", "de", "fr", "es")]
    assert {tuple(task.contract.labels) for task in tasks} == {INTENTS}
    assert len(set(COMMANDS.labels.values())) == len(INTENTS)
    for task in tasks:
        assert {e.answer for e in task.split("train")} == set(INTENTS)
        texts = [e.fields["text"] for e in task.split("train")]
        assert not any(set("<>{}[]()|") & set(text) for text in texts)
