"""A working folder with a trained pool, and the command line run in this process."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from dataclasses import dataclass

import pytest
from pico import (
    TOYS,
    write_task,
)

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.app import main
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


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(here, monkeypatch, capsys, pico_folder):
    """run("verb", "--flag", ..., stdin="...") -> Result, in this process; verbs get the pico backbone."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "200")

    def go(verb, *args, stdin=b"", backbone=True):
        given = [verb, *map(str, args)]
        if backbone:
            given += ["--backbone", str(pico_folder), "--dtype", "fp32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["adapterhub-chat", *given])
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return go
