"""The training loop: joint equals alone; interruptions and failures keep the best weights."""

import math
from itertools import pairwise

import pytest
import torch
from pico import close, job, toy_answers, toy_talk, toy_task

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import encode_examples
from adapterhub_chat.data.splits import sample
from adapterhub_chat.errors import DataError, UsageError
from adapterhub_chat.inference.likelihood import sequence_losses
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import schedule, total_steps
from adapterhub_chat.training.loop import train
from adapterhub_chat.training.strategies import train_sequence
from adapterhub_chat.types import as_mix


def three_jobs(model):
    return [
        job(model, toy_task(), rank=4, learning_rate=3e-3, seed=1),
        job(
            model,
            toy_answers(),
            rank=8,
            alpha=8,
            targets="q_proj,v_proj,down_proj",
            rows_per_step=2,
        ),
        job(model, toy_talk(), rank=2, max_steps=7, clip=0.1, weight_decay=0.1, rslora=True),
    ]


def test_joint_training_equals_training_each_adapter_alone(model):
    jobs = three_jobs(model)
    together = train(model, jobs)
    for each in jobs:
        alone = train(model, [each])[each.name]
        close(together[each.name].weights, alone.weights)
        assert together[each.name].best_step == alone.best_step
        assert together[each.name].steps == alone.steps
        assert together[each.name].best_loss == pytest.approx(alone.best_loss, abs=1e-4)
    moved = together["toy"].weights.factors["model.layers.0.self_attn.q_proj"][1]
    assert moved.abs().max() > 1e-3


def test_the_backbone_is_not_changed(model):
    before = {n: t.clone() for n, t in model.backbone.model.state_dict().items()}
    train(model, three_jobs(model))
    after = model.backbone.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert all(p.grad is None for p in model.backbone.model.parameters())


def test_training_lowers_the_loss_of_unseen_answers(model):
    task = toy_answers()
    done = train(model, [job(model, task, max_steps=80, learning_rate=1e-2)])["answers"]
    model.load("answers", done.weights)
    held_out = encode_examples(
        model.backbone.tokenizer, task.contract, task.split("test"), max_length=64
    )
    before, after = (sequence_losses(model, held_out, as_mix(a)) for a in (None, "answers"))
    assert after.mean() < 0.5 * before.mean()


def test_the_same_seed_gives_identical_weights(model):
    one, two = (train(model, [job(model, toy_task())])["toy"] for _ in range(2))
    close(one.weights, two.weights, tolerance=0)
    other = train(model, [job(model, toy_task(), seed=5)])["toy"]
    with pytest.raises(AssertionError):
        close(one.weights, other.weights)


def test_the_best_weights_on_validation_are_returned(model):
    """A learning rate that ruins the adapter after a good start."""
    events = []
    settings = {"max_steps": 40, "learning_rate": 0.5, "eval_every": 2, "schedule": "constant"}
    done = train(
        model, [job(model, toy_answers(), **settings)], on_event=lambda e: events.append(e)
    )["answers"]
    losses = {e.step: e.values["loss"] for e in events if e.kind == "validation"}
    assert done.best_step == min(losses, key=losses.get)
    assert done.best_step < done.steps
    assert done.best_loss == min(losses.values())


def test_an_early_stop_does_not_affect_other_adapters(model):
    spoilt = job(
        model, toy_answers(), learning_rate=0.5, eval_every=1, patience=2, schedule="constant"
    )
    healthy = job(model, toy_task())
    both = train(model, [spoilt, healthy])
    assert both["answers"].stopped == "early"
    assert both["answers"].steps < both["toy"].steps
    assert both["toy"].stopped == "finished"
    close(both["toy"].weights, train(model, [healthy])["toy"].weights)


def test_ctrl_c_returns_the_best_weights(model):
    def stop_at(step):
        def on_event(event):
            if event.kind == "step" and event.step == step:
                raise KeyboardInterrupt

        return on_event

    validated = train(model, [job(model, toy_task(), eval_every=2)], on_event=stop_at(7))["toy"]
    assert validated.stopped == "interrupted"
    assert validated.best_step == 6
    early = train(model, [job(model, toy_task(), eval_every=10)], on_event=stop_at(3))["toy"]
    assert early.stopped == "interrupted"
    assert early.best_step == 3
    assert any(b.abs().max() > 0 for _, b in early.weights.factors.values())


def test_a_diverging_adapter_does_not_affect_the_others(model):
    wild = job(model, toy_answers(), learning_rate=1e30, clip=1e30, warmup=0.0)
    healthy = job(model, toy_task())
    both = train(model, [wild, healthy])
    assert both["answers"].stopped == "diverged"
    assert both["toy"].stopped == "finished"
    close(both["toy"].weights, train(model, [healthy])["toy"].weights)


def test_without_validation_the_last_weights_are_returned(model):
    done = train(model, [job(model, toy_task(), eval_examples=0)])["toy"]
    assert done.best_step == done.steps == 12
    assert math.isnan(done.best_loss)


def test_max_minutes_ends_the_run(model):
    done = train(model, [job(model, toy_task(), max_steps=0, epochs=1e6, max_minutes=0.02)])["toy"]
    assert done.stopped == "finished"
    assert done.seconds < 10


def test_no_step_begins_that_would_exceed_max_minutes(model):
    endless = {"max_steps": 0, "epochs": 1e6, "eval_examples": 0}
    done = train(model, [job(model, toy_task(), max_minutes=1.5 / 60, **endless)])["toy"]
    assert done.steps > 1
    assert done.seconds < 1.5 + 0.5  # a busy machine is no failure
    done = train(model, [job(model, toy_task(), max_minutes=1e-6, **endless)])["toy"]
    assert done.steps == 1
    done = train(model, [job(model, toy_task(), max_steps=3, max_minutes=60)])["toy"]
    assert done.steps == 3


def test_a_sequence_trains_each_adapter_as_if_alone(model):
    jobs = three_jobs(model)[:2]
    for name, done in train_sequence(model, jobs):
        alone = train(model, [j for j in jobs if j.name == name])[name]
        close(done.weights, alone.weights, tolerance=0)


def test_invalid_jobs_are_refused(model):
    ready = job(model, toy_task())
    with pytest.raises(UsageError, match="nothing to train"):
        train(model, [])
    with pytest.raises(UsageError, match="same name"):
        train(model, [ready, ready])
    with pytest.raises(UsageError, match="row_length"):
        train(model, [ready, job(model, toy_answers(), row_length=96)])
    with pytest.raises(DataError, match="no training examples"):
        train(model, [Job("empty", (), (), ready.config)])
    with pytest.raises(UsageError, match=r"no linear layer named nose.*k_proj"):
        select_targets(model.shapes, "q_proj,nose")


def test_the_schedule_warms_up_and_falls_to_zero():
    config = TrainConfig(warmup=0.1)
    rates = [schedule(step / 100, 1 / 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert all(a >= b - 1e-9 for a, b in pairwise(rates[9:]))
    assert rates[-1] < 0.001
    flat = TrainConfig(warmup=0.0, schedule="constant")
    assert {schedule(step / 9, 1 / 9, flat) for step in range(9)} == {1.0}


def test_steps_are_limited_by_epochs_or_by_number(model):
    long, short = job(model, toy_task(), max_steps=0, epochs=1), job(model, toy_task(), max_steps=5)
    assert total_steps([long], long.config) >= 2
    assert total_steps([short], short.config) == 5


def test_a_sample_keeps_the_order_and_depends_on_the_seed():
    rows = list(range(50))
    assert sample(rows, 0) == rows
    assert sample(rows, 10, seed=1) == sorted(sample(rows, 10, seed=1))
    assert sample(rows, 10, seed=1) == sample(rows, 10, seed=1) != sample(rows, 10, seed=2)
