"""RunLog: every training event as a line of `metrics.jsonl`, and to TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from adapterhub_chat.errors import PoolError, warn
from adapterhub_chat.events import Event


class RunLog:
    """Appends events to a log in a folder, which is created with the first event. Call it with each event."""

    def __init__(self, folder: Path) -> None:
        """Append to `folder/metrics.jsonl`."""
        self.folder = folder
        self._file: Any = None
        self._tensorboard: Any = None

    def __call__(self, event: Event) -> None:
        """Write one event; raise PoolError if the log cannot be created.

        A later failure, such as a full disk, is a warning: the training goes on.
        """
        if self._file is None:
            self._open()
        try:
            self._write(event)
        except OSError as error:
            warn(f"the run log misses events: {error}")

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "metrics.jsonl").open("ab", buffering=0)
        except OSError as error:
            raise PoolError(f"the run log cannot be written to {self.folder}: {error}") from error
        if importlib.util.find_spec("tensorboard"):
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._tensorboard = writer(str(self.folder))

    def _write(self, event: Event) -> None:
        line = json.dumps({"time": time.time(), **asdict(event)}) + "\n"
        self._file.write(line.encode())
        if self._tensorboard is not None:
            for name, value in event.values.items():
                tag = f"{event.adapter}/{event.kind}_{name}"
                self._tensorboard.add_scalar(tag, value, event.step)

    def __enter__(self) -> RunLog:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        for opened in (self._file, self._tensorboard):
            if opened is not None:
                opened.close()
