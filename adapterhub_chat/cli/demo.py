"""The main job in one call: train three adapters jointly, judge them, swap them, mix them in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.cli.options import (
    BackboneOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PoolOption,
    Where,
    precision,
)
from adapterhub_chat.cli.output import Bars, Say, err, print_json, print_scores, print_table
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.types import BACKBONE

TASKS = ("qa", "generation", "sentiment")
SETTINGS = {
    "train_examples": 1600,
    "max_steps": 60,
    "max_minutes": 4.5,
    "eval_every": 30,
    "eval_examples": 32,
    "patience": 0,
}
"""A few minutes on two cores; the shipped adapters had far more."""
TEST_EXAMPLES = 80
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
    """What the demo measured."""

    manifests: dict[str, Manifest]
    swapped: tuple[Answer, ...]
    mixed_batch: tuple[Answer, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the plain form that `demo --json` prints."""
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
    tasks: Sequence[str] = TASKS,
) -> DemoResult:
    """Train, judge, save, swap and mix; everything lands in the hub's pool.

    Ctrl-C in training saves what was best and ends the demo.
    """
    started = time.monotonic()
    manifests = hub.train(
        tasks,
        how="joint",
        test_examples=TEST_EXAMPLES,
        listeners=listeners,
        **{**SETTINGS, **(settings or {})},
    )
    if any(m.training.stopped == "interrupted" for m in manifests.values()):
        raise KeyboardInterrupt
    question = PROMPTS[0][1]
    swapped = []
    for name in (*manifests, BACKBONE):
        with hub.use(name):
            (text,) = hub.chat([_asked(question)], max_new_tokens=24, temperature=0)
        swapped.append(Answer(name, question, text))
    rows = [(name, prompt) for name, prompt in PROMPTS if name in manifests or name == BACKBONE]
    texts = hub.chat(
        [_asked(prompt) for _, prompt in rows],
        adapters=[name for name, _ in rows],
        max_new_tokens=32,
        temperature=0,
    )
    mixed = [Answer(name, prompt, text) for (name, prompt), text in zip(rows, texts, strict=True)]
    return DemoResult(manifests, tuple(swapped), tuple(mixed), time.monotonic() - started)


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def demo(
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("runs/demo"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train qa, generation and sentiment jointly, judge them, swap them, mix them in one batch."""
    say = Say(quiet=as_json)
    say(
        "The main job, small: three adapters trained jointly on one frozen backbone. "
        "A few minutes of training; the adapters shipped in adapters/ had a larger budget."
    )
    hub = Where(backbone, pool, None, dtype, device).open(say)
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
    typer.echo(f"Done in {result.seconds:.0f} s. The adapters are in {pool}; talk to one:")
    typer.echo(f"  adapterhub-chat chat --pool {pool} --adapter {first}")
