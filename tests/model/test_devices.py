"""Memory of the process: resident and peak, in bytes."""

import subprocess
import sys

import torch

from adapterhub_chat.model import devices
from adapterhub_chat.model.devices import peak_memory, resident_memory

CPU = torch.device("cpu")
SIZE = 200 * 2**20


def test_resident_memory_grows_with_an_allocation_and_the_peak_stays():
    before = resident_memory()
    block = torch.ones(SIZE, dtype=torch.uint8)
    assert resident_memory() - before > SIZE // 2
    del block
    assert resident_memory() - before < SIZE // 2
    assert peak_memory(CPU) > before + SIZE // 2


def test_the_peak_of_a_child_process_is_its_own():
    """On Linux, `ru_maxrss` of a child includes its parent's memory; benches measure in children."""
    code = (
        "import torch; from adapterhub_chat.model.devices import peak_memory, resident_memory;"
        "print(resident_memory(), peak_memory(torch.device('cpu')))"
    )
    block = torch.ones(8 * SIZE, dtype=torch.uint8)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident, peak = map(int, done.stdout.split())
    assert 0 < resident <= peak + 2**24
    assert peak < len(block)


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "missing")
    assert peak_memory(CPU) >= resident_memory() // 2
    monkeypatch.setattr(devices, "resource", None)
    assert peak_memory(CPU) == 0
