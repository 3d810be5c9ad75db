"""A transfer from beginning to end: train every method, judge, choose. Returns values, writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapterhub_chat.data.metrics import METRICS, Rows
from adapterhub_chat.errors import DataError, UsageError, warn
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.events import Event
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.loop import train
from adapterhub_chat.transfer.adversarial import DomainDiscriminator
from adapterhub_chat.transfer.gate import TransferVerdict, best, verdict
from adapterhub_chat.transfer.language import LANGUAGE
from adapterhub_chat.transfer.maxent import Weighting
from adapterhub_chat.transfer.methods import (
    BASELINE,
    METHODS,
    STACKS,
    adversarial_job,
    few_shot_jobs,
    finished,
    language_job,
    language_stack,
    maxent_job,
)
from adapterhub_chat.transfer.setting import TransferProblem, proxy_validation
from adapterhub_chat.types import BACKBONE, Mix, as_mix

SHARE = 0.3
"""Least effective sample size of a reweighted source, as a share of it."""
AS_IS = "source"


@dataclass(frozen=True)
class Candidate:
    """One way to serve the target, measured on its validation examples, or what stands for them."""

    method: str
    value: float
    verdict: TransferVerdict
    weights: AdapterWeights | None = None
    """None: the bare backbone."""
    steps: int = 0
    best_step: int = 0
    own: AdapterWeights | None = None
    """Of a stack: T alone, without the source under it."""
    note: str = ""
    """Why its training ended before its time."""


@dataclass(frozen=True)
class Outcome:
    """Every candidate, beside the baseline, and which one is chosen."""

    baseline: str
    candidates: dict[str, Candidate]
    chosen: str
    seconds: float
    metric: str
    weighting: Weighting | None = None
    game: DomainDiscriminator | None = None
    proxy: str = ""
    """What the verdicts rest on where the target has no labels."""
    rows: dict[str, Rows] = field(default_factory=dict)


def transfer(
    model: AdapterModel,
    setting: TransferProblem,
    method: str = "auto",
    *,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Outcome:
    """Train what `method` needs (auto: all of METHODS), judge it beside the baseline, and choose.

    The baseline is the few-shot target adapter, or the backbone where the target has no labelled training
    examples. `auto` takes the candidate with the best lower bound of those that help, else the baseline.
    Without any labelled example of the target all this rests on a proxy, which is told.
    """
    check_method(setting, method)
    started = time.monotonic()
    if setting.stand_ins:
        setting = proxy_validation(model, setting)
    wanted = _wanted(setting) if method == "auto" else (BASELINE, method)
    jobs = _short_jobs(model, setting, wanted)
    if method == LANGUAGE and not any(job.name == LANGUAGE for job in jobs):
        raise UsageError("method 'language': the texts are too few or too short to learn from")
    made = _learnt(model, jobs, method, on_event)
    with _on_trial(model, made[BASELINE].weights if BASELINE in made else None) as teacher:
        weighting, game, more = _long_jobs(model, setting, wanted, teacher)
    if LANGUAGE in made and setting.shots:
        learnt = made[LANGUAGE].weights
        more.append(language_stack(model.backbone.tokenizer, setting, learnt))
    made |= _learnt(model, more, method, on_event)
    every: dict[str, AdapterWeights | None] = {BACKBONE: None, AS_IS: setting.source}
    every |= {name: finished(setting, name, done) for name, done in made.items()}
    rows = {name: _rows(model, setting, own) for name, own in every.items()}
    baseline = BASELINE if setting.shots else BACKBONE
    metric = setting.target.metric
    verdicts = {name: verdict(metric, own, rows[baseline]) for name, own in rows.items()}
    candidates = {
        name: _candidate(name, METRICS[metric].aggregate(rows[name]), verdicts[name], own, made)
        for name, own in every.items()
    }
    chosen = best(verdicts, baseline) if method == "auto" else method
    seconds = time.monotonic() - started
    return Outcome(
        baseline, candidates, chosen, seconds, metric, weighting, game, setting.proxy, rows
    )


def _learnt(
    model: AdapterModel, jobs: Sequence[Job], method: str, on_event: Callable[[Event], None]
) -> dict[str, Trained]:
    """Train, and return what is sound.

    Ctrl-C ends the whole transfer: beside what has half learnt, a verdict would be false.
    """
    made = train(model, jobs, on_event=on_event) if jobs else {}
    if any(done.stopped == "interrupted" for done in made.values()):
        raise KeyboardInterrupt
    return _sound(made, method)


def _sound(made: Mapping[str, Trained], method: str) -> dict[str, Trained]:
    """Return what can be judged; warn of a candidate whose numbers went out of bounds.

    Raises DataError where it is the one that is asked for, or the baseline.
    """
    lost = [name for name, done in made.items() if not done.weights.is_finite]
    text = f"{', '.join(lost)}: the training left numbers that are not finite; lower learning_rate"
    if {BASELINE, method} & {*lost}:
        raise DataError(text)
    if lost:
        warn(text)
    return {name: done for name, done in made.items() if name not in lost}


def check_method(setting: TransferProblem, method: str) -> None:
    """Raise UsageError for a method that there is not, or that the setting lacks something for."""
    if method not in (*METHODS, "auto"):
        raise UsageError(f"method {method!r}: allowed are auto, {', '.join(METHODS)}")
    if not setting.shots and method in ("target", "finetune", "stack"):
        raise UsageError(f"method {method!r} learns from the target's labels; give shots")
    if not setting.unlabelled and method in ("adversarial", LANGUAGE):
        raise UsageError(
            f"method {method!r} needs texts of the target without labels; give unlabelled"
        )


def _wanted(setting: TransferProblem) -> Sequence[str]:
    """Return the methods that `auto` tries: a language is learnt where it is another one."""
    return [name for name in METHODS if name != LANGUAGE or setting.foreign]


def _short_jobs(model: AdapterModel, setting: TransferProblem, wanted: Sequence[str]) -> list[Job]:
    """Return the jobs that learn from the target alone: from its shots, and from its text."""
    tokenizer = model.backbone.tokenizer
    jobs = few_shot_jobs(tokenizer, setting, wanted)
    if LANGUAGE in wanted and setting.unlabelled:
        job = language_job(model, setting)
        jobs += [job] if job.train else []
    return jobs


def _long_jobs(
    model: AdapterModel, setting: TransferProblem, wanted: Sequence[str], teacher: Mix
) -> tuple[Weighting | None, DomainDiscriminator | None, list[Job]]:
    """Return the jobs that learn from the source's examples, too, with what they are watched by."""
    weighting, game, jobs = None, None, []
    if "maxent" in wanted:
        job, weighting = maxent_job(model, setting, teacher, SHARE)
        jobs.append(job)
    if "adversarial" in wanted and setting.unlabelled:
        job, game = adversarial_job(model, setting)
        jobs.append(job)
    return weighting, game, jobs


def _candidate(
    name: str,
    value: float,
    judged: TransferVerdict,
    weights: AdapterWeights | None,
    made: Mapping[str, Trained],
) -> Candidate:
    done = made.get(name)
    if done is None:
        return Candidate(name, value, judged, weights)
    note = done.stopped if done.stopped != "finished" else ""
    own = done.weights if name in STACKS else None
    return Candidate(name, value, judged, weights, done.steps, done.best_step, own, note)


def _rows(model: AdapterModel, setting: TransferProblem, weights: AdapterWeights | None) -> Rows:
    with _on_trial(model, weights) as mix:
        return judge(model, setting.target, setting.validation, mix, details=False).rows


@contextmanager
def _on_trial(model: AdapterModel, weights: AdapterWeights | None) -> Iterator[Mix]:
    """Load weights for as long as the block runs; give their mix, without weights the backbone's."""
    if weights is None:
        yield Mix()
        return
    with model.temporarily_loaded(weights) as name:
        yield as_mix(name)
