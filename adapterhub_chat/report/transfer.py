"""The report of a transfer as Markdown: candidates, verdicts, the chosen one, plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapterhub_chat.data.metrics import METRICS, bootstrap_interval
from adapterhub_chat.errors import PoolError
from adapterhub_chat.report.plots import draw_transfer
from adapterhub_chat.transfer.candidates import Outcome
from adapterhub_chat.transfer.run import Transferred

REPORT_FILE = "report.md"

Scores = dict[str, tuple[float, float, float]]
"""Candidate -> value and bounds of its 95 % interval."""


def write_report(result: Transferred, folder: Path) -> Path:
    """Write `report.md` and its plots into a folder; return the report's path.

    Raises PoolError if the folder cannot be written to. Plots need the extra `pictures`.
    """
    scores = _scores(result.outcome)
    by_shots = {shots: _scores(outcome) for shots, outcome in result.by_shots.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw_transfer(scores, result.outcome, folder, by_shots)
        text = _text(result, scores, pictures) + _table(by_shots)
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PoolError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return folder / REPORT_FILE


def _scores(outcome: Outcome) -> Scores:
    metric = METRICS[outcome.metric]
    return {
        name: (metric.aggregate(rows), *bootstrap_interval(rows, metric.statistic))
        for name, rows in outcome.rows.items()
    }


def _table(by_shots: Mapping[int, Scores]) -> str:
    """Return a table of each candidate's value by the number of shots; empty for a single number."""
    if len(by_shots) < 2:
        return ""
    lines = [
        "\n## By labelled examples\n",
        "| candidate | " + " | ".join(f"{shots} shots" for shots in by_shots) + " |",
        "|---" * (1 + len(by_shots)) + "|",
    ]
    for name in dict.fromkeys(name for scores in by_shots.values() for name in scores):
        cells = (scores.get(name) for scores in by_shots.values())
        texts = (
            "" if cell is None else f"{cell[0]:.3f} ({cell[1]:.3f} to {cell[2]:.3f})"
            for cell in cells
        )
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, ""])


def _judged_on(outcome: Outcome) -> str:
    if outcome.proxy:
        return f"Judged by {outcome.metric}; **{outcome.proxy}**."
    return (
        f"Judged by {outcome.metric} on {len(outcome.rows[outcome.baseline])} labelled validation examples "
        "of the target, which also chose: expect a little less on new ones."
    )


def _text(result: Transferred, scores: Scores, pictures: list[str]) -> str:
    outcome = result.outcome
    chosen = outcome.candidates[outcome.chosen]
    saved = f"`{result.manifest.name}` is in the pool" if result.manifest else "no adapter was made"
    lines = [
        "# Transfer\n",
        f"Chosen: **{outcome.chosen}**, which **{chosen.verdict.word}** beside {outcome.baseline} "
        f"({chosen.verdict.gain:+.3f}, 95 % interval {chosen.verdict.low:+.3f} to "
        f"{chosen.verdict.high:+.3f}); {saved}. {outcome.seconds:.0f} seconds.\n",
        f"{_judged_on(outcome)}\n",
        "| candidate | value | 95 % interval | verdict | gain | remark |",
        "|---|---|---|---|---|---|",
    ]
    for name, candidate in outcome.candidates.items():
        value, low, high = scores[name]
        lines.append(
            f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} | {candidate.verdict.word} "
            f"| {candidate.verdict.gain:+.3f} | {candidate.note} |"
        )
    if outcome.weighting:
        lines.append(
            f"\nReweighted source: as good as {outcome.weighting.effective:.0%} of its examples."
        )
        lines.append(outcome.weighting.note)
    if outcome.discriminator:
        accuracy = outcome.discriminator.recent_accuracy
        lines.append(f"\nDiscriminator's accuracy at the end: {accuracy:.2f} (0.5: fooled).")
    if result.manifest:
        lines += [
            f"\nOn the test examples: {s.metric} {s.value:.3f} ({s.low:.3f} to {s.high:.3f}, n = {s.n}); "
            f"backbone {s.backbone_value:.3f}."
            for s in result.manifest.scores
            if s.backbone_value is not None
        ]
    lines += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join([*lines, ""])
