"""Ranks adapters as sources for a target by estimates from frozen features, before any training.

LogME (You et al. 2021, arXiv 2102.11005): the evidence, per label, of a Bayesian linear model from features
under the source adapter to the target's labels. LEEP (Nguyen et al. 2020, arXiv 2002.12462): the likelihood
of the labels through the source's label shares. Both are higher for better sources. The proxy A-distance
(Ben-David et al. 2006, papers.nips.cc/paper/2983) is lower for closer ones: how well a classifier tells
messages of source and target apart by the bare backbone's features. It uses no label.
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

MAX_ITERATIONS, EPSILON = 50, 1e-9
"""Of the fixed point that maximises the evidence; added to denominators."""


@dataclass(frozen=True)
class Ranked:
    """Estimates of how well a source suits a target; comparable within one ranking only."""

    adapter: str
    logme: float
    leep: float
    distance: float | None = None
    """Proxy A-distance, from 0 (one domain) to 2; None if the source's examples are not available."""


def rank(
    model: AdapterModel,
    target: Task,
    examples: Sequence[Example],
    sources: Sequence[tuple[str, Mix]],
    distances: Mapping[str, float] | None = None,
) -> list[Ranked]:
    """Return the sources, best LogME first, estimated on labelled target examples.

    `distances`, by the sources' names, are included in the result. Raises DataError for a target without
    labels, or with examples of fewer than two labels.
    """
    labels = list(target.contract.labels)
    known_labels = sorted({e.answer for e in examples})
    if not labels:
        raise DataError(f"sources are ranked by labels, and {target.name} has free answers")
    if len(known_labels) < 2:
        raise DataError(
            f"sources are ranked by labelled examples of two labels or more; {target.name} has "
            f"{len(examples)} of {', '.join(known_labels) or 'none'}"
        )
    plain = [replace(example, contract=None) for example in examples]
    answers = torch.tensor([labels.index(e.answer) for e in plain])
    ranked = []
    for name, mix in sources:
        states = features(model, target.contract, plain, mix, where="last")
        shares = label_scores(model, target.contract, plain, mix)
        distance = (distances or {}).get(name)
        ranked.append(Ranked(name, logme(states, answers), leep(shares, answers), distance))
    return sorted(ranked, key=lambda source: -source.logme)


def logme(states: Tensor, answers: Tensor) -> float:
    """Return the mean log evidence, per example, of labels (n,) given features (n, d).

    Each label is a regression target of 0 and 1; MacKay's fixed point gives both precisions.
    """
    if not bool(states.isfinite().all()):
        raise DataError("some features are not finite: the adapter or the backbone is damaged")
    centred = states.double() - states.double().mean(0)
    left, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    one_hot = functional.one_hot(answers).double()
    one_hot = one_hot[:, one_hot.sum(0) > 0]
    return (
        sum(_evidence(left, spread.square(), column)[0] for column in one_hot.T)
        / (one_hot.shape[1])
    )


def _evidence(left: Tensor, power: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Return the maximal log evidence per example, with the precisions of weights and noise.

    `left` (n, k) are the features' left singular vectors, `power` (k,) their squared singular values, and
    `targets` (n,) the regression targets.
    """
    count = len(targets)
    along = (left.T @ targets).square()
    outside = float((targets.square().sum() - along.sum()).clamp(min=0))
    alpha = beta = 1.0
    for _ in range(MAX_ITERATIONS):
        ratio = alpha / beta
        effective = float((power / (power + ratio)).sum())
        size = float((power * along / (power + ratio).square()).sum())
        error = float((along * (ratio / (power + ratio)).square()).sum()) + outside
        alpha, beta = effective / (size + EPSILON), (count - effective) / (error + EPSILON)
        if abs(alpha / beta - ratio) <= 1e-4 * ratio:
            break
    evidence = (
        len(power) / 2 * math.log(alpha)
        + count / 2 * math.log(beta / (2 * math.pi))
        - float((alpha + beta * power).log().sum()) / 2
        - (beta * error + alpha * size) / 2
    )
    return evidence / count, alpha, beta


def a_distance(first: Tensor, second: Tensor) -> float:
    """Return 2 (1 - 2 error), at least 0, of a linear classifier between features (n, d) and (m, d).

    Each half is classified by a ridge regression fitted to the other half, whose penalty maximises the
    evidence, as in `logme`.
    """
    vectors = torch.cat([first, second]).double()
    is_second = torch.arange(len(vectors)) >= len(first)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    halves = order[::2], order[1::2]
    errors = sum(
        int((_classify(vectors[fit], is_second[fit], vectors[test]) != is_second[test]).sum())
        for fit, test in (halves, halves[::-1])
    )
    return max(0.0, 2 * (1 - 2 * errors / len(vectors)))


def _classify(vectors: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Return the predicted labels (m,) bool of queries (m, d), fitted to vectors (n, d) and labels (n,)."""
    mean, share = vectors.mean(0), labels.double().mean()
    left, spread, right = torch.linalg.svd(vectors - mean, full_matrices=False)
    targets = labels.double() - share
    _, alpha, beta = _evidence(left, spread.square(), targets)
    weights = right.T @ (spread / (spread.square() + alpha / beta) * (left.T @ targets))
    predicted: Tensor = (queries - mean) @ weights + share > 0.5
    return predicted


def leep(shares: Tensor, answers: Tensor) -> float:
    """Return the mean log-likelihood of labels (n,) through a source's label shares (n, z)."""
    shares = shares.double()
    joint = functional.one_hot(answers).double().T @ shares / len(answers)
    conditional = joint / joint.sum(0).clamp(min=EPSILON)
    expected = (shares @ conditional.T).gather(1, answers[:, None]).squeeze(1)
    return float(expected.clamp(min=EPSILON).log().mean())


def rank_sources(
    registry: Registry, target: Task, names: Sequence[str] | None, limit: int
) -> list[Ranked]:
    """Return adapters of the pool ranked as sources; see AdapterHub.rank_sources."""
    mixes = _loadable_mixes(registry) if names is None else registry.resolve(list(names))
    if not mixes:
        raise UsageError(f"there are no adapters in {registry.pool.root} to rank as sources")
    sources, examples = {str(mix): mix for mix in mixes}, sample(target.split("train"), limit)
    distances = _distances(registry, list(sources), target, limit)
    return rank(registry.model, target, examples, list(sources.items()), distances)


def _loadable_mixes(registry: Registry) -> list[Mix]:
    """Return a mix for each adapter of the pool; warn of those that cannot be loaded."""
    mixes: list[Mix] = []
    for name in registry.pool.names():
        try:
            (mix,) = registry.resolve([name])
            registry.with_stack_bases(mix)
        except AdapterError as error:
            warn(f"{name} is left out: {error}")
        else:
            mixes.append(mix)
    return mixes


def _distances(
    registry: Registry, names: Sequence[str], target: Task, limit: int
) -> dict[str, float]:
    """Return the proxy A-distance to the target of each source whose tasks can be loaded."""
    distances, target_features = {}, _features_of(registry, [target], limit)
    for name in names:
        loaded = registry.known(name)
        with suppress(AdapterHubError):  # a task or its data is not available: no distance
            if tasks := load_trained_tasks(loaded.manifest if loaded else None, name):
                features_of_source = _features_of(registry, tasks, limit)
                distances[name] = a_distance(features_of_source, target_features)
    return distances


def _features_of(registry: Registry, tasks: Sequence[Task], limit: int) -> Tensor:
    """Return the bare backbone's mean features (messages, hidden) of up to `limit` messages of tasks."""
    texts = messages_in(tasks, "train", limit)
    return features(
        registry.model,
        PromptContract(),
        [Example({"text": text}, "") for text in texts],
        NO_ADAPTER,
    )
