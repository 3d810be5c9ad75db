"""Sequences: what is new leaves the old alone, what grows keeps its blocks, and the ledger counts right."""

import json

import pytest
import torch
from pico import close, job, toy_answers, toy_talk, toy_task

from adapterhub_chat.events import Ledger, Listeners
from adapterhub_chat.report.plots import draw_ledger
from adapterhub_chat.training.learner import overlap
from adapterhub_chat.training.loop import train
from adapterhub_chat.training.strategies import CheckpointHooks, train_sequence

LEARN = {"rank": 3, "max_steps": 20, "learning_rate": 1e-2, "eval_examples": 0}


def stages(model, *jobs, **options):
    return dict(train_sequence(model, jobs, **options))


def block(weights, first, last):
    """The ranks first:last of an adapter, with the scale that it was concatenated with."""
    parts = {m: (a[first:last], b[:, first:last]) for m, (a, b) in weights.factors.items()}
    return type(weights)(parts, {m: float(last - first) for m in parts})


def test_a_grown_adapter_keeps_its_earlier_blocks_to_the_bit(model):
    jobs = [job(model, task, **LEARN) for task in (toy_task(), toy_answers(), toy_talk())]
    done = stages(model, *jobs, grow=True)
    assert [d.weights.max_rank for d in done.values()] == [3, 6, 9]
    close(block(done["talk"].weights, 0, 6), done["answers"].weights, tolerance=0)
    close(block(done["answers"].weights, 0, 3), done["toy"].weights, tolerance=0)
    alone = train(model, [jobs[0]])["toy"].weights
    scaled = {m: (a, b * alone.scale(m)) for m, (a, b) in alone.factors.items()}
    close(done["toy"].weights, alone.with_factors(scaled), tolerance=0)


def test_a_new_block_is_trained_on_top_of_the_frozen_ones(model):
    """The second stage's first loss is that of the grown adapter, not of the bare backbone."""
    jobs = [job(model, task, **LEARN) for task in (toy_answers("a"), toy_answers("b"))]
    heard = []
    stages(model, *jobs, grow=True, on_event=heard.append)
    last = [e for e in heard if e.adapter == "a" and e.kind == "step"][-1]
    first = next(e for e in heard if e.adapter == "b" and e.kind == "step")
    start = next(e for e in heard if e.adapter == "a" and e.kind == "step")
    assert first.values["loss"] < 0.8 * start.values["loss"]
    assert last.values["loss"] < start.values["loss"]


def test_replay_takes_its_share_from_earlier_tasks(model):
    jobs = [job(model, task, **LEARN) for task in (toy_task(), toy_answers())]
    seen = []

    def remember(name):
        seen.append(name)
        return CheckpointHooks()

    done = stages(model, *jobs, grow=True, replay=0.5, memory=remember)
    plain = stages(model, *jobs, grow=True)
    assert seen == ["toy", "answers"]
    close(done["toy"].weights, plain["toy"].weights, tolerance=0)
    with pytest.raises(AssertionError):
        close(done["answers"].weights, plain["answers"].weights, tolerance=1e-6)


def test_orthogonal_protection_keeps_the_subspaces_apart(model):
    def apart(weight):
        settings = {**LEARN, "orthogonal": weight, "clip": 1e6, "max_steps": 40}
        jobs = [job(model, task, **settings) for task in (toy_task(), toy_answers())]
        done = stages(model, *jobs, grow=True)
        old, new = block(done["answers"].weights, 0, 3), block(done["answers"].weights, 3, 6)
        return float(overlap(new, old))

    assert apart(10.0) < 0.3 * apart(0.0)


def ledger(matrix, higher=(True, True), start=(0.5, 0.2)):
    return Ledger(("a", "b"), ("accuracy", "token_f1"), higher, start, matrix)


def test_the_ledger_counts_what_was_forgotten_and_what_helped():
    found = ledger(((0.9, 0.3), (0.7, 0.8)))
    assert found.backward_transfer == pytest.approx(-0.2)
    assert found.forward_transfer == pytest.approx(0.1)
    lower = ledger(((10.0, 30.0), (12.0, 8.0)), (False, False), (20.0, 40.0))
    assert lower.backward_transfer == pytest.approx(-2.0)
    assert lower.forward_transfer == pytest.approx(10.0)
    assert found.as_json()["backward_transfer"] == found.backward_transfer
    gaps = ledger(((None, None), (None, 0.8)))
    assert (gaps.backward_transfer, gaps.forward_transfer) == (None, None)


def test_new_adapters_forget_exactly_nothing(hub):
    heard = []
    hub.train(
        [toy_task(), toy_answers(), toy_talk()],
        how="sequence",
        test_examples=6,
        max_steps=6,
        rows_per_step=1,
        row_length=64,
        listeners=Listeners(on_ledger=heard.append),
    )
    last = heard[-1]
    assert len(heard) == len(last.matrix) == 3
    assert last.backward_transfer == 0.0
    for j in range(3):
        column = [row[j] for row in last.matrix]
        assert column[:j] == [None] * j
        assert len(set(column[j:])) == 1


def test_one_growing_adapter_is_looked_at_on_every_task(hub, tmp_path):
    found = hub.train(
        [toy_task(), toy_answers()],
        how="sequence",
        grow=True,
        replay=0.2,
        test_examples=6,
        max_steps=6,
        rows_per_step=1,
        row_length=64,
        run_dir=tmp_path / "run",
    )
    assert list(found) == ["grown"]
    assert found["grown"].training.tasks == ("toy", "answers")
    assert {s.task for s in found["grown"].scores} == {"toy", "answers"}
    kept = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert all(value is not None for row in kept["matrix"] for value in row)
    assert (tmp_path / "run" / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert hub.verify("grown").ok
    assert torch.isfinite(hub.next_token_logits(["x"], ["grown"])).all()


def test_a_ledger_with_gaps_is_drawn(tmp_path):
    drawn = draw_ledger(ledger(((0.9, None), (0.9, 0.9))), tmp_path / "a.png")
    assert drawn
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
