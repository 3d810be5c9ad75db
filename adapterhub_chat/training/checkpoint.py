"""Checkpoints: the saved states of a training run, from which a killed run resumes.

A state is one safetensors file, written under a temporary name, synced and renamed; the previous state is
kept until the next one is complete. A file that cannot be read or does not match its hash is skipped.
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

MAX_STATES = 2
"""Number of states kept at one time."""


class Checkpoints:
    """The saved states of one run. Call it after every step; it saves one when it is due."""

    def __init__(self, folder: Path, *, steps: int = 0, minutes: float = 0.0) -> None:
        """Save into `folder` every `steps` steps and every `minutes` minutes; 0 turns either off."""
        self.folder, self.steps, self.seconds = folder, steps, minutes * 60
        self._num_steps, self._last_save = 0, time.monotonic()

    def __call__(self, state: Callable[[], RunState]) -> None:
        """Save the state if one is due; if that fails, warn, and the run goes on."""
        self._num_steps += 1
        due_by_time = self.seconds and time.monotonic() - self._last_save >= self.seconds
        if due_by_time or (self.steps and self._num_steps % self.steps == 0):
            self.save_or_warn(state())

    def save_or_warn(self, state: RunState) -> None:
        """Save a state; if that fails, warn instead of raising."""
        try:
            self.save(state)
        except PoolError as error:
            warn(f"the run goes on, but {error}")

    def save(self, state: RunState) -> None:
        """Save a state; raise PoolError, with the older ones untouched, if that fails."""
        files = self._files()
        number = int(files[-1].stem.partition("-")[2]) + 1 if files else 1
        target = self.folder / f"state-{number:06}.safetensors"
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
        counters = json.dumps([state.identity, state.elapsed, dict(state.counters)])
        metadata = {"state": counters, "sha256": _digest(counters, tensors)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(target, durable=True) as scratch:
                save_file(tensors, scratch, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise PoolError(f"the run's state cannot be saved in {self.folder}: {error}") from error
        for file in files[: len(files) + 1 - MAX_STATES]:
            file.unlink(missing_ok=True)
        self._last_save = time.monotonic()

    def latest(self) -> RunState | None:
        """Return the newest intact state, None if there is none."""
        for file in reversed(self._files()):
            try:
                return _read(file)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warn(f"{file} is damaged and passed over: {error}")
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
    identity, elapsed, counters = json.loads(metadata["state"])
    return RunState(identity, elapsed, counters, tensors)


def _digest(counters: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(counters.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().numpy().tobytes())
    return digest.hexdigest()
