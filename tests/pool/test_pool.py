"""The pool: a save is all or nothing, whatever happens: full disk, no rights, kill -9, two at once."""

import ctypes
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import example, given
from hypothesis import strategies as st
from pico import CHILDREN, in_child

from adapterhub_chat.artifact.folder import config_of
from adapterhub_chat.artifact.manifest import MANIFEST, Manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, PoolError, UnknownNameError, UsageError
from adapterhub_chat.files import file_sha256
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.pool import EARLIER, PROBES, Pool
from adapterhub_chat.pool.stored import read_stored
from adapterhub_chat.types import Fingerprint, PromptContract, Score

UNIT = 2.0**-16
"""So small that the numbers of every version could be those of a trained adapter."""


def version(number, width=64):
    """What to save: every file of version n says n."""
    unit = number * UNIT
    weights = AdapterWeights(
        {"layer": (torch.full((8, width), unit), torch.full((width, 8), -unit))},
        {"layer": float(number)},
    )
    manifest = Manifest(
        name="",
        about=f"version {number}",
        backbone="pico",
        fingerprint=Fingerprint("Llama", "c", "t", "m", "w"),
        contract=PromptContract(),
    )
    return weights, config_of(weights, "pico", {"layer": (width, width)}), manifest


def save(pool, name, number, width=64):
    return pool.save(name, *version(float(number), width))


def complete_version(stored):
    """Which version this is; fails when its files are not all of that one."""
    a, b = stored.weights.factors["layer"]
    (unit,) = a.unique().tolist()
    assert b.unique().tolist() == [-unit]
    number = unit / UNIT
    assert stored.config["lora_alpha"] == number
    assert stored.manifest.about == f"version {number}"
    assert f"version {number}\n" in (stored.path / "README.md").read_text()
    return number


def leftovers(pool):
    return [p.name for p in pool.root.iterdir() if p.name.startswith((".tmp-", ".old-"))]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def pool(tmp_path):
    return Pool(tmp_path / "pool")


# ---- save, load, list, describe, delete ----------------------------------------------------------


def test_load_returns_what_was_saved(pool):
    saved = save(pool, "a", 3)
    loaded = Pool(pool.root).load("a")
    assert complete_version(loaded) == 3
    assert loaded.manifest == saved.manifest == pool.manifest("a")
    assert loaded.manifest.name == "a"
    assert loaded.manifest.sha256 == file_sha256(pool.root / "a" / WEIGHTS)
    assert set(contents(pool.root / "a")) == {WEIGHTS, CONFIG, MANIFEST, "README.md"}
    assert leftovers(pool) == []


def test_the_same_adapter_is_saved_as_the_same_bytes(pool):
    save(pool, "a", 3)
    before = contents(pool.root / "a")
    save(pool, "a", 3)
    assert contents(pool.root / "a") == before


def test_saving_over_a_name_leaves_only_the_new_version(pool):
    save(pool, "a", 1)
    save(pool, "b", 7)
    save(pool, "a", 2)
    assert pool.names() == ["a", "b"]
    assert complete_version(pool.load("a")) == 2
    assert complete_version(pool.load("b")) == 7
    assert leftovers(pool) == []


def test_only_the_previous_version_is_kept(pool):
    for number in (1, 2, 3):
        save(pool, "a", number)
    assert complete_version(pool.load_earlier("a")) == 2
    assert complete_version(pool.load("a")) == 3
    assert not (pool.root / "a" / EARLIER / EARLIER).exists()
    assert pool.names() == ["a"]


def test_rolling_back_exchanges_the_two_versions(pool):
    save(pool, "a", 1)
    save(pool, "a", 2)
    (pool.root / "a" / EARLIER / "LICENSE").write_text("free")
    both = contents(pool.root / "a")
    assert complete_version(pool.rollback("a")) == 1
    assert complete_version(pool.load("a")) == 1
    assert complete_version(pool.load_earlier("a")) == 2
    assert (pool.root / "a" / "LICENSE").read_text() == "free"
    assert leftovers(pool) == []
    assert complete_version(Pool(pool.root).rollback("a")) == 2
    assert contents(pool.root / "a") == both
    save(pool, "a", 3)
    assert complete_version(pool.rollback("a")) == 2


def test_rollback_without_a_previous_version_is_an_error(pool):
    save(pool, "a", 1)
    before = contents(pool.root)
    with pytest.raises(UsageError, match=r"'a' has no earlier version in the pool .*: one is kept"):
        pool.rollback("a")
    with pytest.raises(UnknownNameError, match="known: a"):
        pool.rollback("b")
    assert contents(pool.root) == before
    assert leftovers(pool) == []


@pytest.mark.parametrize(
    ("number", "width", "reason"),
    [(1e30, 64, "at most 65504"), (math.nan, 64, "not finite"), (1.0, 0, "cannot have the shape")],
)
def test_an_adapter_that_cannot_be_loaded_again_is_not_saved(number, width, reason, pool):
    save(pool, "a", 1)
    before = contents(pool.root)
    with pytest.raises(AdapterError, match=f"(?s)adapter 'a' is not saved: .*{reason}"):
        save(pool, "a", number, width)
    assert contents(pool.root) == before
    assert leftovers(pool) == []


def test_the_same_content_again_is_no_new_version(pool):
    save(pool, "a", 1)
    save(pool, "a", 2)
    weights, config, manifest = version(2.0)
    saved = pool.save("a", weights, config, manifest.model_copy(update={"about": "version 2.0"}))
    pool.describe("a", saved.manifest.with_scores([score()]))
    assert complete_version(pool.load_earlier("a")) == 1
    pool.save("a", weights, {**config, "lora_alpha": 9}, manifest)  # computes something else
    assert complete_version(pool.load_earlier("a")) == 2


def test_a_damaged_previous_version_is_not_restored(pool):
    save(pool, "a", 1)
    save(pool, "a", 2)
    path = pool.root / "a" / EARLIER / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(AdapterError, match="is not the file that adapterhub"):
        pool.rollback("a")
    assert complete_version(pool.load("a")) == 2


def test_a_damaged_version_is_kept_as_it_is_under_a_new_one(pool):
    save(pool, "a", 1)
    (pool.root / "a" / WEIGHTS).unlink()
    save(pool, "a", 2)
    assert complete_version(pool.load("a")) == 2
    assert set(contents(pool.root / "a" / EARLIER)) == {CONFIG, MANIFEST, "README.md"}


def test_delete_removes_the_earlier_version_too(pool):
    save(pool, "a", 1)
    save(pool, "a", 2)
    pool.delete("a")
    save(pool, "a", 3)
    with pytest.raises(UsageError, match="no earlier version"):
        pool.rollback("a")


def test_versions_work_where_files_cannot_be_linked_or_exchanged(pool, monkeypatch):
    def no_links(*_names, **_options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save(pool, "a", 1)
    save_over_without_exchange(pool)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_names, **_options: object())
    assert complete_version(pool.rollback("a")) == 1
    assert complete_version(pool.rollback("a")) == 2
    assert leftovers(pool) == []


# ---- probes that were answered -------------------------------------------------------------------

KEYS = [f"{n:064x}" for n in range(3)]


def test_recorded_probes_are_read_by_another_pool_object(pool):
    save(pool, "a", 1)
    for key in (*KEYS, KEYS[0]):
        pool.record_answered_probe(key)
    assert Pool(pool.root).answered_probes() == KEYS
    assert pool.names() == ["a"]
    assert leftovers(pool) == []


def test_missing_or_damaged_probe_records_are_ignored(pool):
    pool.record_answered_probe(KEYS[0])
    assert not pool.root.exists()  # nothing is made for a note
    save(pool, "a", 1)
    assert pool.answered_probes() == []
    (pool.root / PROBES).write_bytes(b"\xff\x00" + KEYS[0].encode() + b"\n" + KEYS[1].encode()[:9])
    assert pool.answered_probes() == []
    pool.record_answered_probe(KEYS[2])
    assert pool.answered_probes() == [KEYS[2]]
    (pool.root / PROBES).unlink()
    (pool.root / PROBES).mkdir()
    pool.record_answered_probe(KEYS[2])
    assert pool.answered_probes() == []
    assert complete_version(Pool(pool.root).load("a")) == 1


def test_the_oldest_probe_records_are_dropped_first(pool, monkeypatch):
    monkeypatch.setattr("adapterhub_chat.pool.pool.MAX_PROBES", 2)
    save(pool, "a", 1)
    for key in KEYS:
        pool.record_answered_probe(key)
    assert pool.answered_probes() == KEYS[1:]


def test_others_may_read_what_was_saved(pool):
    save(pool, "a", 1)
    assert (pool.root / "a").stat().st_mode & 0o055 == 0o055


def test_opening_a_pool_creates_nothing(tmp_path):
    pool = Pool(tmp_path / "not" / "there")
    assert pool.names() == []
    assert "a" not in pool
    assert not (tmp_path / "not").exists()


def test_other_files_and_folders_are_not_listed(pool):
    save(pool, "a", 1)
    (pool.root / "notes.txt").write_text("")
    (pool.root / "empty").mkdir()
    shutil.copytree(pool.root / "a", pool.root / ".hidden")
    shutil.copytree(pool.root / "a", pool.root / "two words")
    assert pool.names() == ["a"]
    assert "two words" not in pool
    assert "../pool/a" not in pool
    assert 3 not in pool


def test_an_unknown_adapter_is_an_error_that_lists_the_known(pool):
    save(pool, "a", 1)
    for ask in (pool.path, pool.load, pool.manifest, pool.delete):
        with pytest.raises(UnknownNameError, match=r"unknown adapter 'b'; known: a\."):
            ask("b")


BAD_NAMES = ["", ".", "..", "a/b", "../a", "/a", "-a", ".tmp-a", "a b", "a\n", "ä", "a\0", "a" * 97]


@pytest.mark.parametrize("name", [*BAD_NAMES, "backbone", "auto"])
def test_bad_and_reserved_names_are_refused_before_anything_is_written(name, pool):
    with pytest.raises(UsageError, match=r"allowed are|reserved"):
        save(pool, name, 1)
    assert not pool.root.exists()


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", fullmatch=True) | st.text(max_size=100))
@example("a" * 96)
def test_an_allowed_name_is_one_folder_in_the_pool(name):
    try:
        check_name(name)
    except UsageError:
        return
    path = Path("pool") / name
    assert path.name == name
    assert path.parent == Path("pool")
    assert not name.startswith((".", "-"))


def score(value=0.5, task="t"):
    return Score("a", task, "accuracy", value, 0.1, 0.9, 20, 0.25)


def test_describing_keeps_the_weights_and_all_other_files(pool):
    saved = save(pool, "a", 1)
    (pool.root / "a" / "LICENSE").write_text("free")
    (pool.root / "a" / "plots").mkdir()
    (pool.root / "a" / "plots" / "loss.svg").write_text("<svg/>")
    before = contents(pool.root / "a")
    pool.describe("a", saved.manifest.with_scores([score()]))
    after = contents(pool.root / "a")
    changed = {file for file in before if before[file] != after.get(file)}
    assert changed == {MANIFEST, "README.md"}
    assert set(after) == set(before)
    assert pool.load("a").manifest.scores == (score(),)
    assert "| t | accuracy | 0.500 |" in after["README.md"].decode()
    assert leftovers(pool) == []


def test_describing_works_where_files_cannot_be_linked(pool, monkeypatch):
    saved = save(pool, "a", 1)

    def no_links(*_names, **_options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    pool.describe("a", saved.manifest.with_scores([score()]))
    assert pool.load("a").manifest.scores == (score(),)


def test_describing_another_version_than_the_pools_is_refused(pool):
    old = save(pool, "a", 1)
    save(pool, "a", 2)
    before = contents(pool.root)
    with pytest.raises(AdapterError, match="load it again"):
        pool.describe("a", old.manifest.with_scores([score()]))
    assert contents(pool.root) == before
    assert complete_version(pool.load("a")) == 2


def test_delete_removes_the_folder_with_all_that_is_in_it(pool):
    save(pool, "a", 1)
    save(pool, "b", 2)
    (pool.root / "a" / "checkpoint-1").mkdir()
    pool.delete("a")
    assert pool.names() == ["b"]
    assert not (pool.root / "a").exists()
    assert leftovers(pool) == []


def test_a_folder_of_plain_peft_is_a_member_without_a_manifest(pool):
    save(pool, "a", 1)
    (pool.root / "a" / MANIFEST).unlink()
    assert pool.load("a").manifest is None
    assert pool.manifest("a") is None


def test_weights_with_another_hash_than_the_manifests_are_refused(pool):
    save(pool, "a", 1)
    path = pool.root / "a" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="is not the file that adapterhub"):
        pool.load("a")


# ---- failing saves -------------------------------------------------------------------------------


def assert_as_before(pool, before):
    assert leftovers(pool) == []
    assert contents(pool.root) == before
    assert complete_version(Pool(pool.root).load("a")) == 1


def mount(folder, *options):
    """Mount a file system of its own in memory, where this user may."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=128k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_version(small_disk):
    pool = Pool(small_disk / "pool")
    save(pool, "a", 1)
    before = contents(pool.root)
    with pytest.raises(PoolError, match=r"saving 'a' failed.*as it was: the disk is full.*Free"):
        save(pool, "a", 2, width=4096)
    with pytest.raises(PoolError, match="the disk is full"):
        save(pool, "new", 2, width=4096)
    assert_as_before(pool, before)
    save(pool, "a", 3)
    assert complete_version(pool.load("a")) == 3


def test_an_adapter_can_be_deleted_when_the_disk_is_full(small_disk):
    pool = Pool(small_disk / "pool")
    save(pool, "a", 1)
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(200_000))
    pool.delete("a")
    assert pool.names() == leftovers(pool) == []


def save_with_file_limit(root, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(Pool(root), "a", 2, width=1024)


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_a_write_that_breaks_off_keeps_the_old_version(limit, pool):
    save(pool, "a", 1)
    before = contents(pool.root)
    with pytest.raises(PoolError, match=r"saving 'a' failed, and the pool .* is as it was"):
        in_child(save_with_file_limit, pool.root, limit)
    assert_as_before(pool, before)


def act_without_rights(root, action):
    """Do something to the pool as a user who may not write there."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65534)
    pool = Pool(root)
    assert complete_version(pool.load("a")) == 1  # reading works
    ACTIONS[action](pool)


def save_over_without_exchange(pool):
    """As on a system that cannot exchange two folders in one call."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ctypes, "CDLL", lambda *_names, **_options: object())
        save(pool, "a", 2)


ACTIONS = {
    "saving over": functools.partial(save, name="a", number=2),
    "saving over, without exchange": save_over_without_exchange,
    "saving": functools.partial(save, name="new", number=2),
    "describing": lambda pool: pool.describe("a", pool.manifest("a")),
    "deleting": lambda pool: pool.delete("a"),
    "looking": lambda pool: pool.check_writable(),
}
MORE_ACTIONS = {**ACTIONS, "rolling back": lambda pool: pool.rollback("a")}
"""With those that need a version before."""


@pytest.mark.parametrize("action", ACTIONS)
def test_a_pool_without_write_permission_stays_as_it_is(action):
    with tempfile.TemporaryDirectory() as above:  # tmp_path is closed to other users
        pool = Pool(Path(above) / "pool")
        save(pool, "a", 1)
        (pool.root / ".tmp-left").mkdir()
        Path(above).chmod(0o755)
        pool.root.chmod(0o555)
        with pytest.raises(PoolError, match="no permission to write there"):
            in_child(act_without_rights, pool.root, action)
        pool.root.chmod(0o755)
        assert complete_version(Pool(pool.root).load("a")) == 1
        assert pool.names() == ["a"]


def test_a_read_only_disk_stays_as_it_is(small_disk):
    pool = Pool(small_disk / "pool")
    save(pool, "a", 1)
    before = contents(pool.root)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for action in ACTIONS.values():
        with pytest.raises(PoolError, match="no permission"):
            action(pool)
    assert_as_before(pool, before)


def test_a_file_in_the_place_of_the_pool_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PoolError, match="is a file, not a folder"):
        Pool(tmp_path / "file")
    for action in (lambda pool: save(pool, "a", 1), lambda pool: pool.check_writable()):
        with pytest.raises(PoolError):
            action(Pool(tmp_path / "file" / "pool"))
    assert (tmp_path / "file").read_text() == "mine"


def test_check_writable_leaves_no_files(pool):
    save(pool, "a", 1)
    before = contents(pool.root)
    pool.check_writable()
    assert_as_before(pool, before)


# ---- kill -9 -------------------------------------------------------------------------------------


def save_for_ever(root, first):
    pool = Pool(root)
    (root / "started").touch()
    number = first
    while True:
        save(pool, "a", number, width=2048)
        number += 1


def test_kill_9_at_any_moment_leaves_a_complete_version(pool):
    save(pool, "a", 1)
    number = 1
    for _ in range(5):
        writer = CHILDREN.Process(target=save_for_ever, args=(pool.root, number + 1))
        writer.start()
        while not (pool.root / "started").exists():
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        (pool.root / "started").unlink()
        fresh = Pool(pool.root)
        assert fresh.names() == ["a"]
        assert leftovers(fresh) == []
        assert complete_version(fresh.load("a")) >= number
        number = int(complete_version(fresh.load("a")))
    save(pool, "a", number + 1)
    assert complete_version(pool.load("a")) == number + 1


def die_at(step, action, pool):
    """Kill this process at its step-th call of the system; exit 0 when the action ended before."""
    left = step

    def count(event, _arguments):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    MORE_ACTIONS[action](pool)
    os._exit(0)


def die_at_every_step(root, action):
    """Return what the next one finds in the pool after a kill at step 1, 2, ..., and after no kill."""
    found, status = [], 1
    while status:
        shutil.rmtree(root, ignore_errors=True)
        pool = Pool(root)
        save(pool, "a", 1)
        if (child := os.fork()) == 0:
            die_at(len(found) + 1, action, pool)
        _, status = os.waitpid(child, 0)
        fresh = Pool(root)
        versions = {name: complete_version(fresh.load(name)) for name in fresh.names()}
        found.append((versions, leftovers(fresh)))
    return found


@pytest.mark.parametrize(
    ("action", "after"),
    [
        pytest.param("saving over", {"a": 2}, marks=pytest.mark.slow),  # as below, with one before
        ("saving over, without exchange", {"a": 2}),
        ("saving", {"a": 1, "new": 2}),
        ("describing", {"a": 1}),
        ("deleting", {}),
    ],
)
def test_kill_9_at_every_step_leaves_a_complete_version(action, after, pool):
    found = in_child(die_at_every_step, pool.root, action)
    assert len(found) > 5
    assert all(left == [] for _, left in found)
    assert all(versions in ({"a": 1}, after) for versions, _ in found)
    assert found[0][0] == {"a": 1}
    assert found[-1][0] == after


@pytest.mark.parametrize(
    ("action", "after"),
    [
        ("saving over", (2, 1)),
        pytest.param("rolling back", (5, 1), marks=pytest.mark.slow),  # the same exchange
        pytest.param("describing", (1, 5), marks=pytest.mark.slow),  # as above, with one before
    ],
)
def test_kill_9_at_every_step_leaves_both_versions(action, after, pool):
    found = in_child(both_after_every_step, pool.root, action)
    assert len(found) > 10
    assert set(found) == {(1, 5), after}
    assert (found[0], found[-1]) == ((1, 5), after)


def both_after_every_step(root, action):
    found, status = [], 1
    while status:
        shutil.rmtree(root, ignore_errors=True)
        for number in (5, 1):
            save(Pool(root), "a", number)
        if (child := os.fork()) == 0:
            die_at(len(found) + 1, action, Pool(root))
        _, status = os.waitpid(child, 0)
        fresh = Pool(root)
        assert leftovers(fresh) == []
        found.append((complete_version(fresh.load("a")), complete_version(fresh.load_earlier("a"))))
    return found


def test_leftovers_are_removed_unless_the_pool_is_locked(pool):
    save(pool, "a", 1)
    (pool.root / ".tmp-left").mkdir()
    (pool.root / ".tmp-left" / WEIGHTS).write_bytes(b"half")
    with FileLock(pool.root / ".lock"):
        assert leftovers(Pool(pool.root)) == [".tmp-left"]
    assert leftovers(Pool(pool.root)) == []
    assert complete_version(pool.load("a")) == 1


# ---- systems that cannot exchange two folders in one call ----------------------------------------


def test_saving_over_a_name_works_without_the_exchange(pool):
    save(pool, "a", 1)
    save_over_without_exchange(pool)
    assert complete_version(pool.load("a")) == 2
    assert pool.names() == ["a"]
    assert leftovers(pool) == []


def test_a_version_that_was_renamed_before_a_kill_is_restored(pool):
    save(pool, "a", 1)
    os.rename(pool.root / "a", pool.root / ".old-a")  # killed between the two renames
    fresh = Pool(pool.root)
    assert complete_version(fresh.load("a")) == 1
    assert leftovers(fresh) == []
    shutil.copytree(pool.root / "a", pool.root / ".old-a")  # killed just after them
    save_over_without_exchange(pool)
    assert complete_version(Pool(pool.root).load("a")) == 2
    assert leftovers(pool) == []


# ---- several at once -----------------------------------------------------------------------------


def save_many(root, own, numbers):
    pool = Pool(root)
    for number in numbers:
        save(pool, "shared", number)
        save(pool, own, number)


def test_two_processes_save_at_once(pool):
    with ProcessPoolExecutor(2, mp_context=CHILDREN) as executor:
        first = executor.submit(save_many, pool.root, "one", range(1, 13))
        second = executor.submit(save_many, pool.root, "two", range(101, 113))
        first.result()
        second.result()
    assert pool.names() == ["one", "shared", "two"]
    assert complete_version(pool.load("one")) == 12
    assert complete_version(pool.load("two")) == 112
    assert complete_version(pool.load("shared")) in (12, 112)
    assert leftovers(pool) == []


def save_and_describe(root, numbers):
    pool = Pool(root)
    for number in numbers:
        pool.describe("a", save(pool, "a", number).manifest)


def test_a_reader_never_sees_half_a_version(pool):
    save(pool, "a", 1)
    seen = []
    with ProcessPoolExecutor(1, mp_context=CHILDREN) as executor:
        writing = executor.submit(save_and_describe, pool.root, range(2, 41))
        while not writing.done():
            assert pool.names() == ["a"]
            stored = pool.load("a")
            a, _ = stored.weights.factors["layer"]
            number = float(a[0, 0]) / UNIT
            assert stored.config["lora_alpha"] == number
            assert stored.manifest.about == f"version {number}"
            seen.append(number)
        writing.result()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert complete_version(read_stored(pool.root / "a", "a")) == 40


def test_json_in_the_pool_is_strict(pool):
    save(pool, "a", 1)
    for file in (CONFIG, MANIFEST):
        json.loads((pool.root / "a" / file).read_text(), parse_constant=pytest.fail)
