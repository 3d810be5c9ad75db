"""kill -9 in the middle of a pull or a push: the old state or the new one, and the next run cleans up."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import huggingface_hub
import pytest
from pico import in_child, keep_adapter

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.manifest import MANIFEST
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.files import file_sha256
from adapterhub_chat.pool.lockfile import LOCKFILE, PLANNED_LOCKFILE, read_lock
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.remote.client import HubClient

REPO = "alice/toy"
MOMENTS = 25
ACTIONS = {
    "pull": lambda hub, access: hub.pull(REPO, **access),
    "pull v2": lambda hub, access: hub.pull(REPO, "v2", **access),
    "push": lambda hub, access: hub.push("toy", REPO, **access),
}


def state(root):
    """Return the hashes of all that a pool holds; opening and writing it sweeps up."""
    Pool(root).check_writable()
    files = (p for p in Path(root).rglob("*") if p.is_file())
    kept = {str(p.relative_to(root)): file_sha256(p) for p in files}
    return {name: digest for name, digest in kept.items() if name not in (".lock", ".probes")}


def killed_at_random_moments(action, folder, root, access, moments):
    """Run an action to its end once, then kill it at so many moments of its time; return every state.

    This process computes nothing itself, so that it may fork.
    """
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    shutil.copytree(root, template := f"{root} before")
    seconds, found = 0.0, []
    for turn in range(moments + 1):
        ready, tell = os.pipe()
        if (child := os.fork()) == 0:
            hub = AdapterHub(folder, root, dtype="fp32", device="cpu")
            os.write(tell, b"x")
            ACTIONS[action](hub, access)
            os._exit(0)
        os.close(tell)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        started = time.monotonic()
        if turn:
            time.sleep(random.Random(turn).uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not turn:
            assert status == 0
            seconds = 1.1 * (time.monotonic() - started)
        hub = HubClient(**access)
        commit = hub.snapshot(REPO)
        files = {name: (f.size, f.sha256, f.blob) for name, f in commit.files.items()}
        found.append((state(root), files, hub.tags(REPO)))
        shutil.rmtree(root)
        shutil.copytree(template, root)
    return found


@pytest.fixture
def published(hub, make_weights, hub_server, monkeypatch, tmp_path):
    """A hub with two versions of an adapter on the server; the pool has the second."""
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    for seed in (1, 2):
        keep_adapter(hub, make_weights(seed=seed)).push("toy", REPO, **access)
    return hub, access


@pytest.mark.slow
@pytest.mark.parametrize("over", [False, True], ids=["new", "over an older one"])
def test_kill_9_in_a_pull_leaves_the_old_pool_or_the_new_one(
    published, pico_folder, tmp_path, over
):
    _, access = published
    root = tmp_path / "victim"
    root.mkdir()
    if over:
        victim = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
        victim.pull(REPO, "v1", **access)
    before = state(root)
    action = "pull v2" if over else "pull"
    found = in_child(killed_at_random_moments, action, str(pico_folder), str(root), access, MOMENTS)
    after = found[0][0]
    assert {f"toy/{name}" for name in (CONFIG, WEIGHTS, MANIFEST)} | {LOCKFILE} <= set(after)
    states = [one for one, _, _ in found]
    assert all(one in (before, after) for one in states)
    assert before in states
    fresh = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
    assert fresh.pull(REPO, "v2", **access).changed  # and the next one goes through
    assert read_lock(root).adapters["toy"].revision == "v2"
    assert not (root / PLANNED_LOCKFILE).exists()


@pytest.mark.slow
def test_kill_9_in_a_push_leaves_the_old_repository_or_the_new_one(
    published, pico_folder, make_weights
):
    hub, access = published
    before = HubClient(**access).snapshot(REPO)
    keep_adapter(hub, make_weights(seed=3))
    root = hub.pool.root
    found = in_child(killed_at_random_moments, "push", str(pico_folder), str(root), access, MOMENTS)
    old = {name: (f.size, f.sha256, f.blob) for name, f in before.files.items()}
    new = found[0][1]
    assert all(files in (old, new) for _, files, _ in found)
    assert all({"v1", "v2"} <= set(tags) for *_, tags in found)
    assert {one["toy/adapter_model.safetensors"] for one, *_ in found} == {
        file_sha256(root / "toy" / WEIGHTS)
    }
    fresh = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
    done = fresh.push("toy", REPO, **access)
    assert HubClient(**access).tags(REPO)[done.version] == done.commit
