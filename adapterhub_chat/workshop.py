"""Workshop: a training run from tasks to measured adapters in the pool."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.backbone import load_backbone
from adapterhub_chat.checkpoint import Checkpoints
from adapterhub_chat.config import RunOptions, TrainConfig, read_settings
from adapterhub_chat.courses import Candidate, Course, Made
from adapterhub_chat.errors import AdapterError, ConfigError, DataError, UsageError
from adapterhub_chat.evaluate import evaluate
from adapterhub_chat.jobs import make_job, sample
from adapterhub_chat.manifest import Manifest, manifest_of
from adapterhub_chat.metrics import METRICS
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pictures import draw_ledger
from adapterhub_chat.pool import check_name
from adapterhub_chat.runlog import RunLog, write_json
from adapterhub_chat.sequence import Ledger, Memory
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task
from adapterhub_chat.train import Event, first_process, join, processes
from adapterhub_chat.types import Mix, Score, as_mix

DATA_SETTINGS = ("row_length", "train_examples", "eval_examples", "rows_per_step")
"""Settings that all candidates of a sweep share: they see the same rows."""


@dataclass(frozen=True)
class Listeners:
    """Who hears of progress."""

    on_event: Callable[[Event], None] = lambda _: None
    on_judged: Callable[[str, int], None] = lambda _what, _n: None
    on_sweep: Callable[[Sequence[Candidate]], None] = lambda _: None
    on_ledger: Callable[[Ledger], None] = lambda _: None


SILENT = Listeners()


@dataclass(frozen=True)
class Order:
    """What a run is asked for."""

    tasks: Mapping[str, Task]
    """Adapter name -> its task."""
    configs: Mapping[str, TrainConfig]
    options: RunOptions = field(default_factory=RunOptions)
    sweeps: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """Adapter name -> setting -> values."""
    save_dtype: torch.dtype = torch.float32
    run_dir: Path | None = None
    """Folder of the log and of the saved states; without it neither is kept."""
    resume: bool = False


def make_adapters(shelf: Shelf, order: Order, listeners: Listeners = SILENT) -> dict[str, Manifest]:
    """Train, save and measure what is ordered; return the manifests of what was saved.

    Everything that can be wrong is looked at before the first step: names, data, the pool's folder.
    Ctrl-C in training saves what was best until then, unmeasured, with a warning. What has learnt
    nothing is not saved; when that is all there is, KeyboardInterrupt goes on its way. Of several
    processes only the first one writes, measures and has manifests to return.
    """
    _check(shelf, order)
    tokenizer = shelf.model.backbone.tokenizer
    jobs = {n: make_job(tokenizer, n, t, order.configs[n]) for n, t in order.tasks.items()}
    with contextlib.ExitStack() as stack:
        heard = listeners if first_process() else SILENT
        if order.run_dir is not None and first_process():
            heard = _logged(stack.enter_context(RunLog(order.run_dir)), order.run_dir, heard)
        run = _Run(shelf, order, heard)
        course = Course(
            shelf.model,
            jobs,
            order.options,
            order.sweeps,
            on_event=heard.on_event,
            on_sweep=heard.on_sweep,
            memory=run.memory,
        )
        if order.options.shard:
            join(shelf.model.backbone.device)
            shelf.model.shard()
        for made in course.run():
            run.take(made)
        return run.finish()


class _Run:
    """What a run has made so far."""

    def __init__(self, shelf: Shelf, order: Order, listeners: Listeners) -> None:
        self.shelf, self.order, self.listeners = shelf, order, listeners
        self.manifests: dict[str, Manifest] = {}
        self.made: dict[str, Made] = {}
        self.interrupted = False
        self._states: list[Checkpoints] = []
        self._matrix: list[tuple[float | None, ...]] = []
        self._start: dict[str, float] = {}
        if order.resume and order.run_dir is not None:
            found = any((order.run_dir / "state").rglob("state-*"))
            if not found and first_process():
                _warn(f"{order.run_dir} holds no saved state: the run starts from the beginning")

    def memory(self, stage: str) -> Memory:
        """Return where a stage of the run keeps its state, and the state to go on from."""
        order, options = self.order, self.order.options
        if order.run_dir is None:
            return Memory()
        states = Checkpoints(
            order.run_dir / "state" / stage, steps=options.save_steps, minutes=options.save_minutes
        )
        self._states.append(states)
        found = states.latest() if order.resume else None
        if first_process():
            if not order.resume:
                states.clear()
            return Memory(states, found)
        return Memory(resume=found)

    def take(self, made: Made) -> None:
        """Keep a finished adapter; after a stage of a sequence, look at all tasks so far."""
        name, trained = made.job.name, made.trained
        self.interrupted |= trained.stopped == "interrupted"
        if not first_process():
            return
        if not trained.best_step:
            _warn(f"adapter {name!r} is not saved: {trained.stopped} before it learnt anything")
            return
        draft = manifest_of(
            [self.order.tasks[task] for task in made.tasks],
            self.shelf.model.backbone,
            made.job,
            trained,
            how=self.order.options.how,
            beside=made.beside,
            note=made.note,
        )
        kept = self._kept(made, draft)
        self.manifests |= kept
        self.made |= dict.fromkeys(kept, made)
        if self.order.options.how == "sequence" and kept and not self.interrupted:
            self._look_back(made)

    def finish(self) -> dict[str, Manifest]:
        """Measure what was saved, unless the run was interrupted; return the manifests."""
        if self.interrupted and not self.manifests:
            raise KeyboardInterrupt
        if self.interrupted:
            names = ", ".join(self.manifests)
            _warn(f"interrupted: the best so far of {names} is saved, not measured")
            return self.manifests
        if first_process():
            for states in self._states:
                states.clear()
        if self.order.options.shard:
            _warn(f"{', '.join(self.manifests)}: saved, not measured (the backbone is sharded)")
        elif self.order.options.test_examples and first_process():
            self._measure()
        return self.manifests

    def _kept(self, made: Made, draft: Manifest) -> dict[str, Manifest]:
        """Save one adapter; where that fails, warn, so that the others of the run are not lost."""
        weights = made.weights.to(self.order.save_dtype)
        try:
            return {
                draft.name: self.shelf.keep(weights, draft, probing=not self.order.options.shard)
            }
        except AdapterError as error:
            _warn(f"adapter {draft.name!r} is not saved: {error}")
            return {}

    def _measure(self) -> None:
        """Score the saved adapters on their tasks' test splits; write the scores into manifests."""
        limit = self.order.options.test_examples
        plain = _unquantized(self.shelf.model)
        try:
            for name, manifest in self.manifests.items():
                scores = []
                for task in (self.order.tasks[t] for t in self.made[name].tasks):
                    pair = [(name, as_mix(name))]
                    scores += judge_task(self.shelf.model, task, pair, limit, self.listeners)
                    if plain is not None:
                        plain.load(name, self.shelf.model.weights(name))
                        scores += judge_task(plain, task, pair, limit, self.listeners)
                self.manifests[name] = manifest.with_scores(scores)
                self.shelf.describe(name, self.manifests[name])
        except KeyboardInterrupt:
            _warn(f"interrupted: {', '.join(self.manifests)} are saved, but not all are measured")
            raise

    def _look_back(self, made: Made) -> None:
        """Add a row to the ledger: each task's score now, by the adapter that answers for it."""
        options, tasks = self.order.options, self.order.tasks
        if not options.test_examples or options.shard:
            return
        row: list[float | None] = []
        for name, task in tasks.items():
            learnt = name if name in self.manifests else None
            answering = made.job.name if options.grow else learnt
            if name not in self._start:
                (bare,) = judge_task(self.shelf.model, task, [("", Mix())], options.test_examples)
                self._start[name] = bare.value
            if answering is None:
                row.append(None)
                continue
            pair = [(answering, as_mix(answering))]
            (found,) = judge_task(self.shelf.model, task, pair, options.test_examples)
            row.append(found.value)
        self._matrix.append(tuple(row))
        self.listeners.on_ledger(
            Ledger(
                tasks=tuple(tasks),
                metrics=tuple(task.metric for task in tasks.values()),
                higher_is_better=tuple(METRICS[t.metric].higher_is_better for t in tasks.values()),
                start=tuple(self._start[name] for name in tasks),
                matrix=tuple(self._matrix),
            )
        )


def _check(shelf: Shelf, order: Order) -> None:
    options, names = order.options, list(order.tasks)
    own = {"shared": [options.shared_name], "sequence": [options.grown_name], "joint": []}
    for name in (*names, *own[options.how]):
        check_name(name)
    found = []
    if clash := [name for name in own[options.how] if name in names]:
        found.append(f"{clash[0]!r} is the name of a task's adapter and of the common one")
    if order.sweeps and options.how != "joint":
        found.append(f"a sweep trains jointly; how={options.how!r} cannot have one")
    found += _sweep_misfits(order)
    if options.shard and processes() < 2:
        found.append("shard spreads the backbone over processes; start several with torchrun")
    if order.resume and order.run_dir is None:
        found.append("resume needs the run's folder (run_dir)")
    if found:
        raise ConfigError("the run", found)
    if first_process():
        shelf.pool.check_writable()


def _sweep_misfits(order: Order) -> Iterator[str]:
    for name, sweep in order.sweeps.items():
        if name not in order.tasks:
            yield f"sweep of {name!r}, but this run trains {', '.join(order.tasks)}"
            continue
        for key in sweep:
            if key in DATA_SETTINGS:
                yield f"sweep of {name!r}: {key} must be the same for all candidates"
        if not order.configs[name].eval_examples:
            yield f"sweep of {name!r}: eval_examples=0 leaves nothing to choose by"


def _logged(log: RunLog, folder: Path, listeners: Listeners) -> Listeners:
    """Return listeners that write into the run's folder, too."""

    def on_event(event: Event) -> None:
        listeners.on_event(event)
        log(event)

    def on_sweep(table: Sequence[Candidate]) -> None:
        listeners.on_sweep(table)
        write_json(folder / "sweep.json", {"candidates": [vars(row) for row in table]})

    def on_ledger(ledger: Ledger) -> None:
        listeners.on_ledger(ledger)
        write_json(folder / "ledger.json", ledger.as_json())
        draw_ledger(ledger, folder / "ledger.png")

    return replace(listeners, on_event=on_event, on_sweep=on_sweep, on_ledger=on_ledger)


def _unquantized(model: AdapterModel) -> AdapterModel | None:
    """Return the same backbone without quantization, None when this one has none."""
    own = model.backbone
    if own.quantize is None:
        return None
    return AdapterModel(load_backbone(own.name, dtype=own.dtype, device=own.device))


def judge_task(
    model: AdapterModel,
    task: Task,
    adapters: Sequence[tuple[str, Mix]],
    limit: int,
    listeners: Listeners = SILENT,
) -> list[Score]:
    """Score adapters on (at most `limit` of) a task's test split; raise DataError when it is empty."""
    examples = sample(task.split("test"), limit)
    if not examples:
        raise DataError(f"task {task.name!r} has no test examples")
    return evaluate(model, adapters, [(task, examples)], on_progress=listeners.on_judged)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def configs_of(
    names: Sequence[str], shared: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainConfig]:
    """Return each adapter's settings: the shared ones under its own."""
    if unknown := [name for name in own if name not in names]:
        trained = ", ".join(names)
        raise UsageError(f"settings for {', '.join(unknown)}, but this run trains {trained}")
    return {
        name: read_settings(TrainConfig, {**shared, **own.get(name, {})}, f"settings of {name!r}")
        for name in names
    }
