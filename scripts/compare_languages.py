"""How much does a skill keep in another language? An encoder's adapter, taught in one, asked in others.

    python scripts/compare_languages.py             # sentiment and intents, from English
    python scripts/compare_languages.py --pairs intents-en:intents-de --steps 60 --limit 200 --json

zero: the source's adapter as it is. shots: fine-tuned on a few labelled examples of the target. fresh: the
same examples without the source. all: an adapter on all of the target's examples. closed: the share of the
gap between zero and all that the shots close. All on the same test items, on one backbone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub
from adapterhub_chat.config import TrainConfig, read_settings
from adapterhub_chat.evaluate import evaluate
from adapterhub_chat.jobs import make_job, sample
from adapterhub_chat.progress import Bars
from adapterhub_chat.task import Task, load_task
from adapterhub_chat.train import train
from adapterhub_chat.transfer.methods import few_shot_jobs, make_setting
from adapterhub_chat.types import as_mix
from adapterhub_chat.workshop import SILENT, Listeners

PAIRS = (
    "sentiment:sentiment-zh", "intents-en:intents-zh", "intents-en:intents-de", "intents-en:intents-fr",
)  # fmt: skip
WAYS = ("zero", "shots", "fresh", "all")


def compare(
    hub: AdapterHub,
    pairs: Sequence[tuple[Task, Task]],
    config: TrainConfig,
    *,
    shots: int = 64,
    limit: int = 200,
    listeners: Listeners = SILENT,
) -> dict[str, Any]:
    """Return each pair's scores by way; sources and targets are learnt in one run, shots in a second one."""
    tokenizer = hub.backbone.tokenizer
    whole = {task.name: task for pair in pairs for task in pair}
    jobs = [make_job(tokenizer, name, task, config) for name, task in whole.items()]
    learnt = train(hub.model, jobs, on_event=listeners.on_event)
    few = []
    for source, target in pairs:
        setting = make_setting(learnt[source.name].weights, source, target, shots, config)
        for job in few_shot_jobs(tokenizer, setting, ["finetune"]):
            few.append(replace(job, name=f"{target.name} {job.name}"))
    learnt |= train(hub.model, few, on_event=listeners.on_event)
    for name, done in learnt.items():
        hub.model.load(name, done.weights)
    return {
        "pairs": [_measured(hub, source, target, limit) for source, target in pairs],
        "settings": config.model_dump(),
        "shots": shots,
        "backbone": hub.backbone.name,
        "precision": hub.backbone.precision,
    }


def _measured(hub: AdapterHub, source: Task, target: Task, limit: int) -> dict[str, Any]:
    names = (source.name, f"{target.name} finetune", f"{target.name} target", target.name)
    mixes = [(way, as_mix(name)) for way, name in zip(WAYS, names, strict=True)]
    items = sample(target.split("test"), limit)
    scores = {s.adapter: asdict(s) for s in evaluate(hub.model, mixes, [(target, items)])}
    zero, few, most = (scores[way]["value"] for way in ("zero", "shots", "all"))
    closed = (few - zero) / (most - zero) if most > zero else None
    return {"source": source.name, "target": target.name, "scores": scores, "closed": closed}


def show(found: dict[str, Any]) -> Table:
    """Return a row for each pair."""
    table = Table("source", "target", "chance", *WAYS, "closed", title=found["backbone"])
    for pair in found["pairs"]:
        scores = pair["scores"]
        cells = [f"{s['value']:.3f} [{s['low']:.2f}, {s['high']:.2f}]" for s in scores.values()]
        share = "" if pair["closed"] is None else f"{pair['closed']:.0%}"
        chance = f"{scores['zero']['backbone_value']:.3f}"
        table.add_row(pair["source"], pair["target"], chance, *cells, share)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pairs", nargs="*", default=PAIRS, help="source:target, by task name or path"
    )
    parser.add_argument("--backbone", default="multilingual-e5-small")
    parser.add_argument("--shots", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--limit", type=int, default=200, help="test items; 0 takes all")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    settings = {
        "max_steps": given.steps,
        "epochs": 1e6,
        "learning_rate": given.learning_rate,
        "row_length": given.row_length,
        "eval_examples": 60,
        "patience": 0,
    }
    config = read_settings(TrainConfig, settings, "the settings")
    hub = AdapterHub(given.backbone)
    pairs = [tuple(load_task(name) for name in pair.split(":")) for pair in given.pairs]
    with Bars(Console(stderr=True), show=not given.json) as bars:
        found = compare(
            hub, pairs, config, shots=given.shots, limit=given.limit, listeners=bars.listeners
        )
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(show(found))


if __name__ == "__main__":
    main()
