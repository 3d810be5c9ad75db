"""Is learning here as good as the reference? Train each task here and with plain `peft`, then compare.

    python scripts/compare_peft.py                        # qa, generation, sentiment: 60 steps each
    python scripts/compare_peft.py --dtype bf16 --json

Here all tasks are trained jointly, in one run. The reference is `peft` and a plain torch loop, a task at
a time: the same initial weights, the same examples in the same steps (one example a row, padded), AdamW,
schedule and clipping. One judge scores both on the same test items, the PEFT adapter after a detour over
its own saved folder. In fp32, the default, both end with the same numbers; in bf16 they round differently
(PEFT computes the update in fp32, this project in bf16 from fp32 numbers), and a run carries it on. Exit
code 0 only if every task's score lies within one point of PEFT's (0.01; for a perplexity one percent) or
the paired 95 % interval of the difference holds zero.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub, Mix
from adapterhub_chat.artifact.folder import read_folder
from adapterhub_chat.bench.train import padded
from adapterhub_chat.cli.output import Bars
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.metrics import METRICS, Rows, bootstrap_interval, paired_difference
from adapterhub_chat.data.packing import epochs
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.lora.sites import select_targets
from adapterhub_chat.lora.weights import AdapterWeights, initial_weights
from adapterhub_chat.model.backbone import Backbone, load_backbone
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.learner import schedule, total_steps
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import as_mix
from adapterhub_chat.validation import read_settings

TASKS = ("qa", "generation", "sentiment")
POINT = 0.01


@dataclass(frozen=True)
class Measured:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One task: both ways of learning it, measured on the same items."""

    task: str
    metric: str
    n: int
    backbone: float
    here: Measured
    peft: Measured
    difference: Measured
    """Here minus PEFT, with its paired interval."""
    verdict: str
    weights_difference: float
    """|here - PEFT| / |PEFT| over all numbers of the adapter, in Frobenius norms."""
    largest_difference: float
    """The same of that factor (an A or a B) in which they differ most."""
    peft_seconds: float


@dataclass(frozen=True)
class Comparison:
    """What the script prints."""

    backbone: str
    dtype: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    here_seconds: float
    peft_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every task is learnt as well here as with PEFT."""
        return all(row.verdict != "apart" for row in self.rows)


def compare(
    backbone: str,
    tasks: Sequence[Task],
    config: TrainConfig,
    *,
    test_examples: int = 200,
    dtype: str | None = None,
    listeners: Listeners = SILENT,
) -> Comparison:
    """Train every task here (jointly) and with PEFT (alone), score both, and set them side by side."""
    with TemporaryDirectory() as scratch:
        hub = AdapterHub(backbone, Path(scratch, "pool"), dtype=dtype)
        plain = load_backbone(backbone, dtype=dtype)
        jobs = [make_job(hub.backbone.tokenizer, task.name, task, config) for task in tasks]
        started = time.perf_counter()
        learnt = train(hub.model, jobs, on_event=listeners.on_event)
        here_seconds = time.perf_counter() - started
        rows = []
        for task, job in zip(tasks, jobs, strict=True):
            folder = Path(scratch, task.name)
            started = time.perf_counter()
            train_with_peft(plain, job, first_weights(hub, config), folder)
            seconds = time.perf_counter() - started
            hub.model.load("here", learnt[task.name].weights)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "unverified", as every folder of plain PEFT is
                hub.load(folder, name="peft")
            judged = judge_both(hub, task, test_examples, listeners)
            far = differences(learnt[task.name].weights, read_folder(folder)[0])
            rows.append(row_of(task, *judged, far, seconds))
    return Comparison(
        backbone=backbone,
        dtype=str(plain.dtype).removeprefix("torch."),
        settings=config.model_dump(),
        rows=tuple(rows),
        here_seconds=here_seconds,
        peft_seconds=sum(row.peft_seconds for row in rows),
    )


def first_weights(hub: AdapterHub, config: TrainConfig) -> AdapterWeights:
    """Return the weights that an adapter starts from here."""
    return initial_weights(
        select_targets(hub.model.shapes, config.targets),
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        seed=config.seed,
    )


def train_with_peft(backbone: Backbone, job: Job, start: AdapterWeights, folder: Path) -> None:
    """Train a job's adapter as a user of PEFT would, from `start`, and save it to `folder`.

    `backbone.model` is transformers' own model; it is given back as it was.
    """
    config, targets = job.config, job.config.targets
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        target_modules=targets if targets == "all-linear" else targets.split(","),
    )
    model = get_peft_model(backbone.model, lora)
    set_factors(model, start)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    steps = total_steps([job], config)
    stream = epochs(
        job.train, num_rows=config.rows_per_step, length=config.row_length, seed=config.seed
    )
    for step in range(steps):
        examples = [example for row in next(stream) for example in row]
        batch = padded(examples, backbone.tokenizer.pad_token_id)
        loss = model(**{name: tensor.to(backbone.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step / steps, 1 / steps, config)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    model.unload().eval()


def set_factors(model: Any, start: AdapterWeights) -> None:
    """Put the factors into a PEFT model; both must carry adapters at the same layers."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert layers.keys() == start.factors.keys(), "PEFT chose other layers"
    with torch.no_grad():
        for name, (a, b) in start.factors.items():
            layers[name].lora_A["default"].weight.copy_(a)
            layers[name].lora_B["default"].weight.copy_(b)


def judge_both(
    hub: AdapterHub, task: Task, test_examples: int, listeners: Listeners
) -> tuple[Rows, Rows, Rows]:
    """Return the per-item numbers of the backbone, of `here` and of `peft` on the same items."""
    items = sample(task.split("test"), test_examples)
    bare, here, peft = (
        judge(hub.model, task, items, mix, lambda n: listeners.on_judged(task.name, n)).rows
        for mix in (Mix(), as_mix("here"), as_mix("peft"))
    )
    return bare, here, peft


def row_of(
    task: Task, bare: Rows, here: Rows, peft: Rows, far: tuple[float, float], seconds: float
) -> Row:
    """Return the table's row, with the paired bootstrap of the difference (same items resampled)."""
    metric = METRICS[task.metric]

    def measured(rows: Rows) -> Measured:
        return Measured(metric.aggregate(rows), *bootstrap_interval(rows, metric.statistic))

    theirs = measured(peft)
    difference = Measured(*paired_difference(here, peft, metric.statistic))
    point = POINT * theirs.value if metric.kind == "likelihood" else POINT
    verdict = "apart"
    if abs(difference.value) <= point:
        verdict = "within 1 point"
    elif difference.low <= 0 <= difference.high:
        verdict = "inside the interval"
    return Row(
        task=task.name,
        metric=metric.name,
        n=len(here),
        backbone=metric.aggregate(bare),
        here=measured(here),
        peft=theirs,
        difference=difference,
        verdict=verdict,
        weights_difference=far[0],
        largest_difference=far[1],
        peft_seconds=seconds,
    )


def differences(here: AdapterWeights, peft: AdapterWeights) -> tuple[float, float]:
    """Return |here - peft| / |peft| over all numbers, and that of the factor which differs most."""
    pairs = [p for m in peft.factors for p in zip(here.factors[m], peft.factors[m], strict=True)]
    apart = torch.stack([(mine - its).norm() for mine, its in pairs])
    size = torch.stack([its.norm() for _, its in pairs]).clamp(min=1e-12)
    return float(apart.norm() / size.norm()), float((apart / size).max())


def table_of(comparison: Comparison) -> Table:
    """Return the comparison for a person."""
    table = Table(title=f"Learnt here (jointly) and with PEFT (alone), {comparison.dtype}")
    for column in ("task", "metric", "n", "backbone", "here", "PEFT", "difference", "verdict"):
        table.add_column(column)
    table.add_column("weights differ by")
    for row in comparison.rows:
        cells = [
            f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]"
            for m in (row.here, row.peft, row.difference)
        ]
        table.add_row(
            *(row.task, row.metric, str(row.n), f"{row.backbone:.3f}"),
            *(cell.replace("[", r"\[") for cell in cells),
            *(row.verdict, f"{row.weights_difference:.1e}"),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = read_settings(TrainConfig, {}, "defaults")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=defaults.rows_per_step, help="rows in a step")
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--train-examples", type=int, default=4000)
    parser.add_argument("--test-examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32", help="of the backbone in training and judging")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    settings = {
        "rank": options.rank,
        "learning_rate": options.learning_rate,
        "rows_per_step": options.rows,
        "train_examples": options.train_examples,
        "seed": options.seed,
        "max_steps": options.steps,
        "epochs": 1e6,  # the steps decide
        "eval_examples": 0,  # the last weights count, as in a plain loop
    }
    with Bars(Console(stderr=True), show=not options.json) as bars:
        found = compare(
            options.backbone,
            [load_task(task) for task in options.tasks],
            read_settings(TrainConfig, settings, "the command line"),
            test_examples=options.test_examples,
            dtype=options.dtype,
            listeners=bars.listeners,
        )
    if options.json:
        print(json.dumps({**asdict(found), "ok": found.ok}, indent=2))
    else:
        Console().print(table_of(found))
        print(
            f"training took {found.here_seconds:.0f} s here, {found.peft_seconds:.0f} s with PEFT"
        )
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
