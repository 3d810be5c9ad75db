"""Which adapter is the best source for a target? An estimate from frozen features, before any training.

LogME (You et al. 2021, arXiv 2102.11005): the evidence, per label, of a Bayesian linear model from features
under the source adapter to the target's labels. LEEP (Nguyen et al. 2020, arXiv 2002.12462): the likelihood
of the labels through what the source says. Both are higher for better sources. The proxy A-distance
(Ben-David et al. 2006, papers.nips.cc/paper/2983) is lower for nearer ones: how well the bare backbone's
features tell messages of source and target apart. It looks at no label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, AdapterHubError, DataError, UsageError, warn
from adapterhub_chat.inference.likelihood import label_scores
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import features
from adapterhub_chat.pool.provenance import load_trained_tasks
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.route.learn import messages_in
from adapterhub_chat.types import NO_ADAPTER, Example, Mix, PromptContract

ROUNDS, TINY = 50, 1e-9


@dataclass(frozen=True)
class Ranked:
    """How promising a source is for a target; compare within one ranking only."""

    adapter: str
    logme: float
    leep: float
    distance: float | None = None
    """From 0 (one domain) to 2; None where the source's own examples are not here."""


def rank(
    model: AdapterModel,
    target: Task,
    examples: Sequence[Example],
    sources: Sequence[tuple[str, Mix]],
    distances: Mapping[str, float] | None = None,
) -> list[Ranked]:
    """Return the sources, the most promising by LogME first, judged on labelled target examples.

    `distances`, by the sources' names, are told beside them. Raises DataError for a target without labels,
    or with examples of one label only.
    """
    labels = list(target.contract.labels)
    found = sorted({e.answer for e in examples})
    if not labels:
        raise DataError(f"sources are ranked by labels, and {target.name} has free answers")
    if len(found) < 2:
        raise DataError(
            f"sources are ranked by labelled examples of two labels or more; {target.name} has "
            f"{len(examples)} of {', '.join(found) or 'none'}"
        )
    plain = [replace(example, contract=None) for example in examples]
    answers = torch.tensor([labels.index(e.answer) for e in plain])
    ranked = []
    for name, mix in sources:
        states = features(model, target.contract, plain, mix, where="last")
        shares = label_scores(model, target.contract, plain, mix)
        apart = (distances or {}).get(name)
        ranked.append(Ranked(name, logme(states, answers), leep(shares, answers), apart))
    return sorted(ranked, key=lambda one: -one.logme)


def logme(states: Tensor, answers: Tensor) -> float:
    """Return the mean log evidence, per example, of labels (n,) given features (n, d).

    Each label is a regression target of 0 and 1; both precisions are found by MacKay's fixed point.
    """
    if not bool(states.isfinite().all()):
        raise DataError("some features are not finite: the adapter or the backbone is damaged")
    centred = states.double() - states.double().mean(0)
    left, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    hot = functional.one_hot(answers).double()
    hot = hot[:, hot.sum(0) > 0]
    return sum(_evidence(left, spread.square(), column)[0] for column in hot.T) / hot.shape[1]


def _evidence(left: Tensor, power: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Return the log evidence per example at its maximum, with the precisions of weights and noise."""
    count = len(wanted)
    along = (left.T @ wanted).square()
    outside = float((wanted.square().sum() - along.sum()).clamp(min=0))
    alpha = beta = 1.0
    for _ in range(ROUNDS):
        ratio = alpha / beta
        effective = float((power / (power + ratio)).sum())
        size = float((power * along / (power + ratio).square()).sum())
        error = float((along * (ratio / (power + ratio)).square()).sum()) + outside
        alpha, beta = effective / (size + TINY), (count - effective) / (error + TINY)
        if abs(alpha / beta - ratio) <= 1e-4 * ratio:
            break
    evidence = (
        len(power) / 2 * math.log(alpha)
        + count / 2 * math.log(beta / (2 * math.pi))
        - float((alpha + beta * power).log().sum()) / 2
        - (beta * error + alpha * size) / 2
    )
    return evidence / count, alpha, beta


def a_distance(one: Tensor, other: Tensor) -> float:
    """Return 2 (1 - 2 error), at least 0, of a linear classifier that tells features (n, d) from (m, d).

    Each half is told by what the other half has taught: a ridge regression whose penalty is that of the
    largest evidence, as in `logme`.
    """
    vectors = torch.cat([one, other]).double()
    kinds = torch.arange(len(vectors)) >= len(one)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    halves = order[::2], order[1::2]
    wrong = sum(
        int((_told(vectors[learnt], kinds[learnt], vectors[asked]) != kinds[asked]).sum())
        for learnt, asked in (halves, halves[::-1])
    )
    return max(0.0, 2 * (1 - 2 * wrong / len(vectors)))


def _told(vectors: Tensor, kinds: Tensor, asked: Tensor) -> Tensor:
    """Return which of two kinds each asked vector is of, (len(asked),) bool, learnt from (n, d)."""
    middle, share = vectors.mean(0), kinds.double().mean()
    left, spread, right = torch.linalg.svd(vectors - middle, full_matrices=False)
    wanted = kinds.double() - share
    _, alpha, beta = _evidence(left, spread.square(), wanted)
    weights = right.T @ (spread / (spread.square() + alpha / beta) * (left.T @ wanted))
    told: Tensor = (asked - middle) @ weights + share > 0.5
    return told


def leep(shares: Tensor, answers: Tensor) -> float:
    """Return the mean log-likelihood of labels (n,) through a source's label shares (n, z)."""
    shares = shares.double()
    joint = functional.one_hot(answers).double().T @ shares / len(answers)
    given = joint / joint.sum(0).clamp(min=TINY)
    expected = (shares @ given.T).gather(1, answers[:, None]).squeeze(1)
    return float(expected.clamp(min=TINY).log().mean())


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the rank correlation of two numbers by the same names; NaN where one is constant."""
    ranks = [_ranks([numbers[name] for name in one]) for numbers in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    """Return each value's rank; equal ones share their mean rank."""
    table = torch.tensor(values, dtype=torch.float64)
    below = (table[:, None] > table[None, :]).sum(1)
    equal = (table[:, None] == table[None, :]).sum(1)
    return below + (equal + 1) / 2


def rank_sources(
    registry: Registry, target: Task, names: Sequence[str] | None, limit: int
) -> list[Ranked]:
    """Return adapters of the pool by how promising they are; see AdapterHub.rank_sources."""
    mixes = _mixes(registry) if names is None else registry.resolve(list(names))
    if not mixes:
        raise UsageError(f"there are no adapters in {registry.pool.root} to rank as sources")
    sources, examples = {str(mix): mix for mix in mixes}, sample(target.split("train"), limit)
    distances = _distances(registry, list(sources), target, limit)
    return rank(registry.model, target, examples, list(sources.items()), distances)


def _mixes(registry: Registry) -> list[Mix]:
    """Return the pool's adapters, each alone; warn of what cannot be loaded here."""
    found: list[Mix] = []
    for name in registry.pool.names():
        try:
            (mix,) = registry.resolve([name])
            registry.with_stack_bases(mix)
        except AdapterError as error:
            warn(f"{name} is left out: {error}")
        else:
            found.append(mix)
    return found


def _distances(
    registry: Registry, names: Sequence[str], target: Task, limit: int
) -> dict[str, float]:
    """Return the proxy A-distance to the target of each source whose tasks are here."""
    found, its = {}, _features_of(registry, [target], limit)
    for name in names:
        known = registry.known(name)
        with suppress(AdapterHubError):  # a task or its data is not here: then nothing is told
            if tasks := load_trained_tasks(known.manifest if known else None, name):
                found[name] = a_distance(_features_of(registry, tasks, limit), its)
    return found


def _features_of(registry: Registry, tasks: Sequence[Task], limit: int) -> Tensor:
    """Return the bare backbone's mean features of some messages of tasks, (messages, hidden)."""
    texts = messages_in(tasks, "train", limit)
    return features(
        registry.model,
        PromptContract(),
        [Example({"text": text}, "") for text in texts],
        NO_ADAPTER,
    )
