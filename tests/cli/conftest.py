"""A working folder with a trained pool, and the command line in it."""

from __future__ import annotations

import shutil

import pytest
from pico import (
    TOYS,
    write_task,
)

from adapterhub_chat import AdapterHub
from adapterhub_chat.data.task import load_task


@pytest.fixture(scope="module")
def prepared(pico_folder, tmp_path_factory):
    """A working folder with the three toy tasks under tasks/ and a pool of adapters trained on them."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "tasks").mkdir()
    for name, make in TOYS.items():
        write_task(root / "tasks", name, make())
    hub = AdapterHub(str(pico_folder), root / "adapters", dtype="fp32", device="cpu")
    tasks = [load_task(root / "tasks" / f"{name}.toml") for name in TOYS]
    hub.train(tasks, max_steps=2, rows_per_step=1, learning_rate=0.02, test_examples=4)
    return root


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """The working folder of one test."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, run_verb):
    """`run_verb`, in the working folder of the test."""
    return run_verb
