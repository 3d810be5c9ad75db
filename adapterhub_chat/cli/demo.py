"""`demo`: train three adapters jointly, measure them, swap them, and mix them in one batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.cli.options import (
    HubOptions,
    JsonOption,
    precision,
    with_backbone,
    with_engine,
)
from adapterhub_chat.cli.output import Bars, Notes, err, print_json, print_scores, print_table
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.task import Task, as_task
from adapterhub_chat.events import SILENT, Event, Listeners
from adapterhub_chat.training.job import make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import BACKBONE

DEMO_TASKS = ("qa", "generation", "sentiment")
DEMO_SETTINGS = {
    "train_examples": 1600,
    "max_steps": 60,
    "eval_every": 30,
    "eval_examples": 32,
    "patience": 0,
}
"""Upper limits; a slow machine takes fewer steps. The shipped adapters were trained much longer."""
MAX_TEST_EXAMPLES, MIN_TEST_EXAMPLES = 80, 8
MAX_SECONDS = 280.0
"""Time budget of the demo after the data are downloaded: less than five minutes."""
TIMING_SETTINGS = {"max_steps": 3, "max_minutes": 0, "train_examples": 200, "eval_examples": 0}
"""Settings of the first steps, which measure the time of a step."""
STEPS_AFTER_TRAINING, STEPS_FOR_ANSWERS = 40, 5
"""Time reserved for all that follows the training, and for the last answers alone, in training steps."""
PROMPTS = (
    ("qa", "What is the capital of France?"),
    ("generation", "Hey! I just got back from a long trip. How was your week?"),
    ("sentiment", "a warm, funny film that never loses its way"),
    (BACKBONE, "What is the capital of France?"),
)


@dataclass(frozen=True)
class Answer:
    """One row of the mixed batch."""

    adapter: str
    prompt: str
    output: str


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo."""

    manifests: dict[str, Manifest]
    swapped: tuple[Answer, ...]
    mixed_batch: tuple[Answer, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that `demo --json` prints."""
        adapters = {}
        for name, manifest in self.manifests.items():
            score = manifest.scores[0] if manifest.scores else None
            adapters[name] = {
                "task": manifest.training.tasks[0],
                "metric": manifest.metric,
                "score": score.value if score else None,
                "low": score.low if score else None,
                "high": score.high if score else None,
                "backbone_score": score.backbone_value if score else None,
                "n": score.n if score else 0,
                "steps": manifest.training.steps,
            }
        return {
            "adapters": adapters,
            "swapped": [asdict(a) for a in self.swapped],
            "mixed_batch": [asdict(a) for a in self.mixed_batch],
            "seconds": round(self.seconds, 1),
        }


def run_demo(
    hub: AdapterHub,
    *,
    listeners: Listeners = SILENT,
    settings: dict[str, Any] | None = None,
    tasks: Sequence[str | Path | Task] = DEMO_TASKS,
    seconds: float = MAX_SECONDS,
) -> DemoResult:
    """Train, measure, save, swap and mix adapters; they are saved to the hub's pool.

    It ends about `seconds` after the data are downloaded: the time of some first steps determines the length
    of the training and its schedule, and the time of the first test items determines their number. Ctrl-C
    during training saves the best weights so far and ends the demo.
    """
    chosen = [as_task(task) for task in tasks]
    for task in chosen:
        task.split("train")  # fetches the data
    started = time.monotonic()
    merged_settings = {**DEMO_SETTINGS, **(settings or {})}
    step = step_seconds(hub, chosen, merged_settings)
    seconds_left = seconds - (time.monotonic() - started)
    time_limit = {"max_minutes": max(step, seconds_left - STEPS_AFTER_TRAINING * step, 0.001) / 60}
    manifests = hub.train(
        chosen,
        how="joint",
        test_examples=0,
        listeners=listeners,
        **{**time_limit, **merged_settings},
    )
    if any(m.training.stopped == "interrupted" for m in manifests.values()):
        raise KeyboardInterrupt
    manifests = measure_adapters(
        hub, chosen, manifests, started + seconds - STEPS_FOR_ANSWERS * step, listeners
    )
    prompt = PROMPTS[0][1]
    swapped = []
    for name in (*manifests, BACKBONE):
        with hub.use(name):
            (text,) = hub.chat([_user_turn(prompt)], max_new_tokens=24, temperature=0)
        swapped.append(Answer(name, prompt, text))
    rows = [(name, prompt) for name, prompt in PROMPTS if name in manifests or name == BACKBONE]
    texts = hub.chat(
        [_user_turn(prompt) for _, prompt in rows],
        adapters=[name for name, _ in rows],
        max_new_tokens=32,
        temperature=0,
    )
    mixed = [Answer(name, prompt, text) for (name, prompt), text in zip(rows, texts, strict=True)]
    return DemoResult(manifests, tuple(swapped), tuple(mixed), time.monotonic() - started)


def step_seconds(hub: AdapterHub, tasks: Sequence[Task], settings: dict[str, Any]) -> float:
    """Return the mean seconds of a joint training step after the first; the trained weights are discarded."""
    config = TrainConfig(**{**settings, **TIMING_SETTINGS})
    jobs = [make_job(hub.backbone.tokenizer, task.name, task, config) for task in tasks]
    times = [time.monotonic()]

    def on_event(event: Event) -> None:
        if event.kind == "step" and event.adapter == jobs[0].name:
            times.append(time.monotonic())

    train(hub.model, jobs, on_event=on_event)
    first_step, *later_steps = [later - sooner for sooner, later in pairwise(times)] or [0.0]
    return sum(later_steps) / len(later_steps) if later_steps else first_step


def measure_adapters(
    hub: AdapterHub,
    tasks: Sequence[Task],
    manifests: Mapping[str, Manifest],
    end: float,
    listeners: Listeners,
) -> dict[str, Manifest]:
    """Measure each adapter on a few test items, then on as many as the time until `end` allows."""
    trained = [task for task in tasks if task.name in manifests]
    measured = dict(manifests)
    for number, task in enumerate(trained):
        limit = MIN_TEST_EXAMPLES
        while limit:
            began = time.monotonic()
            scores = hub.evaluate([task.name], [task], limit=limit, save=True, listeners=listeners)
            measured[task.name] = measured[task.name].with_scores(scores)
            now = time.monotonic()
            seconds_per_task = (end - now) / (len(trained) - number)
            num_affordable = min(MAX_TEST_EXAMPLES, int(limit * seconds_per_task / (now - began)))
            limit = num_affordable if num_affordable > limit == MIN_TEST_EXAMPLES else 0
    return measured


def _user_turn(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


DEMO_HUB = HubOptions(pool=Path("runs/demo"))


@with_backbone
@with_engine
def demo(hub_options: HubOptions = DEMO_HUB, as_json: JsonOption = False) -> None:
    """Train qa, generation and sentiment jointly, measure them, swap them, mix them in one batch."""
    notes = Notes(quiet=as_json)
    notes(
        "The main job, small: three adapters trained jointly on one frozen backbone. "
        "Five minutes at most; the adapters shipped in adapters/ had a larger budget."
    )
    hub = hub_options.open(notes)
    with Bars(err, show=not as_json) as bars:
        result = run_demo(hub, listeners=bars.listeners)
    if as_json:
        print_json({**result.as_json(), **precision(hub)})
        return
    scores = [s for m in result.manifests.values() for s in m.scores]
    print_scores("Trained jointly, measured on held-out items", scores)
    for title, rows in (
        ("Hot swap: one question, one adapter after another", result.swapped),
        ("One mixed batch: four rows, four skills, one forward", result.mixed_batch),
    ):
        columns = ("adapter", "prompt", "output")
        print_table(title, columns, [(row.adapter, row.prompt, row.output) for row in rows])
    first = next(iter(result.manifests), BACKBONE)
    typer.echo(
        f"Done in {result.seconds:.0f} s. The adapters are in {hub_options.pool}; talk to one:"
    )
    typer.echo(f"  adapterhub-chat chat --pool {hub_options.pool} --adapter {first}")
