"""Workshop: a training run from tasks to measured adapters in the pool."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.backbone import load_backbone
from adapterhub_chat.checkpoint import Checkpoints
from adapterhub_chat.config import RunOptions, TrainConfig, sweep_misfits
from adapterhub_chat.courses import Candidate, Course, Made
from adapterhub_chat.errors import (
    AdapterError,
    ConfigError,
    DataError,
    UnknownNameError,
    UsageError,
)
from adapterhub_chat.evaluate import evaluate
from adapterhub_chat.jobs import make_job, sample
from adapterhub_chat.manifest import Manifest, manifest_of
from adapterhub_chat.metrics import METRICS
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pictures import draw_ledger
from adapterhub_chat.pool import check_name
from adapterhub_chat.prototypes import learn_routing
from adapterhub_chat.runlog import RunLog, write_json
from adapterhub_chat.sequence import Ledger, Memory
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.targets import targeted
from adapterhub_chat.task import Task, load_task
from adapterhub_chat.train import Event, first_process, join, processes
from adapterhub_chat.types import Mix, Score, as_mix

STATE, FINISHED = "state", "finished.json"
"""In a run's folder: the saved states while it runs, and the sign that it has ended."""
FAMILY_SETTINGS = (
    "epochs", "max_steps", "max_minutes", "eval_every", "patience", "temperature", "schedule", "warmup",
)  # fmt: skip
"""Settings that adapters with a shared one have in common: they advance together."""
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
        self._matrix: list[tuple[float | None, ...]] = []
        self._start: dict[str, float] = {}

    def memory(self, stage: str) -> Memory:
        """Return where a stage of the run keeps its state, and the state to go on from."""
        order, options = self.order, self.order.options
        if order.run_dir is None:
            return Memory()
        states = Checkpoints(
            order.run_dir / STATE / stage, steps=options.save_steps, minutes=options.save_minutes
        )
        found = states.latest() if order.resume else None
        return Memory(states, states.keep, found) if first_process() else Memory(resume=found)

    def take(self, made: Made) -> None:
        """Keep a finished adapter; after a stage of a sequence, look at all tasks so far."""
        name, trained = made.job.name, made.trained
        self.interrupted |= trained.stopped == "interrupted"
        if not first_process():
            return
        if trained.best_step:
            self._keep(made)
        else:
            _warn(f"adapter {name!r} is not saved: {trained.stopped} before it learnt anything")
        if self.order.options.how == "sequence" and not self.interrupted:
            self._look_back(made)

    def _keep(self, made: Made) -> None:
        """Save a finished adapter; where that fails, warn, so that the others are not lost."""
        options, tasks = self.order.options, [self.order.tasks[task] for task in made.tasks]
        draft = manifest_of(
            tasks,
            self.shelf.model.backbone,
            made.job,
            made.trained,
            how=options.how,
            beside=made.beside,
            note=made.note,
        )
        common = options.how == "shared" and made.job.name == options.shared_name
        if not (common or options.shard):  # a common one acts beside others, never by itself
            draft = draft.model_copy(update={"routing": learn_routing(self.shelf, tasks)})
        weights = made.weights.to(self.order.save_dtype)
        try:
            kept = self.shelf.keep(weights, draft, probing=not options.shard)
        except AdapterError as error:
            _warn(f"adapter {draft.name!r} is not saved: {error}")
            return
        self.manifests[kept.name] = kept
        self.made[kept.name] = made

    def finish(self) -> dict[str, Manifest]:
        """Measure what was saved, unless the run was interrupted; return the manifests."""
        if self.interrupted and not self.manifests:
            raise KeyboardInterrupt
        if self.interrupted:
            names = ", ".join(self.manifests)
            _warn(f"interrupted: the best so far of {names} is saved, not measured")
            return self.manifests
        if self.order.options.shard:
            if self.manifests:
                _warn(f"{', '.join(self.manifests)}: saved, not measured (the backbone is sharded)")
        elif self.order.options.test_examples and first_process():
            self._measure()
        if self.order.run_dir is not None and first_process():
            shutil.rmtree(self.order.run_dir / STATE, ignore_errors=True)
            write_json(self.order.run_dir / FINISHED, {"adapters": list(self.manifests)})
        return self.manifests

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
            grown = made.job.name if made.job.name in self.manifests else None
            answering = grown if options.grow else learnt
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
    """Look at all that can be wrong before the first step; raise one ConfigError that names it all."""
    options, names = order.options, list(order.tasks)
    common = {"shared": options.shared_name, "sequence": options.grown_name}.get(options.how)
    for name in (*names, *filter(None, [common])):
        check_name(name)
    encodes = shelf.model.backbone.encodes
    found = [
        *_mode_misfits(order, encodes=encodes),
        *_sweep_misfits(order),
        *_folder_misfits(order),
    ]
    if common in names:
        found.append(f"{common!r} is the name of a task's adapter and of the common one")
    for name, config in order.configs.items():
        most = shelf.model.backbone.max_length
        if most is not None and config.row_length > most:
            found.append(
                f"{name}: row_length {config.row_length}, and the encoder reads {most} tokens"
            )
        try:
            targeted(shelf.model.shapes, config.targets, config.layers)
        except UsageError as error:
            found.append(f"{name}: {error}")
        if options.test_examples and not options.shard and not order.tasks[name].split("test"):
            found.append(f"{name}: its task has no test examples; set test_examples to 0")
    if found:
        raise ConfigError("the run", found)
    if first_process():
        shelf.pool.check_writable()


def _mode_misfits(order: Order, *, encodes: bool) -> Iterator[str]:
    """Yield what is asked for and would have no effect, or cannot be."""
    options, configs = order.options, list(order.configs.values())
    grows = options.how == "sequence" and options.grow
    if encodes and grows:
        yield "grow needs a language model: an encoder's heads of several tasks do not add up"
    if options.grow and not grows:
        yield "grow needs how='sequence'"
    if options.replay and not grows:
        yield "replay needs how='sequence' and grow"
    if any(config.orthogonal for config in configs) and not grows:
        yield "orthogonal needs how='sequence' and grow"
    if options.how == "shared":
        for field_name in FAMILY_SETTINGS:
            values = list(dict.fromkeys(getattr(config, field_name) for config in configs))
            if len(values) > 1:
                yield f"{field_name} must be the same for all that share an adapter, not {values}"
    elif any(config.temperature != 1 for config in configs):
        yield "temperature needs how='shared'"
    if options.shard and processes() < 2:
        yield "shard spreads the backbone over processes; start several with torchrun"


def _sweep_misfits(order: Order) -> Iterator[str]:
    if order.sweeps and order.options.how != "joint":
        yield f"a sweep trains jointly; how={order.options.how!r} cannot have one"
    for name, sweep in order.sweeps.items():
        if name not in order.tasks:
            yield f"sweep of {name!r}, but this run trains {', '.join(order.tasks)}"
            continue
        yield from sweep_misfits(f"sweep of {name!r}", sweep)
        for key in set(sweep) & set(DATA_SETTINGS):
            yield f"sweep of {name!r}: {key} must be the same for all candidates"
        if not order.configs[name].eval_examples:
            yield f"sweep of {name!r}: eval_examples=0 leaves nothing to choose by"


def _folder_misfits(order: Order) -> Iterator[str]:
    """Yield why the run cannot begin, or go on, in its folder."""
    folder = order.run_dir
    if folder is None:
        if order.resume:
            yield "resume needs the run's folder (run_dir)"
        return
    saved = any((folder / STATE).rglob("state-*"))
    if order.resume and not saved and (folder / FINISHED).exists():
        yield f"the run in {folder} has finished; there is nothing to resume"
    if not order.resume and saved:
        yield f"{folder} holds the state of a run that has not finished: resume it, or name another folder"


def _logged(log: RunLog, folder: Path, listeners: Listeners) -> Listeners:
    """Return listeners that write into the run's folder, too."""

    def on_event(event: Event) -> None:
        listeners.on_event(event)
        log(event)

    def on_sweep(table: Sequence[Candidate]) -> None:
        listeners.on_sweep(table)
        rows = [asdict(row) for row in table]
        for row in rows:  # JSON has no NaN
            known = math.isfinite(row["validation_loss"])
            row["validation_loss"] = row["validation_loss"] if known else None
        write_json(folder / "sweep.json", {"candidates": rows})

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


def own_tasks(
    shelf: Shelf, named: Sequence[tuple[str, Mix]]
) -> list[tuple[Task, list[tuple[str, Mix]]]]:
    """Return the tasks that adapters were trained on, each with the adapters that it is to judge."""
    groups: dict[str, list[tuple[str, Mix]]] = {}
    for name, mix in named:
        held = shelf.known(name)
        trained_on = held.manifest.training.tasks if held and held.manifest else ()
        if not trained_on:
            raise UsageError(f"adapter {name!r} does not say what it was trained on; name tasks")
        for task in trained_on:
            groups.setdefault(task, []).append((name, mix))
    return [(trained_task(task, group[0][0]), group) for task, group in groups.items()]


def trained_task(name: str, adapter: str) -> Task:
    """Return the task that an adapter says it was trained on; a manifest keeps no paths."""
    try:
        return load_task(name)
    except UnknownNameError as error:
        raise UsageError(
            f"adapter {adapter!r} was trained on the task {name!r}, whose file is not here; give its "
            f"path: --task path/to/{name}.toml, in Python evaluate(tasks=[...])"
        ) from error
