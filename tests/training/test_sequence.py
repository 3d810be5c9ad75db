"""Sequences: new adapters leave earlier ones unchanged, grown adapters keep their blocks; the ledger."""

import json

import pytest
import torch
from pico import close, job, overlap, toy_answers, toy_talk, toy_task

from adapterhub_chat.events import Ledger, Listeners
from adapterhub_chat.report.plots import draw_ledger
from adapterhub_chat.training.loop import train
from adapterhub_chat.training.strategies import CheckpointHooks, train_sequence

LEARN = {"rank": 3, "max_steps": 20, "learning_rate": 1e-2, "eval_examples": 0}


def stages(model, *jobs, **options):
    return dict(train_sequence(model, jobs, **options))


def block(weights, first, last):
    """The ranks first:last of an adapter, with the scale that it was concatenated with."""
    parts = {m: (a[first:last], b[:, first:last]) for m, (a, b) in weights.factors.items()}
    return type(weights)(parts, {m: float(last - first) for m in parts})


def test_a_grown_adapter_keeps_its_earlier_blocks_bit_for_bit(model):
    jobs = [job(model, task, **LEARN) for task in (toy_task(), toy_answers(), toy_talk())]
    done = stages(model, *jobs, grow=True)
    assert [d.weights.max_rank for d in done.values()] == [3, 6, 9]
    close(block(done["talk"].weights, 0, 6), done["answers"].weights, tolerance=0)
    close(block(done["answers"].weights, 0, 3), done["toy"].weights, tolerance=0)
    alone = train(model, [jobs[0]])["toy"].weights
    scaled = {m: (a, b * alone.scale(m)) for m, (a, b) in alone.factors.items()}
    close(done["toy"].weights, alone.with_factors(scaled), tolerance=0)


def test_a_new_block_is_trained_on_top_of_the_frozen_blocks(model):
    """The second stage's first loss is that of the grown adapter, not of the bare backbone."""
    jobs = [job(model, task, **LEARN) for task in (toy_answers("a"), toy_answers("b"))]
    events = []
    stages(model, *jobs, grow=True, on_event=events.append)
    last = [e for e in events if e.adapter == "a" and e.kind == "step"][-1]
    first = next(e for e in events if e.adapter == "b" and e.kind == "step")
    start = next(e for e in events if e.adapter == "a" and e.kind == "step")
    assert first.values["loss"] < 0.8 * start.values["loss"]
    assert last.values["loss"] < start.values["loss"]


def test_replay_adds_examples_of_earlier_tasks(model):
    jobs = [job(model, task, **LEARN) for task in (toy_task(), toy_answers())]
    stages_seen = []

    def hooks_of(name):
        stages_seen.append(name)
        return CheckpointHooks()

    done = stages(model, *jobs, grow=True, replay=0.5, hooks_of=hooks_of)
    plain = stages(model, *jobs, grow=True)
    assert stages_seen == ["toy", "answers"]
    close(done["toy"].weights, plain["toy"].weights, tolerance=0)
    with pytest.raises(AssertionError):
        close(done["answers"].weights, plain["answers"].weights, tolerance=1e-6)


def test_the_orthogonality_penalty_reduces_the_overlap(model):
    def overlap_of(weight):
        settings = {**LEARN, "orthogonal": weight, "clip": 1e6, "max_steps": 40}
        jobs = [job(model, task, **settings) for task in (toy_task(), toy_answers())]
        done = stages(model, *jobs, grow=True)
        old, new = block(done["answers"].weights, 0, 3), block(done["answers"].weights, 3, 6)
        return float(overlap(new, old))

    assert overlap_of(10.0) < 0.3 * overlap_of(0.0)


def ledger(matrix, higher=(True, True), start=(0.5, 0.2)):
    return Ledger(("a", "b"), ("accuracy", "token_f1"), higher, start, matrix)


def test_backward_and_forward_transfer_of_a_ledger():
    higher = ledger(((0.9, 0.3), (0.7, 0.8)))
    assert higher.backward_transfer == pytest.approx(-0.2)
    assert higher.forward_transfer == pytest.approx(0.1)
    lower = ledger(((10.0, 30.0), (12.0, 8.0)), (False, False), (20.0, 40.0))
    assert lower.backward_transfer == pytest.approx(-2.0)
    assert lower.forward_transfer == pytest.approx(10.0)
    assert higher.as_json()["backward_transfer"] == higher.backward_transfer
    gaps = ledger(((None, None), (None, 0.8)))
    assert (gaps.backward_transfer, gaps.forward_transfer) == (None, None)


def test_a_sequence_of_new_adapters_has_zero_backward_transfer(hub):
    ledgers = []
    hub.train(
        [toy_task(), toy_answers(), toy_talk()],
        how="sequence",
        test_examples=6,
        max_steps=6,
        rows_per_step=1,
        row_length=64,
        listeners=Listeners(on_ledger=ledgers.append),
    )
    last = ledgers[-1]
    assert len(ledgers) == len(last.matrix) == 3
    assert last.backward_transfer == 0.0
    for j in range(3):
        column = [row[j] for row in last.matrix]
        assert column[:j] == [None] * j
        assert len(set(column[j:])) == 1


def test_a_growing_adapter_is_measured_on_every_task(hub, tmp_path):
    manifests = hub.train(
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
    assert list(manifests) == ["grown"]
    assert manifests["grown"].training.tasks == ("toy", "answers")
    assert {s.task for s in manifests["grown"].scores} == {"toy", "answers"}
    saved = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert all(value is not None for row in saved["matrix"] for value in row)
    assert (tmp_path / "run" / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert hub.verify("grown").ok
    assert torch.isfinite(hub.next_token_logits(["x"], ["grown"])).all()


def test_a_ledger_with_gaps_is_drawn(tmp_path):
    drawn = draw_ledger(ledger(((0.9, None), (0.9, 0.9))), tmp_path / "a.png")
    assert drawn
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
