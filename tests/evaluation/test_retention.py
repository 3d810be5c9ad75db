"""Losses and drift of mixes, beside plain transformers."""

from __future__ import annotations

import pytest
import torch
from pico import toy_answers, toy_task

from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.evaluation.retention import drift, excess_loss, validation_items
from adapterhub_chat.types import Mix, as_mix


@pytest.fixture
def loaded(model, make_weights):
    model.load("a", make_weights(rank=4, seed=1))
    model.load("b", make_weights(rank=8, seed=2))
    return model


@torch.no_grad()
def loss_by_hand(model, task, mix):
    """The mean loss per answer token, each example in a forward pass of its own."""
    losses = []
    encoded = encode_examples(
        model.backbone.tokenizer, task.contract, task.split("validation"), max_length=256
    )
    for example in encoded:
        prompt, answer = example.prompt, example.continuations[0]
        with model.mixing([mix]):
            logits = model.backbone.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
        log_probs = logits[len(prompt) - 1 :].double().log_softmax(-1)
        losses.append(-log_probs.gather(1, torch.tensor(answer)[:, None]))
    return float(torch.cat(losses).mean())


def test_validation_losses_equal_a_hand_computation(loaded):
    tasks = {"a": [toy_task(size=40)], "b": [toy_answers(size=40)]}
    items = validation_items(loaded, tasks, 0)
    pairs = [(name, task) for name, (task,) in tasks.items()]
    expected = [loss_by_hand(loaded, task, as_mix(name)) for name, task in pairs]
    assert [item.loss for item in items] == pytest.approx(expected, rel=1e-5)
    bare = [loss_by_hand(loaded, task, Mix()) for _, task in pairs]
    excess = sum(b - e for b, e in zip(bare, expected, strict=True)) / 2
    assert excess_loss(loaded, items, Mix()) == pytest.approx(excess, abs=1e-5)


def test_drift_is_zero_to_itself_and_positive_to_another(loaded):
    prompts = [(5, 9, 40), (7, 8)]
    assert drift(loaded, prompts, as_mix("a"), as_mix("a")) == 0
    assert drift(loaded, prompts, as_mix("a"), as_mix("b")) > 0
