"""Checkpoints: a training run's state in a folder, so that a killed run goes on where it was.

A state is one safetensors file, written under another name, synced and renamed; the one before it is kept
until the next is complete. What cannot be read or does not match its own hash is passed over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapterhub_chat.errors import PoolError, warn
from adapterhub_chat.files import replaced_file
from adapterhub_chat.training.loop import RunState

KEPT = 2
"""States kept at one time."""


class Checkpoints:
    """The states of one run; call it after every step, and now and then it saves one."""

    def __init__(self, folder: Path, *, steps: int = 0, minutes: float = 0.0) -> None:
        """Save into `folder` every so many steps and after so many minutes; 0 never does."""
        self.folder, self.steps, self.seconds = folder, steps, minutes * 60
        self._step, self._last = 0, time.monotonic()

    def __call__(self, state: Callable[[], RunState]) -> None:
        """Save the state if it is time; where that fails, warn: it costs the state, not the run."""
        self._step += 1
        by_clock = self.seconds and time.monotonic() - self._last >= self.seconds
        if by_clock or (self.steps and self._step % self.steps == 0):
            self.keep(state())

    def keep(self, state: RunState) -> None:
        """Save a state; where that fails, warn and go on."""
        try:
            self.save(state)
        except PoolError as error:
            warn(f"the run goes on, but {error}")

    def save(self, state: RunState) -> None:
        """Save a state; raise PoolError, with the older ones untouched, when that is not possible."""
        old = self._files()
        number = int(old[-1].stem.partition("-")[2]) + 1 if old else 1
        target = self.folder / f"state-{number:06}.safetensors"
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
        numbers = json.dumps([state.identity, state.elapsed, dict(state.numbers)])
        metadata = {"state": numbers, "sha256": _digest(numbers, tensors)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(target, durable=True) as scratch:
                save_file(tensors, scratch, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise PoolError(f"the run's state cannot be saved in {self.folder}: {error}") from error
        for file in old[: len(old) + 1 - KEPT]:
            file.unlink(missing_ok=True)
        self._last = time.monotonic()

    def latest(self) -> RunState | None:
        """Return the newest state that is whole, None when there is none."""
        for file in reversed(self._files()):
            try:
                return _read(file)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                text = f"{file} is damaged and passed over: {error}"
                warn(text)
        return None

    def __bool__(self) -> bool:
        """Return whether there are states."""
        return bool(self._files())

    def clear(self) -> None:
        """Remove all states: the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))


def _read(path: Path) -> RunState:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(metadata["state"], tensors) != metadata["sha256"]:
        raise ValueError("its content does not match its sha256")
    identity, elapsed, numbers = json.loads(metadata["state"])
    return RunState(identity, elapsed, numbers, tensors)


def _digest(numbers: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(numbers.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().numpy().tobytes())
    return digest.hexdigest()
