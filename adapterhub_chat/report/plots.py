"""Plots of training, routing and transfer results; need matplotlib (the extra `pictures`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub_chat.errors import warn
from adapterhub_chat.events import Ledger, Listeners
from adapterhub_chat.files import replaced_file
from adapterhub_chat.transfer.adversarial import DomainDiscriminator
from adapterhub_chat.transfer.candidates import Outcome
from adapterhub_chat.transfer.maxent import Weighting

Interval = tuple[float, float, float]
"""A value, and the bounds of its 95 % interval."""


def with_picture(listeners: Listeners, folder: Path | None) -> Listeners:
    """Return listeners that also draw the ledger of a sequence into the run's folder, if it is not None."""
    if folder is None:
        return listeners

    def on_ledger(ledger: Ledger) -> None:
        listeners.on_ledger(ledger)
        draw_ledger(ledger, folder / "ledger.png")

    return replace(listeners, on_ledger=on_ledger)


def draw_ledger(ledger: Ledger, path: Path) -> bool:
    """Draw the scores after each stage as a PNG; return whether it was drawn.

    A cell's colour is the position of its score between the worst and the best on that task.
    """
    if not importlib.util.find_spec("matplotlib"):
        return False
    figure, axes = _new_axes((2 + 1.3 * len(ledger.tasks), 1.8 + 0.6 * len(ledger.matrix)))
    rows: list[tuple[float | None, ...]] = [ledger.start, *ledger.matrix]
    axes.imshow(_shades(ledger, rows), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(j, i, f"{value:.3g}", ha="center", va="center")
    headings = [f"{t}\n{m}" for t, m in zip(ledger.tasks, ledger.metrics, strict=True)]
    axes.set_xticks(range(len(headings)), headings)
    stages = ["backbone", *(f"after {t}" for t in ledger.tasks[: len(ledger.matrix)])]
    axes.set_yticks(range(len(stages)), stages)
    transfers = {"backward": ledger.backward_transfer, "forward": ledger.forward_transfer}
    titles = [
        f"{name} transfer {value:+.3g}" for name, value in transfers.items() if value is not None
    ]
    axes.set_title(", ".join(titles))
    return _save(figure, path)


def draw_confusion(confusion: Mapping[str, Mapping[str, int]], path: Path) -> bool:
    """Draw the number of messages of each task (rows) routed to each adapter; return whether it was drawn."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    names, size = list(confusion), 2 + 0.8 * len(confusion)
    figure, axes = _new_axes((size + 1, size))
    counts = [[confusion[task][adapter] for adapter in names] for task in names]
    axes.imshow(
        [[n / max(1, sum(row)) for n in row] for row in counts], cmap="Blues", vmin=0, vmax=1
    )
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                dark = count > sum(row) / 2
                axes.text(j, i, count, ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("routed to")
    return _save(figure, path)


def draw_transfer(
    scores: Mapping[str, Interval],
    outcome: Outcome,
    folder: Path,
    by_shots: Mapping[int, Mapping[str, Interval]],
) -> list[str]:
    """Draw a transfer's scores, weights and discriminator accuracy as PNGs; return their names."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    drawn = []
    for name, draw in (
        ("scores.png", partial(_plot_scores, scores)),
        ("shots.png", partial(_plot_by_shots, by_shots) if len(by_shots) > 1 else None),
        ("weights.png", outcome.weighting and partial(_plot_weights, outcome.weighting)),
        (
            "discriminator.png",
            outcome.discriminator and partial(_plot_accuracy, outcome.discriminator),
        ),
    ):
        if draw:
            figure, axes = _new_axes((6, 3.2))
            draw(axes)
            if _save(figure, folder / name):
                drawn.append(name)
    return drawn


def _plot_scores(scores: Mapping[str, Interval], axes: Any) -> None:
    values = [value for value, _, _ in scores.values()]
    lower = [value - low for value, low, _ in scores.values()]
    upper = [high - value for value, _, high in scores.values()]
    axes.errorbar(values, range(len(scores)), xerr=[lower, upper], fmt="o", capsize=3)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set_xlabel("on validation examples, 95 % interval")


def _plot_by_shots(by_shots: Mapping[int, Mapping[str, Interval]], axes: Any) -> None:
    positions = {shots: position for position, shots in enumerate(by_shots)}
    names = dict.fromkeys(name for scores in by_shots.values() for name in scores)
    for index, name in enumerate(names):
        points = [(positions[n] + index / 40, *s[name]) for n, s in by_shots.items() if name in s]
        position, value, low, high = zip(*points, strict=True)
        lower = [v - b for v, b in zip(value, low, strict=True)]
        upper = [a - v for v, a in zip(value, high, strict=True)]
        axes.errorbar(position, value, yerr=[lower, upper], marker="o", capsize=3, label=name)
    axes.set_xticks(list(positions.values()), [str(shots) for shots in positions])
    axes.set_xlabel("labelled target examples")
    axes.set_ylabel("on validation examples, 95 % interval")
    axes.legend(fontsize="x-small")


def _plot_weights(weighting: Weighting, axes: Any) -> None:
    axes.hist(weighting.weights.tolist(), bins=30)
    axes.axvline(1.0, linestyle="--")
    axes.set_xlabel("weight of a source example (1: as without weights)")


def _plot_accuracy(discriminator: DomainDiscriminator, axes: Any) -> None:
    axes.plot(range(1, len(discriminator.accuracy) + 1), discriminator.accuracy)
    axes.axhline(0.5, linestyle="--")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("step")
    axes.set_ylabel("discriminator's accuracy")


def _new_axes(size: tuple[float, float]) -> tuple[Any, Any]:
    figure: Any = importlib.import_module("matplotlib.figure").Figure(
        figsize=size, layout="constrained"
    )
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> bool:
    """Write a figure as a PNG in one step; warn and return False where that cannot be."""
    try:
        with replaced_file(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)
    except OSError as error:
        warn(f"{path} cannot be written: {error}")
        return False
    return True


def _shades(ledger: Ledger, rows: list[tuple[float | None, ...]]) -> list[list[float]]:
    """Return each score's position from the worst (0) to the best (1) on its task; NaN without a score."""
    shades = [[float("nan")] * len(ledger.tasks) for _ in rows]
    for j, higher_is_better in enumerate(ledger.higher_is_better):
        column = [row[j] for row in rows]
        values = [value for value in column if value is not None]
        low, span = min(values), (max(values) - min(values)) or 1.0
        for i, value in enumerate(column):
            if value is not None:
                share = (value - low) / span
                shades[i][j] = share if higher_is_better else 1 - share
    return shades
