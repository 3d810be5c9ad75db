"""Locks of a pool: held by living processes only, and gone without a trace."""

import os
import signal
import subprocess
import sys

import pytest
from pico import CHILDREN

from adapterhub_chat.pool.pool import Pool

WITHOUT_FCNTL = """
import importlib, pkgutil, sys
import filelock  # it has another lock where the system has no fcntl
sys.modules["fcntl"] = None
import adapterhub_chat
for module in pkgutil.walk_packages(adapterhub_chat.__path__, "adapterhub_chat."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from adapterhub_chat.pool.pool import Pool
pool = Pool(sys.argv[1])
pool.check_writable()
with pool.quarantine() as folder:
    print(Pool(pool.root) is not None and folder.is_dir())
"""


def entries(root):
    return sorted(path.name for path in root.iterdir())


def hold_quarantine(root, ready):
    with Pool(root).quarantine() as folder:
        ready.send(folder.name)
        signal.pause()


def hold_pool_lock(root, ready):
    pool = Pool(root)
    with pool.quarantine() as folder:
        pool.install("a", folder, None, lambda: (ready.send(folder.name), signal.pause()))


@pytest.fixture
def start(tmp_path):
    """start(function) -> (process, name of its quarantine folder), the process inside the lock."""
    processes = []

    def run(function):
        receiver, sender = CHILDREN.Pipe(duplex=False)
        process = CHILDREN.Process(target=function, args=(tmp_path / "pool", sender))
        process.start()
        processes.append(process)
        assert receiver.poll(60)
        return process, receiver.recv()

    yield run
    for process in processes:
        process.kill()
        process.join()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_the_package_works_without_fcntl(tmp_path):
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path / "pool")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert entries(tmp_path / "pool") == [".lock"]


def test_a_quarantine_folder_stays_while_its_process_lives(tmp_path, start):
    process, folder = start(hold_quarantine)
    (tmp_path / "pool" / ".incoming-leftover").mkdir()
    (tmp_path / "pool" / ".tmp-leftover").write_bytes(b"half")
    pool = Pool(tmp_path / "pool")
    assert entries(pool.root) == [folder, ".lock"]
    kill(process)
    pool = Pool(pool.root)
    assert entries(pool.root) == [".lock"]
    pool.check_writable()


def test_another_quarantine_in_the_same_process_stays_too(tmp_path):
    pool = Pool(tmp_path / "pool")
    with pool.quarantine() as folder:
        Pool(pool.root)
        with pool.quarantine() as other:
            assert {folder.name, other.name} < set(entries(pool.root))
        assert folder.is_dir()
    assert entries(pool.root) == [".lock"]


def test_a_killed_process_does_not_leave_the_pool_locked(tmp_path, start):
    process, _ = start(hold_pool_lock)
    leftovers = entries(tmp_path / "pool")
    assert (
        entries(Pool(tmp_path / "pool").root) == leftovers
    )  # the pool is locked: nothing is removed
    kill(process)
    pool = Pool(tmp_path / "pool")
    pool.check_writable()
    assert entries(pool.root) == [".lock"]
