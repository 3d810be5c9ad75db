"""How much does a skill keep in another language? An encoder's adapter, taught in one, asked in others.

    python scripts/compare_languages.py             # sentiment and intents, from English
    python scripts/compare_languages.py --pairs intents-en:intents-de --steps 60 --limit 200 --json

zero: the source's adapter as it is. fresh: an adapter on a few labelled examples of the target. shots: the
source's, fine-tuned on the same ones. auto: what a transfer with them chooses, as `adapterhub-chat transfer`
does. all: an adapter on all of the target's examples. closed: the share of the gap between zero and all that
auto closes; held: half of it or more, or auto at least level with all where there is no gap. All on the same
test items, on one backbone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.output import Bars
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.evaluation.scoring import evaluate
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.training.job import make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.transfer.candidates import transfer
from adapterhub_chat.transfer.setting import make_problem
from adapterhub_chat.transfer.spec import transfer_config
from adapterhub_chat.types import as_mix
from adapterhub_chat.validation import read_settings

PAIRS = (
    "sentiment:sentiment-zh", "intents-en:intents-zh", "intents-en:intents-de", "intents-en:intents-fr",
)  # fmt: skip
WAYS = ("zero", "fresh", "shots", "auto", "all")
LEAST = 0.5
"""Share of the gap that the shots shall close."""


def compare(
    hub: AdapterHub,
    pairs: Sequence[tuple[Task, Task]],
    config: TrainConfig,
    budget: TrainConfig,
    *,
    shots: int = 64,
    limit: int = 200,
    listeners: Listeners = SILENT,
) -> dict[str, Any]:
    """Return each pair's scores by way; sources and targets are learnt in one run, then every transfer."""
    whole = {task.name: task for pair in pairs for task in pair}
    jobs = [make_job(hub.backbone.tokenizer, name, task, config) for name, task in whole.items()]
    learnt = {
        name: done.weights
        for name, done in train(hub.model, jobs, on_event=listeners.on_event).items()
    }
    found = []
    for source, target in pairs:
        problem = make_problem(learnt[source.name], source, target, shots, budget)
        outcome = transfer(hub.model, problem, "auto", on_event=listeners.on_event)
        made = outcome.candidates
        ways = {
            "zero": learnt[source.name],
            "fresh": made["target"].weights,
            "shots": made["finetune"].weights,
            "auto": made[outcome.chosen].weights,
            "all": learnt[target.name],
        }
        found.append(
            {
                "source": source.name,
                "target": target.name,
                "chosen": outcome.chosen,
                **_measured(hub, target, ways, limit),
            }
        )
    return {
        "pairs": found,
        "settings": config.model_dump(),
        "budget": budget.model_dump(),
        "shots": shots,
        "backbone": hub.backbone.name,
        "precision": hub.backbone.precision,
    }


def _measured(
    hub: AdapterHub, target: Task, ways: dict[str, AdapterWeights | None], limit: int
) -> dict[str, Any]:
    for way, weights in ways.items():
        if weights is not None:
            hub.model.load(way, weights)
    mixes = [(way, as_mix(None if weights is None else way)) for way, weights in ways.items()]
    items = sample(target.split("test"), limit)
    scores = {s.adapter: asdict(s) for s in evaluate(hub.model, mixes, [(target, items)])}
    zero, few, most = (scores[way]["value"] for way in ("zero", "auto", "all"))
    closed = (few - zero) / (most - zero) if most > zero else None
    held = few >= most if closed is None else closed >= LEAST
    return {"scores": scores, "closed": closed, "held": held}


def show(found: dict[str, Any]) -> Table:
    """Return a row for each pair."""
    table = Table("source", "target", "chance", *WAYS, "closed", "held", title=found["backbone"])
    for pair in found["pairs"]:
        scores = pair["scores"]
        cells = [f"{s['value']:.3f} [{s['low']:.2f}, {s['high']:.2f}]" for s in scores.values()]
        share = "no gap" if pair["closed"] is None else f"{pair['closed']:.0%}"
        chance = f"{scores['zero']['backbone_value']:.3f}"
        table.add_row(
            pair["source"], pair["target"], chance, *cells, share, "yes" if pair["held"] else "no"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pairs", nargs="*", default=PAIRS, help="source:target, by task name or path"
    )
    parser.add_argument("--backbone", default="multilingual-e5-small")
    parser.add_argument("--shots", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="of source and all")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of source and all")
    parser.add_argument("--transfer-steps", type=int, default=60, help="of every way with shots")
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--limit", type=int, default=400, help="test items; 0 takes all")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    settings = {
        "max_steps": given.steps,
        "epochs": 1e6,
        "learning_rate": given.learning_rate,
        "row_length": given.row_length,
        "eval_examples": 0,
        "patience": 0,
    }
    config = read_settings(TrainConfig, settings, "the settings")
    budget = transfer_config({"max_steps": given.transfer_steps, "row_length": given.row_length})
    hub = AdapterHub(given.backbone)
    pairs = [tuple(load_task(name) for name in pair.split(":")) for pair in given.pairs]
    with Bars(Console(stderr=True), show=not given.json) as bars:
        found = compare(
            hub,
            pairs,
            config,
            budget,
            shots=given.shots,
            limit=given.limit,
            listeners=bars.listeners,
        )
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(show(found))


if __name__ == "__main__":
    main()
