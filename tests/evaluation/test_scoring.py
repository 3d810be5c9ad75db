"""Scores equal those of plain transformers, one example at a time, without packing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pico import toy_answers, toy_talk, toy_task

from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.data.metrics import distinct_n, exact_match, label_rows, token_f1
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task, mixture
from adapterhub_chat.errors import DataError
from adapterhub_chat.evaluation.scoring import evaluate, judge, score
from adapterhub_chat.inference.generate import answers, generate, sampling_of
from adapterhub_chat.inference.likelihood import label_scores, sequence_losses
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.types import Example, Mix, PromptContract, as_mix

A, B = as_mix("a"), as_mix("b")


@pytest.fixture
def loaded(model, make_weights):
    """Two adapters: `a` and `b` both change every logit."""
    model.load("a", make_weights(rank=4, seed=1))
    model.load("b", make_weights(rank=8, seed=2, only=("q_proj", "down_proj")))
    return model


def prompt_of(tokenizer, contract, example):
    """The prompt as a user of transformers would write it."""
    system = [{"role": "system", "content": contract.system}] if contract.system else []
    user = {"role": "user", "content": contract.template.format(**example.fields)}
    text = tokenizer.apply_chat_template(
        [*system, user], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def log_likelihood(model, mix, prompt, answer):
    """log p(answer | prompt) from one plain forward of one unpacked, unpadded row."""
    with model.mixing([mix]):
        logits = model.backbone.model(torch.tensor([[*prompt, *answer]])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logprobs[i, t]) for i, t in zip(places, answer, strict=True))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def guesses_by_hand(model, mix, task, examples):
    tokenizer, contract = model.backbone.tokenizer, task.contract
    actual = []
    for example in examples:
        prompt = prompt_of(tokenizer, contract, example)
        likely = {
            label: log_likelihood(model, mix, prompt, ids(tokenizer, words))
            for label, words in contract.labels.items()
        }
        actual.append(max(likely, key=likely.get))
    return actual


def test_accuracy_and_macro_f1_equal_a_hand_computation(loaded):
    task = toy_task()
    examples = task.split("test")
    golds = [e.answer for e in examples]
    for mix in (A, B, Mix(), as_mix({"a": 0.5, "b": 0.5})):
        guesses = guesses_by_hand(loaded, mix, task, examples)
        hits = [g == w for g, w in zip(golds, guesses, strict=True)]
        judged = judge(loaded, task, examples, mix)
        assert score("x", task, judged, None).value == pytest.approx(sum(hits) / len(hits))
        f1 = []
        for label in {*golds, *guesses}:
            both = sum(g == w == label for g, w in zip(golds, guesses, strict=True))
            f1.append(2 * both / (golds.count(label) + guesses.count(label)))
        assert judged.details["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def test_f1_and_exact_match_equal_a_hand_computation(loaded):
    task = toy_answers()
    tokenizer, contract = loaded.backbone.tokenizer, task.contract
    examples = [
        replace(e, references=(e.answer, "9", "positive")) for e in task.split("test")
    ]  # the untrained pico model says such things
    texts = []
    for example in examples:
        prompt = tuple(prompt_of(tokenizer, contract, example))
        texts += generate(loaded, [Request(prompt, A, sampling_of(contract))])
    assert all("\n" not in t and t == t.strip() for t in texts)
    judged = judge(loaded, task, examples, A)
    f1 = [token_f1(t, e.references) for t, e in zip(texts, examples, strict=True)]
    exact = [exact_match(t, e.references) for t, e in zip(texts, examples, strict=True)]
    assert score("x", task, judged, None).value == pytest.approx(sum(f1) / len(f1))
    assert judged.details == {"exact_match": pytest.approx(sum(exact) / len(exact))}
    by_match = replace(task, metric="exact_match")
    judged = judge(loaded, by_match, examples, A)
    assert score("x", by_match, judged, None).value == pytest.approx(sum(exact) / len(exact))


def test_perplexity_and_diversity_equal_a_hand_computation(loaded):
    task = toy_talk()
    tokenizer, contract, examples = loaded.backbone.tokenizer, task.contract, task.split("test")
    for mix in (A, Mix()):
        total, count, texts = 0.0, 0, []
        for example in examples:
            prompt = prompt_of(tokenizer, contract, example)
            answer = [*ids(tokenizer, example.answer), tokenizer.eos_token_id]
            total, count = total + log_likelihood(loaded, mix, prompt, answer), count + len(answer)
            texts += generate(loaded, [Request(tuple(prompt), mix, sampling_of(contract))])
        judged = judge(loaded, task, examples, mix)
        assert score("x", task, judged, None).value == pytest.approx(
            math.exp(-total / count), rel=1e-5
        )
        assert judged.details == {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}


def test_label_shares_are_the_softmax_of_the_label_likelihoods(loaded):
    task = toy_task()
    tokenizer, examples = loaded.backbone.tokenizer, task.split("validation")
    shares = label_scores(loaded, task.contract, examples, A)
    assert shares.shape == (len(examples), 2)
    for row, example in zip(shares, examples, strict=True):
        prompt = prompt_of(tokenizer, task.contract, example)
        expected = torch.tensor(
            [log_likelihood(loaded, A, prompt, ids(tokenizer, w)) for w in ("negative", "positive")]
        ).softmax(-1)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_labels_with_a_common_prefix_are_scored_in_full(loaded):
    """60 labels whose words differ only at their end: none may be cut to fit a row."""
    words = {str(i): f"the film is about a role in a {i}" for i in range(60)}
    contract = PromptContract(template="{text}", labels=words)
    example = Example({"text": "Which one?"}, "0")
    (row,) = label_scores(loaded, contract, [example], A)
    tokenizer = loaded.backbone.tokenizer
    prompt = prompt_of(tokenizer, contract, example)
    end = [tokenizer.eos_token_id]  # "... 1" begins "... 10": the end of the turn takes part
    expected = torch.tensor(
        [log_likelihood(loaded, A, prompt, ids(tokenizer, w) + end) for w in words.values()]
    ).softmax(-1)
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-3)
    assert len(set(row.tolist())) == 60


def test_packing_changes_no_loss(loaded):
    task = toy_task()
    tokenizer = loaded.backbone.tokenizer
    for split in ("train", "test"):
        encoded = encode_examples(tokenizer, task.contract, task.split(split), max_length=256)
        alone = torch.cat([sequence_losses(loaded, [e], B, row_length=64) for e in encoded])
        for length in (64, 100, 256, 512):
            packed = sequence_losses(loaded, encoded, B, row_length=length)
            torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_mixture_scores_each_example_by_its_own_contract(loaded):
    one = toy_task("one")
    words = {"good": "negative", "bad": "positive"}  # the other way round
    two = toy_task("two")
    two = replace(two, contract=replace(two.contract, template="{text}?", labels=words))
    both = mixture("both", [one, two])
    examples = both.split("test")
    assert {e.contract.template for e in examples} == {"Review: {text}", "{text}?"}
    guesses, foreign = [], []
    for example in examples:
        own, other = (one, two) if example.contract == one.contract else (two, one)
        guesses += guesses_by_hand(loaded, A, own, [example])
        wrong = replace(own, contract=replace(own.contract, labels=other.contract.labels))
        foreign += guesses_by_hand(loaded, A, wrong, [example])
    assert guesses != foreign, "both label sets guess alike: prove nothing"
    expected = label_rows([e.answer for e in examples], guesses)
    assert judge(loaded, both, examples, A).rows.tolist() == expected.tolist()

    short = toy_answers("short")
    long = replace(short, contract=replace(short.contract, max_new_tokens=40, stop=("user",)))
    asked = [replace(e, contract=t.contract) for t in (short, long) for e in t.split("test")]
    texts = answers(loaded, short.contract, asked, [A] * len(asked))
    assert texts[:8] == answers(loaded, short.contract, short.split("test"), [A] * 8)
    assert texts[8:] == answers(loaded, long.contract, long.split("test"), [A] * 8)
    assert max(map(len, texts[8:])) > max(map(len, texts[:8]))


def test_answers_keep_their_order_across_batches(loaded):
    contract = PromptContract(template="{text}", max_new_tokens=5)
    texts = [f"film {'x' * (i * 7 % 11)} {i}" for i in range(40)]  # more than one batch
    examples = [Example({"text": t}, "") for t in texts]
    mixes = [(A, B, Mix())[i % 3] for i in range(40)]
    progress = []
    actual = answers(loaded, contract, examples, mixes, on_progress=progress.append)
    assert sum(progress) == 40
    for i in (0, 1, 2, 17, 38, 39):
        assert answers(loaded, contract, examples[i : i + 1], mixes[i : i + 1]) == [actual[i]]


def test_seeded_answers_depend_only_on_their_index(loaded):
    contract = PromptContract(template="{text}", max_new_tokens=8, temperature=1.5)
    same = [Example({"text": "Say something"}, "")] * 5
    first = answers(loaded, contract, same, [A] * 5, seed=0)
    assert first == answers(loaded, contract, same, [A] * 5, seed=0)
    assert first[1:] == answers(loaded, contract, same[:4], [A] * 4, seed=1)
    assert len(set(first)) > 2
    longer = [Example({"text": "x" * n}, "") for n in range(1, 60)]  # other batches, other order
    assert answers(loaded, contract, [*same, *longer], [A] * 64, seed=0)[:5] == first


# ---- Score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [toy_task, toy_answers, toy_talk])
def test_scores_have_intervals_and_the_backbones_value(loaded, make):
    task = make()
    pairs = [(task, task.split("test"))]
    counted = []
    actual = evaluate(
        loaded,
        [("a", A), ("b", B), ("backbone", Mix())],
        pairs,
        on_progress=lambda what, n: counted.append((what, n)),
    )
    assert [s.adapter for s in actual] == ["a", "b", "backbone"]
    for s, mix in zip(actual, (A, B, Mix()), strict=True):
        assert (s.task, s.metric, s.n) == (task.name, task.metric, len(task.split("test")))
        assert s.value == score("x", task, judge(loaded, task, task.split("test"), mix), None).value
        assert s.low <= s.value <= s.high
        assert s.backbone_value == actual[-1].value
    assert {what for what, _ in counted} == {task.name}
    assert sum(n for _, n in counted) == 3 * actual[0].n  # the backbone is measured once
    again = evaluate(loaded, [("a", A), ("b", B), ("backbone", Mix())], pairs)
    assert again == actual


def test_the_interval_shrinks_with_the_number_of_items(loaded):
    rows = judge(loaded, toy_talk(size=400), toy_talk(size=400).split("test"), A)
    many = score("x", toy_talk(), rows, None)
    few = score("x", toy_talk(), replace(rows, rows=rows.rows[:8]), None)
    assert few.n == 8
    assert many.n > 300
    assert (many.high - many.low) < (few.high - few.low) / 2


def test_backbone_value_is_none_without_a_measurement(loaded):
    task = toy_task()
    judged = judge(loaded, task, task.split("test"), A)
    assert score("x", task, judged, None).backbone_value is None
    assert score("x", task, judged, judged).backbone_value == score("x", task, judged, None).value


@pytest.mark.parametrize("make", [toy_task, toy_answers, toy_talk])
def test_empty_split_is_an_error(loaded, make):
    empty = replace(make(), load=lambda: Splits({}))
    with pytest.raises(DataError):
        evaluate(loaded, [("a", A)], [(empty, empty.split("test"))])


def test_long_prompt_is_truncated_and_scored(loaded):
    contract = PromptContract(template="{text}", labels={"a": "good", "b": "bad"})
    long = Example({"text": "a very long story " * 200}, "a")
    task = Task("long", contract, "accuracy", lambda: Splits({"test": (long, long)}))
    (actual,) = evaluate(loaded, [("a", A)], [(task, task.split("test"))])
    assert actual.value in (0.0, 1.0)
    assert actual.n == 2
