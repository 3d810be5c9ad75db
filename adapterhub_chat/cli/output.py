"""Output of the verbs: notes and progress on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TaskID as BarID
from rich.table import Table
from rich.text import Text

from adapterhub_chat.events import Event, Ledger, Listeners
from adapterhub_chat.types import Score

if TYPE_CHECKING:
    from adapterhub_chat.artifact.manifest import Manifest
    from adapterhub_chat.training.run import Finished

INTERRUPTED = 130
"""Exit code after Ctrl-C, typer's too."""
out = Console()
err = Console(stderr=True)


class Notes:
    """Prints notes to standard error, unless quiet."""

    def __init__(self, *, quiet: bool) -> None:
        """Print nothing if `quiet`."""
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        """Print one note."""
        if not self.quiet:
            err.print(text, highlight=False, markup=False)


def print_message(what: str, text: str, style: str = "bold red") -> None:
    """Print a line to standard error: its kind in colour (error, note, ...), and the text."""
    err.print(Text.assemble((f"{what}:", style), " ", text), soft_wrap=True)


def print_warnings_and_logs() -> None:
    """Print the package's logs and warnings to standard error, a line each."""
    handler = RichHandler(console=err, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("adapterhub_chat").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels
    warnings.showwarning = lambda message, *_, **__: print_message("note", str(message), "yellow")


def print_json(value: Any) -> None:
    """Print one JSON value to standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of plain texts to standard output."""
    table = Table(*columns, title=Text(title))
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def print_scores(title: str, scores: Iterable[Score]) -> None:
    """Print scores with intervals and the backbone's values; precisions are printed if they differ."""
    score_list = list(scores)
    columns = ["adapter", "task", "metric", "score", "95 % interval", "backbone", "n"]
    rows = [_score_row(score) for score in score_list]
    if len({score.precision for score in score_list}) > 1:
        columns.append("precision")
        rows = [[*row, s.precision] for row, s in zip(rows, score_list, strict=True)]
    print_table(title, columns, rows)


def _score_row(s: Score) -> list[str]:
    interval = f"{number(s.low)} to {number(s.high)}"
    backbone_value = number(s.backbone_value)
    return [s.adapter, s.task, s.metric, number(s.value), interval, backbone_value, str(s.n)]


def print_finished(finished: Finished, pool: str, folder: Path, notes: Notes) -> None:
    """Print the results of a training run: adapters, scores, the sweep's table and the sequence's ledger."""
    for title, manifest in finished.manifests.items():
        t = manifest.training
        notes(f"{title}: {t.steps} steps, best at {t.best_step}, {t.stopped}; saved to {pool}")
    if peak := max((m.training.peak_bytes for m in finished.manifests.values()), default=0):
        notes(f"memory at its peak: {peak / 2**20:.0f} MiB")
    notes(f"run log: {folder / 'metrics.jsonl'}")
    if finished.sweep:
        keys = list(dict.fromkeys(key for c in finished.sweep for key in c.settings))
        rows = []
        for c in finished.sweep:
            values = [str(c.settings.get(key, "")) for key in keys]
            rows.append((c.adapter, *values, number(c.validation_loss), "kept" * c.kept))
        columns = ("adapter", *keys, "validation loss", "")
        print_table("Settings tried, by validation loss", columns, rows)
    if scores := [s for m in finished.manifests.values() for s in m.scores]:
        print_scores("Test split, beside the backbone", scores)
    for manifest in finished.manifests.values():
        if pairs := manifest.training.conflict:
            rows_of_pairs = [(pair.replace("|", " and "), number(c)) for pair, c in pairs.items()]
            print_table(
                "Agreement of gradients on the shared adapter", ("tasks", "cosine"), rows_of_pairs
            )
    if finished.ledger is not None:
        print_ledger(finished.ledger)


def print_ledger(ledger: Ledger) -> None:
    """Print the score on each task after each stage of a sequence, and what was forgotten."""
    rows = [("backbone", *map(number, ledger.start))]
    for n, row in enumerate(ledger.matrix):
        rows.append((f"after {ledger.tasks[n]}", *map(number, row)))
    heads = [f"{t} ({m})" for t, m in zip(ledger.tasks, ledger.metrics, strict=True)]
    print_table("Scores after each stage", ("stage", *heads), rows)
    for name, value in (
        ("backward transfer (below 0: forgotten)", ledger.backward_transfer),
        ("forward transfer", ledger.forward_transfer),
    ):
        out.print(f"{name}: {number(value) or 'not measured'}")


def number(value: float | None) -> str:
    """Return a number with three digits, "" for None."""
    return "" if value is None else f"{value:.3f}"


def adapter_row(name: str, manifest: Manifest | None) -> tuple[str, ...]:
    """Return an adapter's row in the table of `list`."""
    if manifest is None:
        return name, "", "", "", "", "unverified (no manifest)"
    score = manifest.scores[0] if manifest.scores else None
    return (
        name,
        ", ".join(manifest.training.tasks),
        manifest.metric,
        f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else "not measured",
        number(score.backbone_value if score else None),
        manifest.backbone,
    )


class Bars:
    """Progress bars of training events and judged items; nothing is drawn when `show` is False."""

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
        """The callbacks that update the bars."""
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
