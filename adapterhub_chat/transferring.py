"""A transfer as it is asked for: from names to an adapter in the pool with its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from adapterhub_chat.config import TrainConfig, read_settings
from adapterhub_chat.errors import UsageError
from adapterhub_chat.manifest import Manifest, Training, TransferReport
from adapterhub_chat.pool import Stored, check_name
from adapterhub_chat.prototypes import learn_routing
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task, load_task
from adapterhub_chat.transfer.methods import make_setting
from adapterhub_chat.transfer.run import Candidate, Outcome, transfer
from adapterhub_chat.types import as_mix
from adapterhub_chat.workshop import Listeners, judge_task

BUDGET: Mapping[str, Any] = {
    "max_steps": 60,
    "epochs": 1000.0,
    "train_examples": 400,
    "eval_examples": 200,
    "patience": 0,
}
"""Settings of every method where none are given: so many steps, and as much to judge by."""


def transfer_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the budget of every method: BUDGET under the given fields of TrainConfig."""
    return read_settings(TrainConfig, {**BUDGET, **settings}, "the transfer")


@dataclass(frozen=True)
class TransferOrder:
    """What is asked for."""

    source: str
    target: Task
    method: str = "auto"
    name: str | None = None
    shots: int = 16
    source_task: Task | None = None
    config: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Transferred:
    """What came of it."""

    manifest: Manifest | None
    """Of the new adapter; None when nothing is better than the bare backbone."""
    outcome: Outcome


def make_transfer(shelf: Shelf, order: TransferOrder, listeners: Listeners) -> Transferred:
    """Train, judge, choose, keep and measure; see AdapterHub.transfer."""
    name = check_name(order.name or f"{order.target.name}-from-{order.source}")
    stored = shelf.find(order.source)
    task = order.source_task or _task_of(stored)
    shelf.pool.check_writable()
    setting = make_setting(stored.weights, task, order.target, order.shots, order.config)
    outcome = transfer(shelf.model, setting, order.method, on_event=listeners.on_event)
    chosen = outcome.candidates[outcome.chosen]
    if chosen.weights is None:
        return Transferred(None, outcome)
    manifest = shelf.keep(chosen.weights, _manifest(shelf, order, name, stored, outcome, chosen))
    scores = judge_task(shelf.model, order.target, [(name, as_mix(name))], 0, listeners)
    shelf.describe(name, manifest := manifest.with_scores(scores))
    return Transferred(manifest, outcome)


def _task_of(stored: Stored) -> Task:
    """Return the task that a source adapter was trained on."""
    tasks = stored.manifest.training.tasks if stored.manifest else ()
    if len(tasks) != 1:
        raise UsageError(
            f"adapter {stored.name!r} does not say which one task it learnt; name it: source_task=..., "
            "--source-task"
        )
    return load_task(tasks[0])


def _manifest(
    shelf: Shelf,
    order: TransferOrder,
    name: str,
    stored: Stored,
    outcome: Outcome,
    chosen: Candidate,
) -> Manifest:
    target, backbone = order.target, shelf.model.backbone
    sha256 = stored.manifest.sha256 if stored.manifest else ""
    weighting = outcome.weighting if outcome.chosen == "maxent" else None
    return Manifest(
        name=name,
        about=target.about,
        language=target.language,
        licence=target.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        contract=target.contract,
        metric=target.metric,
        training=Training(
            how="transfer",
            tasks=(target.name,),
            data_sha256=(target.data_hash(),),
            sources=target.sources,
            parents=(sha256,) if sha256 and outcome.chosen != "target" else (),
            settings=order.config.model_dump(),
            steps=chosen.steps,
            best_step=chosen.steps,
            seconds=round(outcome.seconds, 1),
        ),
        routing=learn_routing(shelf, [target]),
        transfer=TransferReport(
            source=order.source,
            source_sha256=sha256,
            method=outcome.chosen,
            shots=order.shots,
            baseline=outcome.baseline,
            verdict=chosen.verdict.word,
            gain=chosen.verdict.gain,
            low=chosen.verdict.low,
            high=chosen.verdict.high,
            values={n: c.value for n, c in outcome.candidates.items()},
            verdicts={n: c.verdict.word for n, c in outcome.candidates.items()},
            effective=weighting.effective if weighting else None,
            lam=weighting.lam if weighting else None,
            seconds=round(outcome.seconds, 1),
        ),
    )
