"""The run log: one JSON line per event, appended; write failures do not stop the training."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import types
import warnings
from pathlib import Path

import pytest
from pico import toy_task

from adapterhub_chat.errors import PoolError, UsageError
from adapterhub_chat.events import Event, Listeners
from adapterhub_chat.training.run_log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_event_is_written_at_once_as_a_line(tmp_path):
    started = time.time()
    with RunLog(tmp_path / "a" / "b") as log:
        for step in (1, 2):
            log(Event("qa", "step", step, 9, {"loss": 0.5 / step}, note="né"))
            assert len(lines(tmp_path / "a" / "b")) == step
    first = lines(tmp_path / "a" / "b")[0]
    assert started <= first.pop("time") <= time.time()
    assert first == {
        "adapter": "qa",
        "kind": "step",
        "step": 1,
        "total": 9,
        "values": {"loss": 0.5},
        "note": "né",
    }


def test_a_second_run_in_the_same_folder_appends(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path) as log:
            log(Event("qa", "stop", 1, 1, {}))
    assert len(lines(tmp_path)) == 2


def test_a_folder_that_cannot_be_created_is_an_error_at_the_first_step(tmp_path, hub):
    (tmp_path / "file").write_text("")
    events = []
    with pytest.raises(PoolError, match=r"the run log cannot be written to .*file"):
        hub.train(
            [toy_task()],
            max_steps=9,
            run_dir=tmp_path / "file" / "run",
            listeners=Listeners(on_event=events.append),
        )
    assert [event.step for event in events] == [1]
    assert hub.pool.names() == []


def test_a_run_that_never_starts_writes_no_log(tmp_path, hub):
    with RunLog(tmp_path / "unused"):
        pass
    with pytest.raises(UsageError, match="no linear layer named q_prj"):
        hub.train([toy_task()], targets="q_prj", run_dir=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir() if path.name != "pool"] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_does_not_stop_the_training(tmp_path, hub):
    (tmp_path / "run").mkdir()
    os.symlink("/dev/full", tmp_path / "run" / "metrics.jsonl")
    with pytest.warns(UserWarning, match="the run log misses events: .*No space left"):
        manifests = hub.train([toy_task()], max_steps=2, test_examples=0, run_dir=tmp_path / "run")
    assert manifests["toy"].training.stopped == "finished"
    assert hub.verify("toy").ok


def test_all_events_of_a_run_are_logged(tmp_path, hub):
    hub.train(
        [toy_task("a"), toy_task("b")],
        max_steps=3,
        eval_every=1,
        test_examples=0,
        run_dir=tmp_path / "run",
    )
    for name in ("a", "b"):
        events = [e for e in lines(tmp_path / "run") if e["adapter"] == name]
        assert [e["step"] for e in events if e["kind"] == "step"] == [1, 2, 3]
        assert [e["step"] for e in events if e["kind"] == "validation"] == [1, 2, 3]
        assert [(e["kind"], e["note"]) for e in events][-1] == ("stop", "finished")
        assert {"loss", "gradient_norm", "learning_rate"} == set(events[0]["values"])


def test_events_are_also_written_to_tensorboard_if_installed(tmp_path, monkeypatch):
    """A stub stands in for the library, which is imported by name."""
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def close(self):
            calls.append("closed")

    spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: n == "tensorboard" or spec(n, *a)
    )
    board = types.SimpleNamespace(SummaryWriter=Writer)
    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n: board if n.endswith("tensorboard") else real(n)
    )
    with warnings.catch_warnings(), RunLog(tmp_path) as log:
        log(Event("qa", "step", 4, 9, {"loss": 0.5}))
    assert calls == [str(tmp_path), ("qa/step_loss", 0.5, 4), "closed"]
