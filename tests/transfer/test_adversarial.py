"""Adversarial transfer: gradient reversal, collapses, and the effect on hidden states."""

from dataclasses import replace

import pytest
import torch
from pico import toy_task

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import Encoded, messages_of
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import UsageError
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.model.features import features
from adapterhub_chat.training.job import HiddenStates, make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.transfer.adversarial import (
    SOURCE,
    TARGET,
    DomainDiscriminator,
    domain_loss,
    entropy_share,
    reversal_weight,
    reverse_gradient,
)
from adapterhub_chat.transfer.candidates import transfer
from adapterhub_chat.transfer.methods import TEXT_SHARE, adversarial_job
from adapterhub_chat.transfer.setting import make_problem
from adapterhub_chat.types import Example, Mix, as_mix

QUICK = TrainConfig(max_steps=12, rows_per_step=1, learning_rate=0.02, eval_examples=12, patience=0)


def test_gradient_reversal_keeps_the_values():
    values = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    out = reverse_gradient(values, 0.25)
    assert torch.equal(out, values)
    (out * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert torch.equal(values.grad, -0.25 * torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_a_reversed_step_raises_the_discriminators_loss():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(20, 8, generator=generator).requires_grad_()
    weights = torch.randn(8, generator=generator)
    domains = torch.tensor([SOURCE, TARGET] * 10)
    before = domain_loss(reverse_gradient(states, 1.0) @ weights, domains)
    before.backward()
    after = domain_loss((states - 0.1 * states.grad) @ weights, domains)
    assert after > before


def test_the_reversal_schedule_matches_dann():
    assert reversal_weight(0) == 0
    assert reversal_weight(0.1) == pytest.approx(0.4621, abs=1e-4)
    assert reversal_weight(1) == pytest.approx(0.9999, abs=1e-4)


def test_both_domains_weigh_equally_in_the_loss():
    logits, domains = torch.tensor([3.0, -1.0, -1.0, -1.0]), torch.tensor([1, 0, 0, 0])
    one_each = domain_loss(logits[:2], domains[:2])
    torch.testing.assert_close(domain_loss(logits, domains), one_each)


def test_entropy_share_of_label_counts():
    assert entropy_share([5, 5], 2) == pytest.approx(1)
    assert entropy_share([10], 2) == 0
    assert entropy_share([], 2) == 1
    assert 0 < entropy_share([99, 1], 2) < 0.1


def hidden_states(distance, labels=(0, 1), count=8, seed=0):
    """States of two domains that lie `apart`, and logits that give the target these labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    domains = [SOURCE, TARGET] * (count // 2)
    states = torch.randn(count, 16, generator=generator)
    states[:, :8] += distance * torch.tensor(domains)[:, None]
    logits = torch.zeros(count, 4)
    for row in range(count):
        logits[row, labels[row // 2 % len(labels)]] = 5.0
    examples = [Encoded((1,), ((2,),), domain=d) for d in domains]
    return HiddenStates(examples, states.requires_grad_(), logits)


def num_steps_played(discriminator, steps, **how):
    """Play until the alarm, or to the end; return the number of steps."""
    for step in range(steps):
        discriminator.loss(hidden_states(seed=step, **how))
        if discriminator.stopped:
            return step + 1
    return steps


def test_a_discriminator_without_errors_is_a_collapse():
    discriminator = DomainDiscriminator(16, 60, labels=(0, 1))
    assert num_steps_played(discriminator, 60, distance=8.0) < 60
    assert "without an error" in discriminator.stopped
    assert discriminator.recent_accuracy == 1


def test_one_label_for_the_whole_target_is_a_collapse():
    discriminator = DomainDiscriminator(16, 60, labels=(0, 1))
    assert num_steps_played(discriminator, 60, distance=0.0, labels=(0,)) < 60
    assert "one label" in discriminator.stopped


def test_a_discriminator_at_chance_is_no_collapse():
    discriminator = DomainDiscriminator(16, 60, labels=(0, 1))
    assert num_steps_played(discriminator, 60, distance=0.0) == 60
    assert not discriminator.stopped
    assert 0.3 < discriminator.recent_accuracy < 0.7


def test_an_early_collapse_does_not_count():
    discriminator = DomainDiscriminator(16, 60, labels=(0, 1))
    assert num_steps_played(discriminator, 6, distance=8.0) == 6
    assert not discriminator.stopped


# ---- in the training loop ------------------------------------------------------------------------


def far_task(name="far", size=60):
    """The toy reviews in other words: a domain that is easily told from the toy's."""
    task = toy_task(name, size)
    parts = {
        split: tuple(
            Example({"text": f"user {e.fields['text']} assistant user"}, e.answer)
            for e in task.split(split)
        )
        for split in ("train", "validation", "test")
    }
    return Task(name, task.contract, task.metric, lambda: Splits(parts))


@pytest.fixture
def source(model):
    job = make_job(model.backbone.tokenizer, "source", toy_task(), QUICK)
    return train(model, [job])["source"].weights


def distance(model, problem, weights):
    """How far the two domains' mean states lie apart, in units of their own deviation."""
    model.load("judged", weights)
    one, other = (
        features(model, problem.target.contract, examples, as_mix("judged"))
        for examples in (problem.source_examples, problem.unlabelled)
    )
    spread = torch.cat([one - one.mean(0), other - other.mean(0)]).square().sum(1).mean().sqrt()
    return float((one.mean(0) - other.mean(0)).norm() / spread)


def test_adversarial_training_brings_domains_closer_and_keeps_the_task(model, source):
    changes = {"max_steps": 60, "epochs": 99, "rows_per_step": 2, "learning_rate": 5e-3}
    config = QUICK.model_copy(update=changes)
    problem = make_problem(source, toy_task(), far_task(), 4, config)
    job, discriminator = adversarial_job(model, problem)
    assert {e.domain for e in job.train} == {SOURCE, TARGET}
    texts = [e for e in job.train if not e.weight]
    assert len(texts) == round(TEXT_SHARE * len(problem.source_examples)) < len(problem.unlabelled)
    assert all(e.domain == TARGET for e in texts)
    job = replace(job, validation=())  # the last numbers, not the best
    alone = train(model, [replace(job, auxiliary=None)])["adversarial"]
    done = train(model, [job])["adversarial"]
    distance_after, distance_without = (
        distance(model, problem, made.weights) for made in (done, alone)
    )
    assert distance_after < 0.9 * distance_without
    assert len(discriminator.accuracy) == done.steps
    task = toy_task()
    model.load("judged", done.weights)
    rows = judge(model, task, task.split("test"), as_mix("judged")).rows
    assert (rows[:, 0] == rows[:, 1]).mean() > 0.7


def test_the_auxiliary_loss_changes_its_own_job_only(model, source):
    """What is beside the task's loss matters; a job beside it in the batch is not touched by it."""
    problem = make_problem(source, toy_task(), far_task(), 4, QUICK)
    job, _ = adversarial_job(model, problem)
    other = make_job(model.backbone.tokenizer, "other", toy_task(), QUICK)
    joint = train(model, [job, other])
    alone = train(model, [other])["other"].weights
    adversarial = train(model, [adversarial_job(model, problem)[0]])["adversarial"].weights
    module = next(iter(alone.factors))
    close = {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(
        joint["other"].weights.factors[module][1], alone.factors[module][1], **close
    )
    plain = train(model, [type(job)(job.name, job.train, (), job.config, start=job.start)])
    changed = plain["adversarial"].weights.factors[module][1] - adversarial.factors[module][1]
    assert changed.abs().max() > 1e-3


def test_a_collapse_ends_the_training_with_its_reason(model, source):
    class Stuck(DomainDiscriminator):
        def _collapse(self):
            return "collapsed: on purpose"

    problem = make_problem(source, toy_task(), far_task(), 4, QUICK)
    job, discriminator = adversarial_job(model, problem)
    discriminator.__class__ = Stuck
    done = train(model, [job])["adversarial"]
    assert done.steps < QUICK.max_steps
    assert done.stopped == "collapsed: on purpose"


def test_adversarial_needs_texts_of_the_target(model, source):
    problem = make_problem(source, toy_task(), far_task(), 4, QUICK, unlabelled=())
    with pytest.raises(UsageError, match="texts of the target without labels"):
        transfer(model, problem, "adversarial")


# ---- features ------------------------------------------------------------------------------------


def test_features_of_a_batch_equal_those_of_each_prompt_alone(model):
    """A packed batch pools each example's own tokens: the same as the backbone on it by itself."""
    task = toy_task()
    examples = task.split("train")[:5]
    found = features(model, task.contract, examples, Mix())
    assert found.shape == (5, 32)
    assert found.dtype == torch.float32
    for example, row in zip(examples, found, strict=True):
        torch.testing.assert_close(
            features(model, task.contract, [example], Mix())[0], row, atol=1e-4, rtol=1e-4
        )
    (ids,) = encode_prompts(model.backbone.tokenizer, [messages_of(task.contract, examples[0])])
    with torch.inference_mode():
        states = model.backbone.model.model(
            torch.tensor([ids]), output_hidden_states=True
        ).hidden_states
    first = features(model, task.contract, examples[:1], Mix(), layer=0)[0]
    torch.testing.assert_close(first, states[1][0].mean(0), atol=1e-4, rtol=1e-4)
    last = features(model, task.contract, examples[:1], Mix(), layer=0, where="last")[0]
    torch.testing.assert_close(last, states[1][0, -1], atol=1e-4, rtol=1e-4)
