"""What a transfer starts from: source, target, shots and the proxy of a validation split."""

from __future__ import annotations

from collections.abc import Sequence
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

DIRECTIONS = 16
"""Of the features that entropy balancing matches."""
FOREIGN, LOOKED_AT = 0.3, 50
"""Share of a language's tokens that are no text by themselves from which on it is worth a warning, and how
many examples are looked at."""


@dataclass(frozen=True)
class TransferProblem:
    """Who teaches whom: a source adapter with its examples, and a target with few of its own."""

    source: AdapterWeights
    """The source adapter, scaled into its factors."""
    source_examples: Sequence[Example]
    target: Task
    shots: Sequence[Example]
    """The target's labelled training examples that may be used."""
    validation: Sequence[Example]
    """Labelled examples of the target to judge by; see `proxy` where it has none."""
    config: TrainConfig
    unlabelled: Sequence[Example] = ()
    """Target examples whose answers nobody looks at."""
    layer: int = -1
    """The block whose hidden states are compared."""
    stack_layers: str | None = None
    """The blocks in which a stack's T acts, as a slice such as `0:8`; None: as the config says."""
    foreign: bool = False
    """The target speaks another language than the source."""
    stand_ins: Sequence[Example] = ()
    """Where the target has no label at all: held-out examples of the source, to be judged by in its place."""
    proxy: str = ""
    """What the verdicts rest on then."""
    level: float | None = None
    """Mean log-likelihood that the reweighted source shall reach; None: as the effective size allows."""


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
    """Draw the examples; raise DataError for everything in which source and target do not fit.

    `unlabelled` None: the target's training examples other than the shots, without their answers. `labels`
    are the source adapter's own, in its order (None: its task's).
    """
    found = []
    if not source.is_finite:
        found.append("the source adapter has numbers that are not finite; train or pull it again")
    order = list(source_task.contract.labels if labels is None else labels)
    own, wanted = set(order), set(target.contract.labels)
    if own != wanted:
        found.append(
            f"the source's labels are {_listed(own)}, the target's {_listed(wanted)}: they must be the same"
        )
    if source.head and source.labels != len(order):
        found.append(f"the source's head knows {source.labels} labels, not {len(order)}")
    pool = target.split("train")
    bare = bool(unlabelled) and not any(target.split(split) for split in SPLITS)
    if shots and len(pool) < shots:
        cure = "; with 0 shots its texts alone are learnt from" if bare else ""
        found.append(
            f"the target has {len(pool)} training examples, {shots} shots are asked for{cure}"
        )
    if not target.split("validation") and not (bare and source_task.split("validation")):
        found.append(
            "the target has no validation examples: nothing says whether a transfer helps; hold some of its "
            "labelled examples back"
        )
    chosen = shots_of(target, shots, config.seed) if shots and len(pool) >= shots else []
    if chosen and wanted and len({e.answer for e in chosen}) < 2:
        found.append(f"all {shots} shots of the target have the label {chosen[0].answer!r}")
    if not source_task.split("train"):
        found.append("the source has no training examples")
    if found:
        raise DataError(join_misfits("the transfer", found))
    examples = sample(source_task.split("train"), config.train_examples, config.seed)
    held_out = sample(target.split("validation"), config.eval_examples)
    if unlabelled is None:
        taken = {id(e) for e in chosen}
        unlabelled = [e for e in pool if id(e) not in taken]
    texts = sample(unlabelled, len(examples), config.seed)
    _warn_of_few(target, held_out)
    source = _aligned(source, order, list(target.contract.labels))
    setting = TransferProblem(
        concatenate([source]), examples, target, chosen, held_out, config, texts
    )
    stand_ins = sample(source_task.split("validation"), config.eval_examples) if bare else []
    foreign = source_task.language != target.language
    return replace(setting, foreign=foreign, stand_ins=stand_ins)


def _warn_of_few(target: Task, held_out: Sequence[Example]) -> None:
    """Warn where validation examples cannot tell good from bad."""
    if 0 < len(held_out) < MIN_ITEMS:
        warn(
            f"{target.name} has {len(held_out)} validation examples, which prove nothing: every verdict is "
            f"neutral with fewer than {MIN_ITEMS}"
        )
    elif held_out and target.contract.labels and len({e.answer for e in held_out}) < 2:
        warn(
            f"all {len(held_out)} validation examples of {target.name} have the label "
            f"{held_out[0].answer!r}: whoever always says so looks perfect"
        )


def proxy_validation(model: AdapterModel, setting: TransferProblem) -> TransferProblem:
    """Return the setting of a target without labels judged by proxy: as importance weighting would.

    The source's held-out examples are drawn by entropy-balancing weights, as many as these are worth, so
    that their mean features are the target's (importance-weighted validation, Sugiyama et al. 2007,
    jmlr.org/papers/v8/sugiyama07a.html).
    """
    weighting = balanced(*_features(model, setting, setting.stand_ins))
    count = max(1, round(weighting.effective * len(setting.stand_ins)))
    own = [replace(setting.stand_ins[i], contract=None) for i in drawn(weighting.weights, count)]
    proxy = (
        f"no example of {setting.target.name} has a label, so the verdicts rest on a proxy: {count} "
        "validation examples of the source, drawn so that they look like the target's texts. How the "
        "target would be labelled they cannot tell"
    )
    proxy += f"; {weighting.note}" if weighting.note else ""
    return replace(setting, validation=own, proxy=proxy)


def warn_of_language(tokenizer: Any, setting: TransferProblem) -> None:
    """Warn where much of the target's text is bytes or unknown tokens to the backbone's tokenizer."""
    seen = (setting.validation or setting.unlabelled)[:LOOKED_AT]
    texts = [" ".join(e.fields.values()) for e in seen]
    if (share := unknown_token_share(tokenizer, texts)) >= FOREIGN:
        warn(
            f"{share:.0%} of the tokens of {setting.target.name} ({setting.target.language}) are bytes or "
            "unknown to this backbone, which has hardly read the language: expect little, or choose a "
            "backbone that speaks it"
        )


def shots_of(target: Task, count: int, seed: int) -> list[Example]:
    """Return `count` training examples of a target, its labels in turn."""
    pool = target.split("train")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [e.answer if target.contract.labels else "" for e in pool]
    return [pool[i] for i in stratified(labels, count, order)]


def _features(
    model: AdapterModel, setting: TransferProblem, own: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Return the bare backbone's features of the source's `own` and the target's, along few directions."""
    source, target = (
        features(
            model,
            setting.target.contract,
            [replace(example, contract=None) for example in examples],
            Mix(),
            layer=setting.layer,
        )
        for examples in (own, setting.unlabelled)
    )
    return principal(source, target, DIRECTIONS)


def _aligned(source: AdapterWeights, own: list[str], wanted: list[str]) -> AdapterWeights:
    """Return an encoder's source adapter with the rows of its head in the order of the target's labels."""
    if source.head is None or own == wanted:
        return source
    order = [own.index(label) for label in wanted]
    return replace(source, head=Head(source.head.weight[order], source.head.bias[order]))


def _listed(labels: set[str]) -> str:
    return ", ".join(sorted(labels)) or "none"
