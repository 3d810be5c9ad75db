"""Is maximum entropy as good a reweighting as the classical ones? All on the same features and splits.

    pip install 'adapterhub-chat[compare]'
    python scripts/compare_reweighting.py                       # films -> airline tweets
    python scripts/compare_reweighting.py --source sentiment-short --target sentiment-long --json

Features are the frozen backbone's, mean-pooled over the prompt, along the source's widest directions. Every
way weighs the labelled source by the target's unlabelled examples alone; the same logistic regression learns
from the weighted source and is judged on the target's labelled test examples. The interval is that of the
paired difference to the best of the library's ways, over the items of all seeds.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skada import DensityReweightAdapter, KLIEPReweightAdapter, KMMReweightAdapter
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from adapterhub_chat.bench.harness import machine
from adapterhub_chat.data.metrics import METRICS, paired_difference
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.features import features
from adapterhub_chat.transfer.maxent import balanced, principal
from adapterhub_chat.types import Mix

OWN, PLAIN = "max-entropy", "unweighted"
LIBRARY: dict[str, Callable[[float], Any]] = {
    "KLIEP": lambda gamma: KLIEPReweightAdapter(gamma=gamma, random_state=0),
    "KMM": lambda gamma: KMMReweightAdapter(gamma=gamma),
    "density": lambda _: DensityReweightAdapter(),
}


@dataclass(frozen=True)
class Row:
    """One way to weigh the source, judged on the target's test items of all seeds."""

    way: str
    accuracy: float
    effective: float
    seconds: float


def compare(
    backbone: str, source: str, target: str, *, size: int, directions: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the table and our difference to the best of the library's."""
    model = AdapterModel(load_backbone(backbone))
    right: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for seed in seeds:
        xs, ys = numbers(model, load_task(source), "train", size, seed)
        xt, _ = numbers(model, load_task(target), "train", size, seed)
        test, wanted = numbers(model, load_task(target), "test", size, seed)
        flat, goal = principal(xs, xt, directions)
        _, judged = principal(xs, test, directions)
        scale = flat.std(0)
        parts = [(part / scale).numpy() for part in (flat, goal, judged)]
        for way in (PLAIN, *LIBRARY, OWN):
            started = time.perf_counter()
            weights = weigh(way, parts[0], parts[1])
            seconds[way] = seconds.get(way, 0.0) + time.perf_counter() - started
            head = LogisticRegression(max_iter=2000).fit(parts[0], ys, sample_weight=weights)
            right.setdefault(way, []).extend((head.predict(parts[2]) == wanted).astype(float))
            share = weights.sum() ** 2 / (weights**2).sum() / len(weights)
            shares.setdefault(way, []).append(float(share))
    rows = [
        Row(way, float(np.mean(right[way])), float(np.mean(shares[way])), seconds[way])
        for way in right
    ]
    best = max(LIBRARY, key=lambda way: np.mean(right[way]))
    statistic = METRICS["accuracy"].statistic
    pairs = [[[value, 1.0] for value in right[way]] for way in (OWN, best)]
    gain, low, high = paired_difference(*pairs, statistic)
    return {
        "machine": machine(),
        "settings": {"backbone": backbone, "source": source, "target": target, "size": size,
                     "directions": directions, "seeds": list(seeds)},
        "rows": [asdict(row) for row in rows],
        "best_of_library": best,
        "gain": {"value": gain, "low": low, "high": high},
        "held": high >= 0,
    }  # fmt: skip


def numbers(
    model: AdapterModel, task: Task, split: str, size: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Return features (n, hidden) and labels of `size` examples of a split."""
    examples = sample(task.split(split), size, seed)
    found = features(model, task.contract, examples, Mix())
    return found.double(), np.array([e.answer for e in examples])


def weigh(way: str, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return a weight for each source example, of mean 1."""
    if way == PLAIN:
        return np.ones(len(source))
    if way == OWN:
        found = balanced(torch.tensor(source), torch.tensor(target))
        return found.weights.numpy()
    both = np.concatenate([source, target])
    domain = np.array([1] * len(source) + [-2] * len(target))  # skada: targets are negative
    labels = np.array([n % 2 for n in range(len(source))] + [-1] * len(target))  # not looked at
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = LIBRARY[way](1 / source.shape[1])
        _, given = adapter.fit_transform(both, labels, sample_domain=domain)
    weights = np.asarray(given["sample_weight"])[: len(source)]
    return weights / weights.mean()


def show(found: dict[str, Any]) -> None:
    table = Table(title="Weighing a source by unlabelled target examples")
    for column in ("way", "accuracy", "effective size", "seconds"):
        table.add_column(column)
    for row in found["rows"]:
        numbers = (f"{row['accuracy']:.3f}", f"{row['effective']:.0%}", f"{row['seconds']:.2f}")
        table.add_row(row["way"], *numbers)
    console, gain = Console(), found["gain"]
    console.print(table)
    console.print(
        f"{OWN} over {found['best_of_library']}, the library's best here: {gain['value']:+.3f} "
        f"[{gain['low']:+.3f}, {gain['high']:+.3f}]; not below it beyond the interval: {found['held']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--source", default="sentiment-short")
    parser.add_argument("--target", default="sentiment-airline")
    parser.add_argument("--size", type=int, default=500, help="examples of each kind and seed")
    parser.add_argument("--directions", type=int, default=32, help="of the features")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found = compare(
        given.backbone, given.source, given.target,
        size=given.size, directions=given.directions, seeds=given.seeds,
    )  # fmt: skip
    print(json.dumps(found, indent=2)) if given.json else show(found)


if __name__ == "__main__":
    main()
