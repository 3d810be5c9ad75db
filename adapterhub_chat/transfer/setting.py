"""TransferProblem: the source adapter, the target, its shots, and the validation examples or their proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import unknown_token_share
from adapterhub_chat.data.splits import sample
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import DataError, join_misfits, warn
from adapterhub_chat.lora.weights import AdapterWeights, Head, concatenate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import features
from adapterhub_chat.transfer.gate import MIN_ITEMS, stratified
from adapterhub_chat.transfer.maxent import balanced, drawn, principal
from adapterhub_chat.types import SPLITS, Example, Mix

MAX_DIRECTIONS = 16
"""Number of principal directions of the features that entropy balancing matches."""
MAX_UNKNOWN_SHARE, NUM_CHECKED = 0.3, 50
"""Share of unknown tokens from which on a target's language gets a warning; number of examples checked."""


@dataclass(frozen=True)
class TransferProblem:
    """A source adapter with its examples, and a target with few labelled examples."""

    source: AdapterWeights
    """The source adapter, its scale multiplied into the factors."""
    source_examples: Sequence[Example]
    target: Task
    shots: Sequence[Example]
    """The labelled training examples of the target that are used."""
    validation: Sequence[Example]
    """Labelled examples of the target for the verdicts; see `proxy` if it has none."""
    config: TrainConfig
    unlabelled: Sequence[Example] = ()
    """Examples of the target whose answers are not used."""
    layer: int = -1
    """Number of the block whose hidden states are compared."""
    stack_layers: str | None = None
    """The blocks in which a stack's T acts, as a slice such as `0:8`; None: as the config says."""
    foreign: bool = False
    """Whether the target's language is not the source's."""
    proxies: Sequence[Example] = ()
    """If the target has no labels: validation examples of the source from which the proxy is drawn."""
    proxy: str = ""
    """If the target has no labels: a sentence on the proxy that the verdicts rest on."""
    level: float | None = None
    """Mean log-likelihood that the reweighted source must reach; None: what the effective size allows."""


def make_problem(
    source: AdapterWeights,
    source_task: Task,
    target: Task,
    shots: int,
    config: TrainConfig,
    *,
    unlabelled: Sequence[Example] | None = None,
    labels: Sequence[str] | None = None,
) -> TransferProblem:
    """Check that source and target fit, and draw the examples; raise one DataError with all misfits.

    `unlabelled` None: the target's training examples other than the shots, without their answers. `labels`
    are the source adapter's labels in the order of its head (None: those of its task).
    """
    source_labels = list(source_task.contract.labels if labels is None else labels)
    no_labels = bool(unlabelled) and not any(target.split(split) for split in SPLITS)
    drawn_shots = (
        shots_of(target, shots, config.seed) if len(target.split("train")) >= shots else []
    )
    misfits = [
        *_label_misfits(source, source_labels, target),
        *_split_misfits(source_task, target, shots, no_labels=no_labels),
        *_shot_misfits(target, drawn_shots),
    ]
    if misfits:
        raise DataError(join_misfits("the transfer", misfits))
    if unlabelled is None:
        used = {id(example) for example in drawn_shots}
        unlabelled = [e for e in target.split("train") if id(e) not in used]
    source_examples = sample(source_task.split("train"), config.train_examples, config.seed)
    validation = sample(target.split("validation"), config.eval_examples)
    _warn_of_few(target, validation)
    proxies = sample(source_task.split("validation"), config.eval_examples) if no_labels else []
    aligned = _aligned(source, source_labels, list(target.contract.labels))
    return TransferProblem(
        source=concatenate([aligned]),
        source_examples=source_examples,
        target=target,
        shots=drawn_shots,
        validation=validation,
        config=config,
        unlabelled=sample(unlabelled, len(source_examples), config.seed),
        foreign=source_task.language != target.language,
        proxies=proxies,
    )


def _label_misfits(source: AdapterWeights, source_labels: list[str], target: Task) -> Iterator[str]:
    """Yield what is wrong with the source's numbers, and where its labels are not the target's."""
    if not source.is_finite:
        yield "the source adapter has numbers that are not finite; train or pull it again"
    known, required = set(source_labels), set(target.contract.labels)
    if known != required:
        yield (
            f"the source's labels are {_listed(known)}, the target's {_listed(required)}: "
            "they must be the same"
        )
    if source.head and source.labels != len(source_labels):
        yield f"the source's head knows {source.labels} labels, not {len(source_labels)}"


def _split_misfits(
    source_task: Task, target: Task, shots: int, *, no_labels: bool
) -> Iterator[str]:
    """Yield which splits of source and target have too few examples.

    With `no_labels` the target has only texts; then the source's validation examples take part as a proxy.
    """
    num_training = len(target.split("train"))
    if num_training < shots:
        cure = "; with 0 shots its texts alone are learnt from" if no_labels else ""
        yield f"the target has {num_training} training examples, {shots} shots are asked for{cure}"
    if not target.split("validation") and not (no_labels and source_task.split("validation")):
        yield (
            "the target has no validation examples: nothing says whether a transfer helps; hold some of its "
            "labelled examples back"
        )
    if not source_task.split("train"):
        yield "the source has no training examples"


def _shot_misfits(target: Task, shots: Sequence[Example]) -> Iterator[str]:
    """Yield whether all shots have the same label."""
    if shots and target.contract.labels and len({example.answer for example in shots}) < 2:
        yield f"all {len(shots)} shots of the target have the label {shots[0].answer!r}"


def _warn_of_few(target: Task, validation: Sequence[Example]) -> None:
    """Warn if validation examples are too few, or all of one label, to tell candidates apart."""
    if 0 < len(validation) < MIN_ITEMS:
        warn(
            f"{target.name} has {len(validation)} validation examples, which prove nothing: every verdict is "
            f"neutral with fewer than {MIN_ITEMS}"
        )
    elif validation and target.contract.labels and len({e.answer for e in validation}) < 2:
        warn(
            f"all {len(validation)} validation examples of {target.name} have the label "
            f"{validation[0].answer!r}: whoever always says so looks perfect"
        )


def proxy_validation(model: AdapterModel, problem: TransferProblem) -> TransferProblem:
    """Return the problem with validation examples of the source as a proxy of the target's.

    They are drawn by entropy-balancing weights, as many as the effective sample size, so that their mean
    features are the target's (importance-weighted validation, Sugiyama et al. 2007,
    jmlr.org/papers/v8/sugiyama07a.html).
    """
    weighting = balanced(*balancing_features(model, problem, problem.proxies))
    count = max(1, round(weighting.effective * len(problem.proxies)))
    indices = drawn(weighting.weights, count)
    validation = [replace(problem.proxies[i], contract=None) for i in indices]
    proxy = (
        f"no example of {problem.target.name} has a label, so the verdicts rest on a proxy: {count} "
        "validation examples of the source, drawn so that they look like the target's texts. How the "
        "target would be labelled they cannot tell"
    )
    proxy += f"; {weighting.note}" if weighting.note else ""
    return replace(problem, validation=validation, proxy=proxy)


def warn_of_language(tokenizer: Any, problem: TransferProblem) -> None:
    """Warn if much of the target's text is bytes or unknown tokens to the backbone's tokenizer."""
    examples = (problem.validation or problem.unlabelled)[:NUM_CHECKED]
    texts = [" ".join(e.fields.values()) for e in examples]
    if (share := unknown_token_share(tokenizer, texts)) >= MAX_UNKNOWN_SHARE:
        warn(
            f"{share:.0%} of the tokens of {problem.target.name} ({problem.target.language}) are bytes or "
            "unknown to this backbone, which has hardly read the language: expect little, or choose a "
            "backbone that speaks it"
        )


def shots_of(target: Task, count: int, seed: int) -> list[Example]:
    """Return `count` training examples of a target, stratified by label."""
    examples = target.split("train")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [e.answer if target.contract.labels else "" for e in examples]
    return [examples[i] for i in stratified(labels, count, order)]


def balancing_features(
    model: AdapterModel, problem: TransferProblem, source_examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Return the bare backbone's features of source examples and of the target's texts, (n, k) and (m, k)."""
    source, target = (
        features(
            model,
            problem.target.contract,
            [replace(example, contract=None) for example in examples],
            Mix(),
            layer=problem.layer,
        )
        for examples in (source_examples, problem.unlabelled)
    )
    return principal(source, target, MAX_DIRECTIONS)


def _aligned(
    source: AdapterWeights, source_labels: list[str], target_labels: list[str]
) -> AdapterWeights:
    """Return the source with the rows of its head, if it has one, in the order of the target's labels."""
    if source.head is None or source_labels == target_labels:
        return source
    order = [source_labels.index(label) for label in target_labels]
    return replace(source, head=Head(source.head.weight[order], source.head.bias[order]))


def _listed(labels: set[str]) -> str:
    return ", ".join(sorted(labels)) or "none"
