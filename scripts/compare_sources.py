"""Which adapter is the best source? What is estimated before training, beside what training gives.

    python scripts/compare_sources.py                       # the shipped adapters and those of a pool
    python scripts/compare_sources.py --targets sentiment-airline sentiment-long --pool my-pool

The sources are the adapters that ship and those of a pool (such as scripts/transfer.py leaves), except those
of the target itself. Each is fine-tuned on the same few labelled examples of the target and measured on test
examples. An estimate is good where it puts the sources into the same order (Spearman's correlation).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from adapterhub_chat import AdapterHub
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.evaluation.scoring import Judged, judge, score
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.stored import read_stored
from adapterhub_chat.training.loop import train
from adapterhub_chat.transfer.methods import few_shot_jobs
from adapterhub_chat.transfer.setting import make_problem
from adapterhub_chat.transfer.spec import transfer_config
from adapterhub_chat.types import as_mix

SHIPPED = Path(__file__).parent.parent / "adapters"


def compare(hub: AdapterHub, target: Task, shots: int, steps: int, limit: int) -> dict[str, Any]:
    """Return each source's estimates, its value after training, and how the orders agree."""
    paths = {name: SHIPPED / name for name in Pool(SHIPPED).names()}
    paths |= {name: hub.pool.path(name) for name in hub.pool.names()}
    own = {n: path for n, path in paths.items() if not n.startswith(f"{target.name}-")}
    names = {hub.load(path): path for path in own.values()}
    after = _after(hub, names, target, shots, steps, limit)
    ranked = hub.rank_sources(target, list(names), limit=100)
    estimates = {
        "LogME": {one.adapter: one.logme for one in ranked},
        "LEEP": {one.adapter: one.leep for one in ranked},
        "A-distance": {o.adapter: -o.distance for o in ranked if o.distance is not None},
    }
    agree = {how: _spearman(values, after) for how, values in estimates.items() if len(values) > 2}
    return {"target": target.name, "after": after, "estimates": estimates, "spearman": agree}


def _spearman(estimates: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the rank correlation of two values by the same names; NaN if one is constant."""
    names = list(estimates)
    return float(spearmanr([estimates[n] for n in names], [after[n] for n in names]).statistic)


def _after(
    hub: AdapterHub, names: Mapping[str, Path], target: Task, shots: int, steps: int, limit: int
) -> dict[str, float]:
    """Return the value on test items after a warm start from each source, all trained together."""
    config = transfer_config(
        {"max_steps": steps, "rows_per_step": 1, "eval_every": steps, "train_examples": shots}
    )
    jobs = []
    for name, path in names.items():
        problem = make_problem(read_stored(path, name).weights, target, target, shots, config)
        shot_jobs = few_shot_jobs(hub.backbone.tokenizer, problem, ["finetune"])
        jobs += [replace(job, name=name) for job in shot_jobs if job.name == "finetune"]
    items, values = sample(target.split("test"), limit), {}
    for name, done in train(hub.model, jobs).items():
        hub.model.load("tested", done.weights)
        rows = judge(hub.model, target, items, as_mix("tested")).rows
        values[name] = score(name, target, Judged(rows), None).value
    return values


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a target's sources, the best after training first."""
    estimates = found["estimates"]
    agree = ", ".join(f"{how} {value:.2f}" for how, value in found["spearman"].items())
    table = Table("source", "after training", *estimates, title=f"{found['target']}: {agree}")
    for name in sorted(found["after"], key=found["after"].__getitem__, reverse=True):
        told = (values.get(name) for values in estimates.values())
        cells = ("" if value is None else f"{abs(value):.3f}" for value in told)
        table.add_row(name, f"{found['after'][name]:.3f}", *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["sentiment-airline"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", type=Path, default=Path("transfer-pool/smollm2-135m"))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=100, help="test items")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    hub = AdapterHub(given.backbone, given.pool)
    size = (given.shots, given.steps, given.limit)
    found = [compare(hub, load_task(target), *size) for target in given.targets]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for one in found:
        show(one, Console(width=120))


if __name__ == "__main__":
    main()
