"""What do merges keep? Merge adapters by every method here and by PEFT's, and score all on the same items.

    python scripts/compare_merge.py                      # the shipped qa, generation, sentiment
    python scripts/compare_merge.py --limit 100 --json
    python scripts/compare_merge.py --adapters qa sentiment --methods svd ties regmean

Every method gets the same sources, rank, weights and density; what PEFT's `add_weighted_adapter` makes of
them is taken out of its model as numbers and judged by the same judge. "kept" is merged / alone on a source's
own task (alone / merged for a perplexity); the first rows are each source's own adapter, chosen row by row,
and the run-time mix. `cat` keeps the ranks of all sources on both sides, so it is larger than the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub, Mix
from adapterhub_chat.cli.output import Bars
from adapterhub_chat.data.task import load_task
from adapterhub_chat.evaluation.retention import (
    SourceResult,
    mean_and_lowest,
    retention,
    retentions,
    source_results,
)
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.merge.combine import default_weights, merge, modules_of
from adapterhub_chat.merge.methods import METHODS, Method
from adapterhub_chat.merge.moments import InputMoments
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import Retention, as_mix

SOURCES = ("qa", "generation", "sentiment")
PEFT_KINDS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
MERGED = "merged"
WIDTH = 180
"""Of the table, where it is not printed to a terminal."""


@dataclass(frozen=True)
class Row:
    """One way to have several skills, measured on the items of each source's task."""

    who: str
    method: str
    rank: int
    seconds: float
    energy: float | None
    mean: float
    lowest: float
    retention: tuple[Retention, ...]


def compare(
    backbone: str,
    pool: Path,
    names: Sequence[str],
    *,
    limit: int,
    density: float,
    seed: int,
    methods: Sequence[str] = (),
    listeners: Listeners = SILENT,
) -> list[Row]:
    """Return a row for every way: apart, mixed, merged here, merged by PEFT; `methods` none: by all."""
    hub = AdapterHub(backbone, pool)  # it only reads the pool
    sources = [hub.pool.load(hub.load(name)) for name in names]
    tasks = {
        source.name: [load_task(task) for task in source.manifest.training.tasks]
        for source in sources
        if source.manifest
    }
    weights = [source.weights for source in sources]
    moments = InputMoments(hub.model, tasks, modules_of(weights))
    told = listeners.on_judged
    sticks = source_results(hub.model, tasks, "test", limit, told)
    rank = max(own.max_rank for own in weights)
    even = Mix(tuple((name, 1 / len(names)) for name in names))

    def row(
        who: str, method: str, rank: int, seconds: float, energy: float | None, mix: Mix
    ) -> Row:
        found = apart(sticks) if who == "apart" else retentions(hub.model, sticks, mix, told)
        mean, lowest = mean_and_lowest(found)
        return Row(who, method, rank, round(seconds, 2), energy, mean, lowest, tuple(found))

    rows = [
        row("apart", "one adapter a row", rank, 0, None, Mix()),
        row("mix", "even", rank, 0, None, even),
    ]
    for method in (METHODS[name] for name in METHODS if not methods or name in methods):
        share = None if method.density is None else density
        wanted = None if method.ranks == "joined" else rank
        work = partial(merge, method=method.name, rank=wanted, density=share, seed=seed)
        made, seconds = timed(partial(work, weights, moments=moments))
        hub.model.load(MERGED, made.weights)
        energy = made.report.energy
        rows.append(
            row("here", method.name, made.weights.max_rank, seconds, energy, as_mix(MERGED))
        )
    for kind, made_there, seconds in peft_merges(
        backbone, pool, names, rank, density, seed, methods
    ):
        hub.model.load(MERGED, made_there)
        rows.append(row("peft", kind, made_there.max_rank, seconds, None, as_mix(MERGED)))
    return rows


def apart(sticks: Sequence[SourceResult]) -> list[Retention]:
    """Return what is kept where every row has its own adapter: everything."""
    return [retention(stick, stick.rows) for stick in sticks]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` gives, and the seconds that it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def peft_merges(
    backbone: str,
    pool: Path,
    names: Sequence[str],
    rank: int,
    density: float,
    seed: int,
    methods: Sequence[str] = (),
) -> Iterator[tuple[str, AdapterWeights, float]]:
    """Yield (kind, weights, seconds) of every merge that PEFT knows."""
    base = load_backbone(backbone).model
    model: Any = PeftModel.from_pretrained(base, pool / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(pool / name, adapter_name=name)
    for kind in (kind for kind in PEFT_KINDS if not methods or kind in methods):
        method: Method = METHODS[kind.removesuffix("_svd")]
        options: dict[str, Any] = {} if method.density is None else {"density": density}
        if "svd" in kind:
            options |= {"svd_rank": rank, "svd_full_matrices": False}
        given = default_weights(method, len(names))
        add = partial(model.add_weighted_adapter, list(names), given, MERGED, kind, **options)
        torch.manual_seed(seed)  # PEFT drops by the global generator
        seconds = timed(add)[1]
        yield kind, taken(model), seconds
        model.delete_adapter(MERGED)


def taken(model: Any) -> AdapterWeights:
    """Return the merged adapter's numbers out of a PEFT model."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and MERGED in module.lora_A
    }
    factors = {
        name: tuple(
            part[MERGED].weight.detach().float().clone() for part in (layer.lora_A, layer.lora_B)
        )
        for name, layer in layers.items()
    }
    alphas = {name: layer.scaling[MERGED] * layer.r[MERGED] for name, layer in layers.items()}
    return AdapterWeights(factors, alphas)


def table_of(rows: Sequence[Row]) -> Table:
    """Return the comparison for a person."""
    table = Table(title="What is kept of each source's score")
    for column in ("", "method", "rank", "mean", "lowest"):
        table.add_column(column)
    for one in rows[0].retention:
        table.add_column(f"{one.task} ({one.metric}, alone {one.single:.3f})")
    table.add_column("seconds")
    for row in rows:
        cells = [
            f"{r.merged:.3f}: {r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for r in row.retention
        ]
        head = (row.who, row.method, str(row.rank), f"{row.mean:.3f}", f"{row.lowest:.3f}")
        table.add_row(*head, *cells, f"{row.seconds:.1f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(SOURCES))
    parser.add_argument("--limit", type=int, default=100, help="test items per task; 0 takes all")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        choices=[*METHODS, *PEFT_KINDS],
        metavar="M",
        help="of both libraries; default: all",
    )
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", type=Path, default=Path("adapters"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with Bars(Console(stderr=True), show=not options.json) as bars:
        rows = compare(
            options.backbone,
            options.pool,
            options.adapters,
            limit=options.limit,
            density=options.density,
            seed=options.seed,
            methods=options.methods,
            listeners=bars.listeners,
        )
    if options.json:
        print(json.dumps({"limit": options.limit, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        wide = None if sys.stdout.isatty() else WIDTH
        Console(width=wide).print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
