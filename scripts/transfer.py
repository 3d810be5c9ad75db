"""What does each way of transfer bring? Pairs x shots x seeds x methods, on one backbone, one table.

    python scripts/transfer.py                                  # resumes where it was stopped
    python scripts/transfer.py --pairs domain --shots 16 --seeds 0 --steps 10 --limit 40

Everything is judged and chosen on validation rows, and measured here on test rows that nothing else has
seen. A cell (pair, shots, seed) trains its methods jointly and ends as one line of JSON; finished cells are
skipped. `gap` is the share of the way from the few-shot target adapter to one trained on all target labels.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.output import Bars
from adapterhub_chat.data.metrics import Rows
from adapterhub_chat.data.splits import Splits, sample
from adapterhub_chat.data.task import Task, list_tasks, load_task
from adapterhub_chat.evaluation.scoring import Judged, judge, score
from adapterhub_chat.events import Listeners
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.transfer.candidates import AS_IS, Outcome, transfer
from adapterhub_chat.transfer.gate import verdict
from adapterhub_chat.transfer.methods import METHODS
from adapterhub_chat.transfer.setting import make_problem
from adapterhub_chat.transfer.spec import transfer_config
from adapterhub_chat.types import BACKBONE, SPLITS, Mix, as_mix

SHIPPED = Path(__file__).parent.parent / "adapters"
FULL = "all labels"
AUTO = "auto"
LEAST_GAIN = 0.05
"""What a transfer must bring at 16 shots, as a share of right answers."""


@dataclass(frozen=True)
class Pair:
    """From which task to which one, on which backbone."""

    name: str
    source: str
    target: str
    backbone: str = "smollm2-135m"
    shipped: str = ""
    """The adapter of this repository that knows the source; empty: one is trained here."""
    inverted: bool = False
    """The source's labels are turned round: it is hostile, and the gate must say so."""
    steps: int = 30
    """Training steps of every method."""
    judged: int = 60
    """Validation rows to choose by. An encoder's cost a tenth: there it is what `hub.transfer` takes."""


ENCODER: dict[str, Any] = {"backbone": "multilingual-e5-small", "steps": 60, "judged": 200}
PAIRS = (
    Pair("domain", "sentiment", "sentiment-airline", shipped="sentiment"),
    Pair("register", "sentiment-short", "sentiment-long"),
    Pair("hostile", "sentiment-short", "sentiment-airline", inverted=True),
    Pair("language", "sentiment-short", "sentiment-zh", **ENCODER),
    Pair("language-hard", "sentiment-short", "sentiment-zh"),
    Pair("intents-zh", "intents-en", "intents-zh", **ENCODER),
    Pair("intents-de", "intents-en", "intents-de", **ENCODER),
    Pair("intents-fr", "intents-en", "intents-fr", **ENCODER),
    Pair("intents-es", "intents-en", "intents-es", **ENCODER),
)
"""Of these, the ones whose tasks are here."""


class Bench:
    """One pair: its source, the adapter on all labels, the test items, and what is measured on them once."""

    def __init__(
        self, hub: AdapterHub, pair: Pair, limit: int, full_steps: int, listeners: Listeners
    ) -> None:
        """Train the source and the adapter on all labels, or find them in the pool."""
        self.hub, self.pair, self.listeners = hub, pair, listeners
        self.source = load_task(pair.source)
        if pair.inverted:
            self.source = inverted(self.source)
        self.target = load_task(pair.target)
        self.items = sample(self.target.split("test"), limit)
        self.full_steps = full_steps
        if pair.shipped:
            self.weights = Pool(SHIPPED).load(pair.shipped).weights
        else:
            self.weights = self._trained(self.source)
        full = self._trained(self.target)
        self.fixed = {
            BACKBONE: self.test_rows(None),
            AS_IS: self.test_rows(self.weights),
            FULL: self.test_rows(full),
        }

    def _trained(self, task: Task) -> AdapterWeights:
        name = f"{task.name}-{self.full_steps}"
        if name not in self.hub.pool:
            settings: dict[str, Any] = {
                "max_steps": self.full_steps,
                "epochs": 99,
                "eval_examples": 0,
            }
            self.hub.train(
                [task], names=[name], test_examples=0, listeners=self.listeners, **settings
            )
        return self.hub.pool.load(name).weights

    def test_rows(self, weights: AdapterWeights | None) -> Rows:
        """Return the rows of the target's metric on the test items."""
        if weights is None:
            return judge(self.hub.model, self.target, self.items, Mix()).rows
        self.hub.model.load("tested", weights)
        return judge(self.hub.model, self.target, self.items, as_mix("tested")).rows

    def cell(self, shots: int, seed: int, steps: int, judged: int) -> dict[str, Any]:
        """Return the finished cell: a row for every method."""
        started = time.perf_counter()
        config = transfer_config(
            {
                "max_steps": steps,
                "seed": seed,
                "rows_per_step": 1,
                "train_examples": 160,
                "eval_examples": judged,
                "eval_every": steps,
            }
        )
        problem = make_problem(self.weights, self.source, self.target, shots, config)
        outcome = transfer(self.hub.model, problem, AUTO, on_event=self.listeners.on_event)
        rows = dict(self.fixed)
        for name in METHODS:
            if name in outcome.candidates:
                rows[name] = self.test_rows(outcome.candidates[name].weights)
        rows[AUTO] = rows[outcome.chosen]
        weighting, discriminator = outcome.weighting, outcome.discriminator
        return {
            "pair": self.pair.name,
            "backbone": self.pair.backbone,
            "source": self.source.name,
            "target": self.target.name,
            "shots": shots,
            "seed": seed,
            "steps": steps,
            "judged_on": len(problem.validation),
            "measured_on": len(self.items),
            "baseline": outcome.baseline,
            "chosen": outcome.chosen,
            "effective": weighting.effective if weighting else None,
            "weighting_note": weighting.note if weighting else "",
            "discriminator": discriminator.recent_accuracy if discriminator else None,
            "discriminator_course": [round(a, 3) for a in discriminator.accuracy]
            if discriminator
            else [],
            "methods": {name: self._row(name, rows, outcome) for name in rows},
            "transfer_seconds": round(outcome.seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "machine": machine(),
        }

    def _row(self, name: str, rows: dict[str, Rows], outcome: Outcome) -> dict[str, Any]:
        """Return a method's score on test items, and what the gate said of it on validation items."""
        found = score(name, self.target, Judged(rows[name]), None)
        beside = verdict(self.target.metric, rows[name], rows[outcome.baseline])
        candidate = outcome.candidates.get(outcome.chosen if name == AUTO else name)
        reach = verdict(self.target.metric, rows[FULL], rows[outcome.baseline]).gain
        return {
            "value": round(found.value, 4),
            "low": round(found.low, 4),
            "high": round(found.high, 4),
            "gain": round(beside.gain, 4),
            "gain_low": round(beside.low, 4),
            "gain_high": round(beside.high, 4),
            "gap": round(beside.gain / reach, 3) if reach > 0.01 else None,
            "verdict": candidate.verdict.word if candidate else None,
            "note": candidate.note if candidate else "",
        }


def inverted(task: Task) -> Task:
    """Return a task of two labels with each example under the other one."""
    one, other = task.contract.labels
    swap = {one: other, other: one}
    parts = {
        split: tuple(replace(e, answer=swap[e.answer]) for e in task.split(split))
        for split in SPLITS
    }
    return Task(f"{task.name}-inverted", task.contract, task.metric, lambda: Splits(parts))


def machine() -> dict[str, Any]:
    """Return what the seconds were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def read(lines: Path) -> list[dict[str, Any]]:
    """Return the finished cells; a line that a kill cut off is dropped."""
    cells = []
    for line in lines.read_text("utf-8").splitlines() if lines.is_file() else []:
        try:
            cells.append(json.loads(line))
        except ValueError:
            continue
    return cells


KEY = ("pair", "shots", "seed", "steps", "measured_on", "judged", "full_steps")


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells one cell from another."""
    return tuple(cell[name] for name in KEY)


def run(arguments: argparse.Namespace, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Run what is not finished; return the cells that are asked for, all finished."""
    hubs: dict[str, AdapterHub] = {}
    cells = {key(cell): cell for cell in read(arguments.lines)}
    wanted = []
    with Bars(Console(stderr=True), show=not arguments.json) as bars:
        for pair in pairs:
            steps = arguments.steps or pair.steps
            judged = arguments.judged or pair.judged
            keys = [
                (pair.name, shots, seed, steps, arguments.limit, judged, arguments.full_steps)
                for shots in arguments.shots
                for seed in arguments.seeds
            ]
            wanted += keys
            left = [k for k in keys if k not in cells]
            if not left:
                continue
            if pair.backbone not in hubs:
                hubs[pair.backbone] = AdapterHub(
                    pair.backbone, arguments.pool / Path(pair.backbone).name
                )
            hub = hubs[pair.backbone]
            bench = Bench(hub, pair, arguments.limit, arguments.full_steps, bars.listeners)
            for one in left:
                cell = bench.cell(one[1], one[2], steps, judged)
                cells[one] = cell | dict(zip(KEY, one, strict=True))
                with arguments.lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cells[one], ensure_ascii=False) + "\n")
                print(f"{one[:3]}: {cell['chosen']}, {cell['seconds']} s", file=sys.stderr)
    return [cells[one] for one in wanted]


def must_hold(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bool | None]]:
    """Yield what the table is made to show, and whether it does; None: no cell speaks to it."""
    below = [c for c in cells if c["methods"][AUTO]["gain_high"] < 0]
    yield (
        f"auto is significantly below its baseline (target-only; the backbone at 0 shots) in {len(below)} of "
        f"{len(cells)} cells",
        (not below if cells else None),
    )
    kinds = ("domain", "language", "intents")
    at_16 = [
        c["methods"][AUTO]["gain"]
        for c in cells
        if c["shots"] == 16 and c["pair"].startswith(kinds)
    ]
    if at_16:
        yield (
            f"mean gain of auto over target-only at 16 shots, domain and languages: {mean(at_16):+.3f} "
            f"(at least {LEAST_GAIN})",
            mean(at_16) >= LEAST_GAIN,
        )
    for method in ("maxent", "stack", "adversarial"):
        gains: dict[str, list[float]] = {}
        for c in (c for c in cells if method in c["methods"] and c["pair"] != "hostile"):
            better = c["methods"][method]["value"] - c["methods"][AS_IS]["value"]
            gains.setdefault(c["pair"], []).append(better)
        told = ", ".join(f"{pair} {mean(g):+.3f}" for pair, g in gains.items())
        holds = any(mean(g) > 0 for g in gains.values()) if gains else None
        yield f"{method} over the source as it is: {told}", holds
    hostile = [c for c in cells if c["pair"] == "hostile"]
    named = [c for c in hostile if c["methods"][AS_IS]["verdict"] == "hurts"]
    yield (
        f"the hostile source is called hurts in {len(named)} of {len(hostile)} cells",
        (len(named) == len(hostile) if hostile else None),
    )


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table, seeds averaged, and what must hold."""
    table = Table("pair", "shots", "method", "value", "lowest - highest", "gain", "gap", "verdicts")
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        for name, row in cell["methods"].items():
            groups.setdefault((cell["pair"], cell["shots"], name), []).append(row)
    for (pair, shots, name), rows in groups.items():
        gaps = [row["gap"] for row in rows if row["gap"] is not None]
        words = [row["verdict"] or "-" for row in rows]
        table.add_row(
            pair,
            str(shots),
            name,
            f"{mean(row['value'] for row in rows):.3f}",
            f"{min(row['low'] for row in rows):.2f} - {max(row['high'] for row in rows):.2f}",
            f"{mean(row['gain'] for row in rows):+.3f}",
            f"{mean(gaps):+.2f}" if gaps else "",
            ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words)),
        )
    console.print(table)
    for text, holds in must_hold(cells):
        console.print(f"{'?' if holds is None else 'ok' if holds else 'NO'}  {text}", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = {pair.name: pair for pair in PAIRS if {pair.source, pair.target} <= {*list_tasks()}}
    parser.add_argument("--pairs", nargs="+", choices=here, default=list(here))
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 16, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of every method (the pair's own)")
    parser.add_argument(
        "--full-steps", type=int, default=60, help="of source and all-labels adapter"
    )
    parser.add_argument("--judged", type=int, help="validation rows to choose by (the pair's own)")
    parser.add_argument("--limit", type=int, default=100, help="test rows to measure on")
    parser.add_argument("--lines", type=Path, default=Path("transfer.jsonl"), help="a line a cell")
    parser.add_argument("--pool", type=Path, default=Path("transfer-pool"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    cells = run(given, [here[name] for name in given.pairs])
    if given.json:
        holds = [{"what": text, "holds": found} for text, found in must_hold(cells)]
        pairs = [asdict(here[name]) for name in given.pairs]
        print(json.dumps({"pairs": pairs, "cells": cells, "must_hold": holds}, indent=1))
    else:
        show(cells, Console(width=150))


if __name__ == "__main__":
    main()
