"""Saved states: whole or not at all, the newest whole one counts, and a killed process goes on."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from pico import close, job, toy_task

from adapterhub_chat.errors import PoolError
from adapterhub_chat.training.checkpoint import Checkpoints
from adapterhub_chat.training.loop import RunState, train


def state(n):
    numbers = {"a": {"step": n, "best_loss": float("inf")}}
    return RunState("run", 1.5 * n, numbers, {"a/vector": torch.full((4,), float(n))})


def test_the_newest_state_is_read_and_two_states_are_kept(tmp_path):
    states = Checkpoints(tmp_path / "s")
    assert states.latest() is None
    for n in range(1, 5):
        states.save(state(n))
    latest = Checkpoints(tmp_path / "s").latest()
    assert (latest.identity, latest.elapsed, latest.counters) == ("run", 6.0, state(4).counters)
    assert torch.equal(latest.tensors["a/vector"], torch.full((4,), 4.0))
    assert len(list((tmp_path / "s").iterdir())) == 2
    states.clear()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_state_is_skipped(tmp_path, harm):
    states = Checkpoints(tmp_path)
    states.save(state(1))
    states.save(state(2))
    newest = sorted(tmp_path.iterdir())[-1]
    data = newest.read_bytes()
    newest.write_bytes(
        {
            "cut": data[:-3],
            "flip": data[:-1] + bytes([data[-1] ^ 1]),
            "empty": b"",
            "foreign": b"not a state",
        }[harm]
    )
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        assert states.latest().counters == state(1).counters


def test_a_partially_written_state_is_never_read(tmp_path):
    states = Checkpoints(tmp_path)
    states.save(state(1))
    (tmp_path / ".tmp-123").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert states.latest().counters == state(1).counters


def test_a_full_disk_leaves_older_states_intact(tmp_path, monkeypatch):
    states = Checkpoints(tmp_path)
    states.save(state(1))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PoolError, match="No space left"):
        states.save(state(2))
    assert states.latest().counters == state(1).counters
    assert len(list(tmp_path.iterdir())) == 1


def test_a_state_that_cannot_be_saved_does_not_stop_the_run(model, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    states = Checkpoints(tmp_path, steps=5)
    with pytest.warns(UserWarning, match="the run goes on, but the run's state cannot be saved"):
        done = train(model, [job(model, toy_task())], on_state=states)["toy"]
    assert done.stopped == "finished"


def test_states_are_saved_by_steps_and_by_minutes(tmp_path):
    by_steps = Checkpoints(tmp_path / "a", steps=3)
    for n in range(1, 8):
        by_steps(lambda n=n: state(n))
    assert by_steps.latest().counters["a"]["step"] == 6
    by_clock = Checkpoints(tmp_path / "b", minutes=1e-5)
    time.sleep(0.01)
    by_clock(lambda: state(1))
    assert by_clock.latest().counters["a"]["step"] == 1
    never = Checkpoints(tmp_path / "c")
    never(lambda: pytest.fail("no state was asked for"))


def test_resuming_from_a_file_is_bit_exact(model, tmp_path):
    states = Checkpoints(tmp_path, steps=5)
    whole = train(model, [job(model, toy_task(), eval_every=3)], on_state=states)["toy"]
    resumed = train(model, [job(model, toy_task(), eval_every=3)], resume=states.latest())["toy"]
    close(resumed.weights, whole.weights, tolerance=0)


RUN = """
import sys
from pico import toy_answers, toy_task
from adapterhub_chat import AdapterHub
hub = AdapterHub(sys.argv[1], sys.argv[2], dtype="fp32", device="cpu")
hub.train([toy_task(), toy_answers()], max_steps=60, epochs=999, rows_per_step=1, row_length=64,
          patience=0, test_examples=0, run_dir=sys.argv[3], save_steps=5, resume=sys.argv[4] == "resume")
"""


def test_a_killed_and_resumed_run_ends_with_the_same_weights(pico_folder, tmp_path):
    def start(pool, run, how):
        command = [sys.executable, "-c", RUN, str(pico_folder), str(tmp_path / pool)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen([*command, str(tmp_path / run), how], env=environment)

    assert start("whole", "run-a", "new").wait() == 0
    victim = start("again", "run-b", "new")
    saved = tmp_path / "run-b" / "state" / "run"
    while not list(saved.glob("state-*")) and victim.poll() is None:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "again" / "toy").exists()
    assert start("again", "run-b", "resume").wait() == 0
    for name in ("toy", "answers"):
        one, two = (
            tmp_path / pool / name / "adapter_model.safetensors" for pool in ("whole", "again")
        )
        assert one.read_bytes() == two.read_bytes()
    steps = [json.loads(x) for x in (tmp_path / "run-b" / "metrics.jsonl").read_text().splitlines()]
    assert max(e["step"] for e in steps) == 60
    assert not saved.exists()
