"""Do tasks help or harm each other? Each task alone, all in one adapter, and shared + own, in one run.

    python scripts/compare_multitask.py                       # qa, generation, sentiment
    python scripts/compare_multitask.py sentiment my.toml --steps 200 --json

alone: an adapter for each task. joint: one adapter for all tasks. shared: an adapter under all of them, and
a smaller one for each task beside it. All are trained in one run on one backbone, with the same rows and
steps for each task, and scored on the same test items. Where `joint` or `shared` lies below `alone`, the
tasks interfere; the cosine between their gradients on the shared adapter says which ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
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
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import as_mix
from adapterhub_chat.validation import read_settings

WAYS = ("alone", "joint", "shared")


def compare(
    hub: AdapterHub,
    tasks: Sequence[Task],
    config: TrainConfig,
    *,
    test_examples: int = 200,
    listeners: Listeners = SILENT,
) -> dict[str, Any]:
    """Return each task's scores by way, and the cosines of the gradients on the shared adapter."""
    jobs = [make_job(hub.backbone.tokenizer, task.name, task, config) for task in tasks]
    learnt = train(
        hub.model, [*jobs, joint_job(jobs), *shared_jobs(jobs)], on_event=listeners.on_event
    )
    for name, done in learnt.items():
        hub.model.load(name, done.weights)
    scores = []
    for task in tasks:
        items = sample(task.split("test"), test_examples)
        mixes = {
            "alone": as_mix(task.name),
            "joint": as_mix("joint"),
            "shared": as_mix({"shared": 1.0, f"{task.name} beside shared": 1.0}),
        }
        scores += evaluate(hub.model, list(mixes.items()), [(task, items)])
    return {
        "scores": [asdict(score) for score in scores],
        "cosines": dict(learnt["shared"].conflict),
        "settings": config.model_dump(),
    }


def joint_job(jobs: Sequence[Job]) -> Job:
    """Return the job of one adapter on all examples, with everybody's rows in each step."""
    examples = [example for job in jobs for example in job.train]
    random.Random(0).shuffle(examples)
    rows = sum(job.config.rows_per_step for job in jobs)
    config = jobs[0].config.model_copy(update={"rows_per_step": rows})
    return Job("joint", examples, [e for job in jobs for e in job.validation], config)


def shared_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of a shared adapter and one of half the rank beside it for each task."""
    rank = max(1, jobs[0].config.rank // 2)
    own = jobs[0].config.model_copy(update={"rank": rank, "alpha": jobs[0].config.alpha / 2})
    beside = [replace(j, name=f"{j.name} beside shared", config=own, shared="shared") for j in jobs]
    return [*beside, Job("shared", (), (), own)]


def table_of(found: dict[str, Any]) -> Table:
    """Return the comparison for a person."""
    table = Table(title="One task or several: scores on the same test items")
    for column in ("task", "metric", "n", "backbone", *WAYS):
        table.add_column(column)
    rows = {s["task"]: s for s in found["scores"]}
    for task, first in rows.items():
        own = {s["adapter"]: s for s in found["scores"] if s["task"] == task}
        cells = [
            f"{own[w]['value']:.3f} \\[{own[w]['low']:.3f}, {own[w]['high']:.3f}]" for w in WAYS
        ]
        beside = f"{first['backbone_value']:.3f}"
        table.add_row(task, first["metric"], str(first["n"]), beside, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=["qa", "generation", "sentiment"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test-examples", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    settings = {
        "max_steps": options.steps,
        "epochs": 1e6,
        "patience": 0,
        "train_examples": 4000,
        "eval_examples": 48,
    }
    with Bars(Console(stderr=True), show=not options.json) as bars:
        found = compare(
            AdapterHub(options.backbone),
            [load_task(task) for task in options.tasks],
            read_settings(TrainConfig, settings, "the command line"),
            test_examples=options.test_examples,
            listeners=bars.listeners,
        )
    if options.json:
        print(json.dumps(found, indent=2))
        return
    Console().print(table_of(found))
    for pair, cosine in found["cosines"].items():
        print(f"cosine of gradients, {pair.replace('|', ' and ')}: {cosine:+.3f}")


if __name__ == "__main__":
    main()
