"""A training run from start to end: trains the adapters of a TrainSpec, saves and measures them."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from adapterhub_chat.artifact.manifest import How, Manifest, Training
from adapterhub_chat.data.metrics import METRICS
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, warn
from adapterhub_chat.evaluation.scoring import judge_task
from adapterhub_chat.events import SILENT, Candidate, Event, Ledger, Listeners
from adapterhub_chat.files import write_json
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone, load_backbone
from adapterhub_chat.model.devices import peak_memory
from adapterhub_chat.pool.provenance import draft_of
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.learn import learn_routing
from adapterhub_chat.training.checkpoint import Checkpoints
from adapterhub_chat.training.distributed import first_process, join
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.run_log import RunLog
from adapterhub_chat.training.spec import FINISHED, RUN_FILE, STATE, TrainSpec, check_spec
from adapterhub_chat.training.strategies import CheckpointHooks, FinishedAdapter, StrategyContext
from adapterhub_chat.types import Mix, as_mix


def make_adapters(
    registry: Registry, spec: TrainSpec, listeners: Listeners = SILENT
) -> dict[str, Manifest]:
    """Train, save and measure the adapters of a spec; return the manifests of the saved ones.

    Names, data and the pool's folder are checked before the first step. Ctrl-C in training saves the best
    weights until then, unmeasured, with a warning. An adapter that has learnt nothing is not saved; if none
    is saved, KeyboardInterrupt is re-raised. Of several processes only the first one writes, measures and
    returns manifests.
    """
    check_spec(registry, spec)
    tokenizer = registry.model.backbone.tokenizer
    jobs = {n: make_job(tokenizer, n, t, spec.configs[n]) for n, t in spec.tasks.items()}
    with contextlib.ExitStack() as stack:
        callbacks = listeners if first_process() else SILENT
        if spec.run_dir is not None and first_process():
            log = stack.enter_context(RunLog(spec.run_dir))
            callbacks = _with_log(callbacks, log, spec.run_dir)
        if spec.run_dir is not None and spec.run_config is not None and first_process():
            write_json(spec.run_dir / RUN_FILE, spec.run_config.model_dump(mode="json"))
        run = _Run(registry, spec, callbacks)
        context = StrategyContext(
            registry.model,
            jobs,
            spec.options,
            spec.sweeps,
            on_event=callbacks.on_event,
            on_sweep=callbacks.on_sweep,
            hooks_of=run.hooks_of,
        )
        if spec.options.shard:
            join(registry.model.backbone.device)
            registry.model.shard()
        for finished in context.run():
            run.add(finished)
        return run.finish()


class _Run:
    """The adapters of a run that are finished so far."""

    def __init__(self, registry: Registry, spec: TrainSpec, listeners: Listeners) -> None:
        self.registry, self.spec, self.listeners = registry, spec, listeners
        self.manifests: dict[str, Manifest] = {}
        self.finished: dict[str, FinishedAdapter] = {}
        self.interrupted = False
        self._matrix: list[tuple[float | None, ...]] = []
        self._start: dict[str, float] = {}

    def hooks_of(self, stage: str) -> CheckpointHooks:
        """Return where a stage of the run saves its state, and the state from which it resumes."""
        spec, options = self.spec, self.spec.options
        if spec.run_dir is None:
            return CheckpointHooks()
        states = Checkpoints(
            spec.run_dir / STATE / stage, steps=options.save_steps, minutes=options.save_minutes
        )
        state = states.latest() if spec.resume else None
        if not first_process():
            return CheckpointHooks(resume=state)
        return CheckpointHooks(states, states.save_or_warn, state)

    def add(self, finished: FinishedAdapter) -> None:
        """Save a finished adapter; after a stage of a sequence, measure all tasks for the ledger."""
        name, trained = finished.job.name, finished.trained
        self.interrupted |= trained.stopped == "interrupted"
        if not first_process():
            return
        if trained.best_step:
            self._save(finished)
        else:
            warn(f"adapter {name!r} is not saved: {trained.stopped} before it learnt anything")
        if self.spec.options.how == "sequence" and not self.interrupted:
            self._record_ledger(finished)

    def _save(self, finished: FinishedAdapter) -> None:
        """Save a finished adapter; if that fails, warn, so that the others are not lost."""
        options, tasks = self.spec.options, [self.spec.tasks[task] for task in finished.tasks]
        draft = manifest_of(
            tasks,
            self.registry.model.backbone,
            finished.job,
            finished.trained,
            how=options.how,
            trained_with=finished.trained_with,
            note=finished.note,
        )
        is_shared = options.how == "shared" and finished.job.name == options.shared_name
        if not (is_shared or options.shard):  # the shared adapter never answers by itself
            draft = draft.model_copy(update={"routing": learn_routing(self.registry, tasks)})
        weights = finished.weights.to(self.spec.save_dtype)
        try:
            saved = self.registry.save_new(weights, draft, probing=not options.shard)
        except AdapterError as error:
            warn(f"adapter {draft.name!r} is not saved: {error}")
            return
        self.manifests[saved.name] = saved
        self.finished[saved.name] = finished

    def finish(self) -> dict[str, Manifest]:
        """Measure the saved adapters, unless the run was interrupted; return the manifests."""
        if self.interrupted and not self.manifests:
            raise KeyboardInterrupt
        if self.interrupted:
            names = ", ".join(self.manifests)
            warn(f"interrupted: the best so far of {names} is saved, not measured")
            return self.manifests
        if self.spec.options.shard:
            if self.manifests:
                warn(f"{', '.join(self.manifests)}: saved, not measured (the backbone is sharded)")
        elif self.spec.options.test_examples and first_process():
            self._measure()
        if self.spec.run_dir is not None and first_process():
            shutil.rmtree(self.spec.run_dir / STATE, ignore_errors=True)
            write_json(self.spec.run_dir / FINISHED, {"adapters": list(self.manifests)})
        return self.manifests

    def _measure(self) -> None:
        """Score the saved adapters on their tasks' test splits; write the scores into the manifests."""
        limit = self.spec.options.test_examples
        unquantized = _unquantized(self.registry.model)
        try:
            for name, manifest in self.manifests.items():
                scores = []
                for task in (self.spec.tasks[t] for t in self.finished[name].tasks):
                    pair = [(name, as_mix(name))]
                    scores += judge_task(self.registry.model, task, pair, limit, self.listeners)
                    if unquantized is not None:
                        unquantized.load(name, self.registry.model.weights(name))
                        scores += judge_task(unquantized, task, pair, limit, self.listeners)
                self.manifests[name] = manifest.with_scores(scores)
                self.registry.describe(name, self.manifests[name])
        except KeyboardInterrupt:
            warn(f"interrupted: {', '.join(self.manifests)} are saved, but not all are measured")
            raise

    def _record_ledger(self, finished: FinishedAdapter) -> None:
        """Add a row to the ledger: each task's present score, by the adapter that has learnt it."""
        options, tasks = self.spec.options, self.spec.tasks
        if not options.test_examples or options.shard:
            return
        row: list[float | None] = []
        for name, task in tasks.items():
            adapter = finished.job.name if options.grow else name
            if name not in self._start:
                (bare,) = judge_task(
                    self.registry.model, task, [("", Mix())], options.test_examples
                )
                self._start[name] = bare.value
            if adapter not in self.manifests:
                row.append(None)
                continue
            pair = [(adapter, as_mix(adapter))]
            (score,) = judge_task(self.registry.model, task, pair, options.test_examples)
            row.append(score.value)
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


def _with_log(listeners: Listeners, log: RunLog, folder: Path) -> Listeners:
    """Return listeners that also write to the log, `sweep.json` and `ledger.json` in the run's folder."""

    def on_event(event: Event) -> None:
        listeners.on_event(event)
        log(event)

    def on_sweep(candidates: Sequence[Candidate]) -> None:
        listeners.on_sweep(candidates)
        rows = [asdict(candidate) for candidate in candidates]
        for row in rows:  # JSON has no NaN
            if not math.isfinite(row["validation_loss"]):
                row["validation_loss"] = None
        write_json(folder / "sweep.json", {"candidates": rows})

    def on_ledger(ledger: Ledger) -> None:
        listeners.on_ledger(ledger)
        write_json(folder / "ledger.json", ledger.as_json())

    return replace(listeners, on_event=on_event, on_sweep=on_sweep, on_ledger=on_ledger)


def _unquantized(model: AdapterModel) -> AdapterModel | None:
    """Return a model on the same backbone without quantization; None if it is not quantized."""
    backbone = model.backbone
    if backbone.quantize is None:
        return None
    plain = load_backbone(backbone.name, dtype=backbone.dtype, device=backbone.device)
    return AdapterModel(plain) if plain.quantize is None else None  # its folder may be packed


@dataclass
class Finished:
    """The results of a run: manifests, the candidates of its sweeps, the ledger of a sequence."""

    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    sweep: Sequence[Candidate] = ()
    ledger: Ledger | None = None


def manifest_of(
    tasks: Sequence[Task],
    backbone: Backbone,
    job: Job,
    trained: Trained,
    *,
    how: How,
    trained_with: Sequence[str] = (),
    note: str = "",
) -> Manifest:
    """Return the manifest of a newly trained adapter, without what is measured later."""
    return draft_of(
        job.name,
        backbone,
        tasks,
        Training(
            how=how,
            tasks=tuple(name for t in tasks for name in t.members or (t.name,)),
            data_sha256=tuple(t.data_hash() for t in tasks),
            sources=tuple(dict.fromkeys(source for t in tasks for source in t.sources)),
            beside=tuple(trained_with),
            settings=job.config.model_dump(),
            steps=trained.steps,
            best_step=trained.best_step,
            tokens=trained.tokens,
            seconds=round(trained.seconds, 1),
            backbone_bytes=backbone.nbytes,
            peak_bytes=peak_memory(backbone.device),
            validation_loss=trained.best_loss if math.isfinite(trained.best_loss) else None,
            stopped=trained.stopped,
            conflict=dict(trained.conflict),
            note=note,
        ),
    )
