"""Trains the candidates of a transfer, judges them against the baseline and chooses one; writes nothing."""

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
    language_job,
    language_stack,
    maxent_job,
    plain_weights,
)
from adapterhub_chat.transfer.setting import TransferProblem, proxy_validation
from adapterhub_chat.types import BACKBONE, Mix, as_mix

MIN_EFFECTIVE_SHARE = 0.3
"""Smallest effective sample size of a reweighted source, as a share of its examples."""
AS_IS = "source"
"""Name of the candidate that is the source adapter, unchanged."""


@dataclass(frozen=True)
class Candidate:
    """A method's adapter, measured on the target's validation examples or their proxy."""

    method: str
    value: float
    verdict: TransferVerdict
    weights: AdapterWeights | None = None
    """None: the bare backbone."""
    steps: int = 0
    best_step: int = 0
    stacked: AdapterWeights | None = None
    """For a stack: T alone, without the source."""
    note: str = ""
    """Why its training stopped early; empty if it finished."""


@dataclass(frozen=True)
class Outcome:
    """All candidates with their verdicts against the baseline, and the chosen one."""

    baseline: str
    candidates: dict[str, Candidate]
    chosen: str
    seconds: float
    metric: str
    weighting: Weighting | None = None
    discriminator: DomainDiscriminator | None = None
    proxy: str = ""
    """If the target has no labels: a sentence on the proxy that the verdicts rest on."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Candidate -> its rows of the metric."""


def transfer(
    model: AdapterModel,
    problem: TransferProblem,
    method: str = "auto",
    *,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Outcome:
    """Train the candidates of `method` (auto: of all METHODS), judge them against the baseline, and choose.

    The baseline is the few-shot target adapter, or the backbone if the target has no labelled training
    examples. `auto` takes the candidate with the best lower bound of those that help, else the baseline.
    Without any labelled example of the target the verdicts rest on a proxy; see `proxy_validation`.
    """
    check_method(problem, method)
    started = time.monotonic()
    if problem.proxies:
        problem = proxy_validation(model, problem)
    methods = _auto_methods(problem) if method == "auto" else (BASELINE, method)
    jobs = _target_jobs(model, problem, methods)
    if method == LANGUAGE and not any(job.name == LANGUAGE for job in jobs):
        raise UsageError("method 'language': the texts are too few or too short to learn from")
    trained = _train(model, jobs, method, on_event)
    with _temporarily_loaded(
        model, trained[BASELINE].weights if BASELINE in trained else None
    ) as teacher:
        weighting, discriminator, more_jobs = _source_jobs(model, problem, methods, teacher)
    if LANGUAGE in trained and problem.shots:
        start = trained[LANGUAGE].weights
        more_jobs.append(language_stack(model.backbone.tokenizer, problem, start))
    trained |= _train(model, more_jobs, method, on_event)
    all_weights: dict[str, AdapterWeights | None] = {BACKBONE: None, AS_IS: problem.source}
    all_weights |= {name: plain_weights(problem, name, done) for name, done in trained.items()}
    rows = {name: _rows(model, problem, weights) for name, weights in all_weights.items()}
    baseline = BASELINE if problem.shots else BACKBONE
    metric = problem.target.metric
    verdicts = {name: verdict(metric, own_rows, rows[baseline]) for name, own_rows in rows.items()}
    candidates = {
        name: _candidate(
            name, METRICS[metric].aggregate(rows[name]), verdicts[name], weights, trained
        )
        for name, weights in all_weights.items()
    }
    chosen = best(verdicts, baseline) if method == "auto" else method
    seconds = time.monotonic() - started
    return Outcome(
        baseline, candidates, chosen, seconds, metric, weighting, discriminator, problem.proxy, rows
    )


def _train(
    model: AdapterModel, jobs: Sequence[Job], method: str, on_event: Callable[[Event], None]
) -> dict[str, Trained]:
    """Train the jobs; return the results whose weights are finite.

    Ctrl-C ends the whole transfer: a comparison with partly trained adapters would be wrong.
    """
    trained = train(model, jobs, on_event=on_event) if jobs else {}
    if any(done.stopped == "interrupted" for done in trained.values()):
        raise KeyboardInterrupt
    return _finite(trained, method)


def _finite(trained: Mapping[str, Trained], method: str) -> dict[str, Trained]:
    """Return the results whose weights are finite; warn of the others.

    Raises DataError if one of the others is the requested method or the baseline.
    """
    bad = [name for name, done in trained.items() if not done.weights.is_finite]
    text = f"{', '.join(bad)}: the training left numbers that are not finite; lower learning_rate"
    if {BASELINE, method} & {*bad}:
        raise DataError(text)
    if bad:
        warn(text)
    return {name: done for name, done in trained.items() if name not in bad}


def check_method(problem: TransferProblem, method: str) -> None:
    """Raise UsageError for an unknown method, or one that needs shots or texts that the problem lacks."""
    if method not in (*METHODS, "auto"):
        raise UsageError(f"method {method!r}: allowed are auto, {', '.join(METHODS)}")
    if not problem.shots and method in ("target", "finetune", "stack"):
        raise UsageError(f"method {method!r} learns from the target's labels; give shots")
    if not problem.unlabelled and method in ("adversarial", LANGUAGE):
        raise UsageError(
            f"method {method!r} needs texts of the target without labels; give unlabelled"
        )


def _auto_methods(problem: TransferProblem) -> Sequence[str]:
    """Return the methods that `auto` tries: `language` only if the target is in another language."""
    return [name for name in METHODS if name != LANGUAGE or problem.foreign]


def _target_jobs(
    model: AdapterModel, problem: TransferProblem, methods: Sequence[str]
) -> list[Job]:
    """Return the jobs that learn from the target alone: from its shots and its texts."""
    tokenizer = model.backbone.tokenizer
    jobs = few_shot_jobs(tokenizer, problem, methods)
    if LANGUAGE in methods and problem.unlabelled:
        job = language_job(model, problem)
        jobs += [job] if job.train else []
    return jobs


def _source_jobs(
    model: AdapterModel, problem: TransferProblem, methods: Sequence[str], teacher: Mix
) -> tuple[Weighting | None, DomainDiscriminator | None, list[Job]]:
    """Return the weighting, the discriminator and the jobs that also learn from the source's examples."""
    weighting, discriminator, jobs = None, None, []
    if "maxent" in methods:
        job, weighting = maxent_job(model, problem, teacher, MIN_EFFECTIVE_SHARE)
        jobs.append(job)
    if "adversarial" in methods and problem.unlabelled:
        job, discriminator = adversarial_job(model, problem)
        jobs.append(job)
    return weighting, discriminator, jobs


def _candidate(
    name: str,
    value: float,
    judged: TransferVerdict,
    weights: AdapterWeights | None,
    all_trained: Mapping[str, Trained],
) -> Candidate:
    trained = all_trained.get(name)
    if trained is None:
        return Candidate(name, value, judged, weights)
    note = trained.stopped if trained.stopped != "finished" else ""
    stacked = trained.weights if name in STACKS else None
    return Candidate(name, value, judged, weights, trained.steps, trained.best_step, stacked, note)


def _rows(model: AdapterModel, problem: TransferProblem, weights: AdapterWeights | None) -> Rows:
    with _temporarily_loaded(model, weights) as mix:
        return judge(model, problem.target, problem.validation, mix, details=False).rows


@contextmanager
def _temporarily_loaded(model: AdapterModel, weights: AdapterWeights | None) -> Iterator[Mix]:
    """Load weights for the duration of the block; yield their mix, or the backbone's without weights."""
    if weights is None:
        yield Mix()
        return
    with model.temporarily_loaded(weights) as name:
        yield as_mix(name)
