"""The tasks that ship: each is loaded and its data counted, on the real packages."""

import re
from collections import Counter, defaultdict

import pytest

from adapterhub_chat.data.metrics import METRICS
from adapterhub_chat.data.prompts import render_prompt
from adapterhub_chat.data.splits import input_key
from adapterhub_chat.data.task import list_tasks, load_task
from adapterhub_chat.types import SPLITS

LEAST = {  # examples in all splits; in test
    "sentiment": (10_200, 950),
    "sentiment-short": (8_400, 750),
    "sentiment-long": (1_900, 180),
    "sentiment-airline": (2_700, 300),
    "qa": (11_000, 1_000),
    "generation": (100_000, 8_000),
    "customer-service": (10_000, 900),
    "customer-service-zh": (4_000, 300),
    "entertainment": (4_000, 350),
    "education": (2_000, 150),
    "education-zh": (30_000, 2_500),
    "sentiment-zh": (17_000, 1_600),
    "intents-en": (1_300, 60),
    "intents-zh": (1_300, 60),
    "intents-de": (1_300, 60),
    "intents-fr": (1_300, 60),
    "intents-es": (1_300, 60),
    "reply-choice-zh": (1_500, 100),
    "support-tickets": (60, 10),
}
TASKS = [
    pytest.param(name, marks=() if name == "support-tickets" else pytest.mark.slow)
    for name in LEAST
]


@pytest.fixture(scope="module")
def loaded():
    tasks = {}

    def load(name):
        tasks[name] = tasks.get(name) or load_task(name)
        return tasks[name]

    return load


def every(task):
    return [e for split in SPLITS for e in task.split(split)]


def test_every_task_that_ships_is_tested_here():
    assert LEAST.keys() <= list_tasks().keys()
    built_in = {n for n, path in list_tasks().items() if path.is_absolute()}
    assert built_in <= LEAST.keys()


@pytest.mark.parametrize("name", TASKS)
def test_task(name, loaded):
    task = loaded(name)
    assert task.name == name
    assert task.metric in METRICS
    assert task.about
    assert task.licence != "unknown"
    assert task.sources
    assert len(every(task)) >= LEAST[name][0]
    assert len(task.split("test")) >= LEAST[name][1]

    keys = Counter(input_key(e, task.contract) for e in every(task))
    assert keys.most_common(1)[0][1] == 1, "an input is in two splits, or twice in one"
    split_of_group = defaultdict(set)
    for split in SPLITS:
        for e in task.split(split):
            if e.group:
                split_of_group[e.group].add(split)
    assert all(len(splits) == 1 for splits in split_of_group.values())

    for e in every(task):
        assert render_prompt(task.contract.template, e.fields)
        assert e.answer in e.accepted
        assert e.answer == e.answer.strip()
        roles = [turn.role for turn in e.history]
        assert roles == ["user", "assistant"] * (len(roles) // 2), "the user's turn comes next"


@pytest.mark.parametrize("name", TASKS)
def test_data_is_the_same_each_time(name, loaded):
    assert load_task(name).data_hash() == loaded(name).data_hash()


@pytest.mark.slow
def test_sentiment_is_balanced_and_led_by_short_reviews(loaded):
    task = loaded("sentiment")
    for split in SPLITS:
        labels = Counter(e.answer for e in task.split(split))
        assert min(labels.values()) > 0.45 * sum(labels.values())
    short = [e for e in task.split("test") if e.fields["register"] == "short"]
    assert len(short) > 700
    words = Counter()
    for e in every(task):
        assert "<br" not in e.fields["text"]
        words[e.fields["register"]] += len(e.fields["text"].split())
    assert words["long"] < 1.2 * words["short"]


@pytest.mark.slow
def test_qa_answers_are_spans_of_their_passages(loaded):
    examples = every(loaded("qa"))
    passages = [e for e in examples if "context" in e.fields]
    assert len(passages) > 6_000
    assert len(examples) - len(passages) > 4_000
    for e in passages:
        assert e.answer in e.fields["context"]
        assert len(e.fields["context"].split()) < 110
    assert not any("http" in str(e.fields) or "AUTHOR" in str(e.fields) for e in examples)


@pytest.mark.slow
def test_no_capital_is_told_in_two_splits(loaded):
    task = loaded("qa")
    contexts = {s: [e.fields.get("context", "") for e in task.split(s)] for s in SPLITS}
    capitals = {
        s: set(
            re.findall(r"capital of (?:the )?([A-Z]\w+(?: [A-Z]\w+)*) is", " ".join(contexts[s]))
        )
        for s in SPLITS
    }
    assert len(capitals["train"]) > 100
    assert not capitals["train"] & (capitals["validation"] | capitals["test"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qa", "education", "entertainment"])
def test_short_answers_are_short(name, loaded):
    examples = every(loaded(name))
    assert not any("http" in e.fields["question"] + " ".join(e.accepted) for e in examples)
    answers = [e.answer for e in examples]
    assert sum(len(answer.split()) <= 6 for answer in answers) > 0.98 * len(answers)
    assert not any("uscis.gov" in answer or "will vary" in answer for answer in answers)


@pytest.mark.slow
def test_the_same_question_is_tested_in_every_task_that_has_it(loaded):
    """qa and the domains share lists: what one trains on, none tests."""
    tasks = [loaded(name) for name in ("qa", "education", "entertainment")]
    trained = {input_key(e, t.contract) for t in tasks for e in t.split("train")}
    tested = {input_key(e, t.contract) for t in tasks for e in t.split("test")}
    assert not trained & tested


@pytest.mark.slow
def test_conversation_is_clean(loaded):
    examples = every(loaded("generation"))
    assert len({e.group for e in examples}) > 3_000
    for e in examples:
        assert e.group
        for turn in (e.fields["text"], e.answer, *(m.content for m in e.history)):
            assert turn.isascii()
            assert len(turn) >= 2
            assert len(turn.split()) <= 40


@pytest.mark.slow
def test_customers_labels_and_blanks(loaded):
    labels = Counter(e.answer for e in every(loaded("customer-service")))
    assert min(labels.values()) > 1_000
    assert not any(" " in e.fields["text"] + e.answer for e in every(loaded("customer-service-zh")))


def test_support_tickets_have_all_labels_everywhere(loaded):
    task = loaded("support-tickets")
    for split in SPLITS:
        assert len({e.answer for e in task.split(split)}) == 3
