"""RunLog: every training event as a line of `metrics.jsonl`, and to TensorBoard where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from adapterhub_chat.errors import PoolError
from adapterhub_chat.train import Event


class RunLog:
    """Writes events into a folder; call it with each one."""

    def __init__(self, folder: Path) -> None:
        """Open `folder/metrics.jsonl` for appending."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise PoolError(f"the run log cannot be written to {folder}: {error}") from error
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(folder))

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(json.dumps({"time": time.time(), **asdict(event)}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in event.values.items():
                tag = f"{event.adapter}/{event.kind}_{name}"
                self._board.add_scalar(tag, value, event.step)

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
        self._file.close()
        if self._board is not None:
            self._board.close()
