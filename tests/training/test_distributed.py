"""Several processes on one machine (gloo): the same adapters as one, one writer, no hang when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adapterhub_chat.artifact.folder import read_folder

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5
"""fp32: the processes' shares of a gradient are added up in another order."""
PATIENCE = 240

RUN = """
import sys
from pico import toy_answers, toy_task
from adapterhub_chat import AdapterHub
from adapterhub_chat.training.distributed import leave
pico, pool, run, more = sys.argv[1:5]
hub = AdapterHub(pico, pool, dtype="fp32", device="cpu")
found = hub.train(
    [toy_task(), toy_answers()], epochs=999, row_length=64, patience=0, eval_every=5,
    test_examples=4, run_dir=run, **{"rows_per_step": 3, **eval(more)})
leave()
sys.stdout.write(f"saved {sorted(found)}\\n")  # in one piece: the others write at the same time
"""


def start(processes, pico, pool, run, **more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", port]
    script = Path(run).with_suffix(".py")
    script.write_text(RUN)
    command = [sys.executable, *(launch if processes > 1 else []), str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [*command, str(pico), str(pool), str(run), repr({"max_steps": 12, **more})],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process):
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    return text


def same(folder, expected_folder):
    for name in ("toy", "answers"):
        weights, expected = (read_folder(pool / name)[0] for pool in (folder, expected_folder))
        for module, pair in weights.factors.items():
            for a, b in zip(pair, expected.factors[module], strict=True):
                torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_processes_train_the_same_adapters_as_one(pico_folder, tmp_path):
    output(start(1, pico_folder, tmp_path / "one", tmp_path / "run-one"))
    text = output(start(2, pico_folder, tmp_path / "two", tmp_path / "run-two"))
    same(tmp_path / "one", tmp_path / "two")
    assert text.count("saved ['answers', 'toy']") == text.count("saved []") == 1
    lines = (tmp_path / "run-two" / "metrics.jsonl").read_text().splitlines()
    events = [(e["adapter"], e["kind"], e["step"]) for e in map(json.loads, lines)]
    assert len(events) == len(set(events))
    manifest = json.loads((tmp_path / "two" / "toy" / "adapterhub.json").read_text())
    assert manifest["scores"][0]["n"] == 4


def test_a_sharded_backbone_trains_the_same_adapters(pico_folder, tmp_path):
    output(start(1, pico_folder, tmp_path / "one", tmp_path / "run-one"))
    text = output(start(2, pico_folder, tmp_path / "two", tmp_path / "run-two", shard=True))
    assert "saved, not measured" in text
    same(tmp_path / "one", tmp_path / "two")


def test_a_sharded_run_continues_when_a_process_has_no_rows(pico_folder, tmp_path):
    """One row a step and an odd number of validation batches, for two processes."""
    few = {"rows_per_step": 1, "eval_examples": 3, "max_steps": 6}
    output(start(1, pico_folder, tmp_path / "one", tmp_path / "run-one", **few))
    output(start(2, pico_folder, tmp_path / "two", tmp_path / "run-two", shard=True, **few))
    same(tmp_path / "one", tmp_path / "two")


def test_a_killed_process_ends_the_run_and_it_can_be_resumed(pico_folder, tmp_path):
    more = {"max_steps": 400, "save_steps": 5}
    victim = start(2, pico_folder, tmp_path / "pool", tmp_path / "run", **more)
    saved = tmp_path / "run" / "state" / "run"
    deadline = time.monotonic() + PATIENCE
    while not list(saved.glob("state-*")):
        assert victim.poll() is None, victim.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(children(victim.pid)[-1], signal.SIGKILL)
    victim.communicate(timeout=60)
    assert victim.returncode != 0
    assert not (tmp_path / "pool" / "toy").exists()
    again = start(2, pico_folder, tmp_path / "pool", tmp_path / "run", resume=True, **more)
    assert "saved ['answers', 'toy']" in output(again)
    assert not saved.exists()
