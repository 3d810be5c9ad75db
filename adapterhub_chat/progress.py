"""Progress bars for long work: one bar per adapter in training, one per task in judging."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TaskID as BarID

from adapterhub_chat.train import Event
from adapterhub_chat.workshop import Listeners


class Bars:
    """Shows training events and judged items as they come; silent when `show` is False."""

    def __init__(self, console: Console, *, show: bool = True) -> None:
        """Draw on `console`."""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not show,
        )
        self._bars: dict[str, BarID] = {}

    def __enter__(self) -> Bars:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    @property
    def listeners(self) -> Listeners:
        """What a run calls with its progress."""
        return Listeners(self.on_event, self.on_judged)

    def on_event(self, event: Event) -> None:
        """Show one training event."""
        bar = self._bar(f"train {event.adapter}", event.total)
        loss = f"{event.values['loss']:.3f}" if "loss" in event.values else "unknown"
        note = {
            "step": f"loss {loss}",
            "validation": f"validation {loss}",
            "stop": f"{event.note}, best validation {loss}",
        }[event.kind]
        self._progress.update(bar, completed=event.step, note=note)

    def on_judged(self, what: str, n: int) -> None:
        """Show that `n` more items of a task have been answered."""
        self._progress.advance(self._bar(f"answer {what}", None), n)

    def _bar(self, title: str, total: int | None) -> BarID:
        if title not in self._bars:
            self._bars[title] = self._progress.add_task(title, total=total, note="")
        return self._bars[title]
