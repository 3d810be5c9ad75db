"""`bench train` on a pico model: every way does the same work, and the numbers are there."""

import json

import pytest
from pico import toy_answers, toy_task, write_task

from adapterhub_chat.bench import train as train_bench
from adapterhub_chat.bench.harness import Worker
from adapterhub_chat.data.metrics import mean_loss
from adapterhub_chat.model.backbone import load_backbone


@pytest.fixture
def settings(pico_folder, tmp_path):
    for name, task in (("films", toy_task(size=200)), ("facts", toy_answers(size=200))):
        write_task(tmp_path, name, task)
    tasks = [str(tmp_path / f"{name}.toml") for name in ("films", "facts")]
    return {
        "backbone": str(pico_folder),
        "tasks": tasks,
        "adapters": 3,
        "rank": 4,
        "rows_per_step": 1,
        "row_length": 64,
        "steps": 2,
        "total_steps": 8,
    }


def test_every_way_learns_from_the_same_examples(settings):
    done = {}
    for kind, make in train_bench.TRAIN_WORKERS.items():
        work, end = make(load_backbone(settings["backbone"]), settings)
        done[kind] = [work() for _ in range(4)]
        if kind in ("here", "peft"):
            done[kind, "end"] = end()
    for call in range(4):
        tokens = {
            kind: done[kind][call]["tokens"] for kind in train_bench.TRAIN_WORKERS if kind != "one"
        }
        examples = {kind: done[kind][call]["examples"] for kind in ("here", "floor", "peft")}
        assert len(set(tokens.values())) == len(set(examples.values())) == 1
    here, peft = (done[kind, "end"]["validation"] for kind in ("here", "peft"))
    assert here.keys() == peft.keys()
    for name, rows in here.items():
        assert mean_loss(rows) == pytest.approx(mean_loss(peft[name]), rel=0.02)
        assert [tokens for _, tokens in rows] == [tokens for _, tokens in peft[name]]


@pytest.mark.slow
def test_the_table_has_every_ratio(settings, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    del settings["total_steps"]  # follows from the others
    found = train_bench.bench_train(
        **{**settings, "steps": 1}, dtype="fp32", repeats=2, flat=(1, 2)
    )
    assert found["bench"] == "train"
    assert {row["kind"] for row in found["rows"]} == {
        *train_bench.TRAIN_WORKERS,
        "1 adapters",
        "2 adapters",
    }
    assert set(found["ratios"]) == {
        "speedup_over_peft",
        "fraction_of_floor",
        "memory_over_one",
        "cost_2_over_1",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values())
    assert set(found["validation"]) == {"films-0", "facts-1", "films-2"}
    for losses in found["validation"].values():
        assert losses["here"]["low"] < losses["here"]["loss"] < losses["here"]["high"]
        gap = losses["here"]["loss"] - losses["peft"]["loss"]
        assert losses["difference"]["loss"] == pytest.approx(gap, abs=1e-9)
        assert gap == pytest.approx(0, abs=1e-4)  # nothing was rounded
    json.dumps(found)


def test_a_worker_that_fails_is_an_error_not_a_wait(settings):
    with pytest.raises(RuntimeError, match="the nothing process ended with code"):
        Worker("adapterhub_chat.bench.train", "nothing", settings)
