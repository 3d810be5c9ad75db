"""The transfer methods: each is a job or two for the one training loop, so that all share its batches.

target: few-shot, the baseline. finetune: the same from the source's weights. stack: T under the frozen
source, f_T = f_S o T. language: a stack whose T has learnt the target's text first (language.py). maxent: the
source's examples, weighted by how the target would label them, or, where nobody knows, so that their features
are the target's on average. adversarial: see adversarial.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import DataError, join_misfits
from adapterhub_chat.evaluate import label_scores, sequence_losses
from adapterhub_chat.features import features, questions
from adapterhub_chat.jobs import Job, sample
from adapterhub_chat.learner import Trained, total_steps
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.task import Task
from adapterhub_chat.template import Encoded, encode_examples, encode_labels, unwritable
from adapterhub_chat.transfer.adversarial import TARGET, Game
from adapterhub_chat.transfer.language import LANGUAGE, text_job
from adapterhub_chat.transfer.maxent import (
    Weighting,
    at_level,
    balanced,
    drawn,
    principal,
    reweighted,
)
from adapterhub_chat.transfer.select import FEWEST, stratified
from adapterhub_chat.types import SPLITS, Example, Mix
from adapterhub_chat.weights import AdapterWeights, Head, concatenate

BASELINE = "target"
STACKS = ("stack", LANGUAGE)
METHODS = (BASELINE, "finetune", *STACKS, "maxent", "adversarial")
SHOT_SHARE = 0.2
"""Share of the target's own examples among the labelled ones of `maxent` and `adversarial`, by repeating."""
TEXT_SHARE = 0.3
"""Texts of the target without labels beside one example of the source in `adversarial`. Its discriminator
remembers, and they take the place of examples that teach."""
DIRECTIONS = 16
"""Of the features that entropy balancing matches."""
FOREIGN, LOOKED_AT = 0.3, 50
"""Share of a language's tokens that are no text by themselves from which on it is worth a warning, and how
many examples are looked at."""


@dataclass(frozen=True)
class Setting:
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


def make_setting(
    source: AdapterWeights,
    source_task: Task,
    target: Task,
    shots: int,
    config: TrainConfig,
    *,
    unlabelled: Sequence[Example] | None = None,
    labels: Sequence[str] | None = None,
) -> Setting:
    """Draw the examples; raise DataError for everything in which source and target do not fit.

    `unlabelled` None: the target's training examples other than the shots, without their answers. `labels`
    are the source adapter's own, in its order (None: its task's).
    """
    found = []
    if not source.finite():
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
    setting = Setting(concatenate([source]), examples, target, chosen, held_out, config, texts)
    stand_ins = sample(source_task.split("validation"), config.eval_examples) if bare else []
    foreign = source_task.language != target.language
    return replace(setting, foreign=foreign, stand_ins=stand_ins)


def _warn_of_few(target: Task, held_out: Sequence[Example]) -> None:
    """Warn where validation examples cannot tell good from bad."""
    if 0 < len(held_out) < FEWEST:
        warnings.warn(
            f"{target.name} has {len(held_out)} validation examples, which prove nothing: every verdict is "
            f"neutral with fewer than {FEWEST}",
            stacklevel=3,
        )
    elif held_out and target.contract.labels and len({e.answer for e in held_out}) < 2:
        warnings.warn(
            f"all {len(held_out)} validation examples of {target.name} have the label "
            f"{held_out[0].answer!r}: whoever always says so looks perfect",
            stacklevel=3,
        )


def stood_in(model: AdapterModel, setting: Setting) -> Setting:
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


def warn_of_language(tokenizer: Any, setting: Setting) -> None:
    """Warn where much of the target's text is bytes or unknown tokens to the backbone's tokenizer."""
    seen = (setting.validation or setting.unlabelled)[:LOOKED_AT]
    texts = [" ".join(e.fields.values()) for e in seen]
    if (share := unwritable(tokenizer, texts)) >= FOREIGN:
        warnings.warn(
            f"{share:.0%} of the tokens of {setting.target.name} ({setting.target.language}) are bytes or "
            "unknown to this backbone, which has hardly read the language: expect little, or choose a "
            "backbone that speaks it",
            stacklevel=3,
        )


def shots_of(target: Task, count: int, seed: int) -> list[Example]:
    """Return `count` training examples of a target, its labels in turn."""
    pool = target.split("train")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [e.answer if target.contract.labels else "" for e in pool]
    return [pool[i] for i in stratified(labels, count, order)]


def few_shot_jobs(tokenizer: object, setting: Setting, methods: Sequence[str]) -> list[Job]:
    """Return the jobs that learn from the shots alone: of `target`, `finetune` and `stack`."""
    if not setting.shots:
        return []
    learnt = _encoded(tokenizer, setting, setting.shots)
    checked = _checked(tokenizer, setting)
    labels = len(setting.target.contract.labels)
    fresh = Job("target", learnt, checked, setting.config, labels=labels)
    jobs = {
        "target": fresh,
        "finetune": replace(_from_source(setting, "finetune"), train=learnt, validation=checked),
        "stack": replace(fresh, name="stack", under=setting.source, config=_of_t(setting)),
    }
    return [job for name, job in jobs.items() if name in methods or name == BASELINE]


def language_job(model: AdapterModel, setting: Setting) -> Job:
    """Return the job of a T that learns the target's text, with half of the steps where there are shots."""
    return text_job(model, setting.target.contract, setting.unlabelled, _share(setting))


def language_stack(tokenizer: object, setting: Setting, learnt: AdapterWeights) -> Job:
    """Return the job of the T that has learnt the language: the shots, under the frozen source."""
    (stack,) = (j for j in few_shot_jobs(tokenizer, setting, ["stack"]) if j.name == "stack")
    return replace(stack, name=LANGUAGE, start=learnt, config=_share(setting))


def _share(setting: Setting) -> TrainConfig:
    """Return the budget of one of `language`'s two turns; without shots there is but one."""
    steps = setting.config.max_steps
    return _of_t(setting).model_copy(
        update={"max_steps": -(-steps // 2) if setting.shots else steps}
    )


def _of_t(setting: Setting) -> TrainConfig:
    """Return the settings of a T, which may act on the input side of the network alone."""
    layers = setting.stack_layers or setting.config.layers
    return setting.config.model_copy(update={"layers": layers})


def maxent_job(
    model: AdapterModel, setting: Setting, teacher: Mix, share: float
) -> tuple[Job, Weighting]:
    """Return the job on the reweighted source and the shots; `teacher` is who says p_T (y | x).

    Without shots, but with unlabelled text, the weights bring the source's mean features to the target's. It
    starts from the source's weights, as what a short run can change.
    """
    tokenizer = model.backbone.tokenizer
    if setting.unlabelled and not setting.shots:
        weighting = balanced(*_features(model, setting, setting.source_examples))
    else:
        said = likelihoods(model, setting, teacher)
        level = setting.level
        weighting = reweighted(said, share=share) if level is None else at_level(said, level)
    source = [
        replace(example, weight=weight)
        for example, weight in zip(
            _encoded(tokenizer, setting, setting.source_examples),
            weighting.weights.tolist(),
            strict=True,
        )
        if weight > 0
    ]
    job = replace(_from_source(setting, "maxent"), train=[*source, *_shots(tokenizer, setting)])
    return replace(job, validation=_checked(tokenizer, setting)), weighting


def adversarial_job(model: AdapterModel, setting: Setting) -> tuple[Job, Game]:
    """Return the job on source, shots and unlabelled text, from the source's weights, and its game."""
    tokenizer, contract = model.backbone.tokenizer, setting.target.contract
    labels = [ids[0] for ids in encode_labels(tokenizer, contract)] if contract.labels else []
    token = labels[0] if labels else int(tokenizer.eos_token_id)
    number = max(1, round(TEXT_SHARE * len(setting.source_examples)))
    texts = sample(setting.unlabelled, number, setting.config.seed)
    plain = [replace(example, contract=None) for example in texts]
    length = setting.config.row_length
    asked = questions(tokenizer, contract, plain, token=token, max_length=length)
    known = [replace(example, domain=TARGET) for example in _shots(tokenizer, setting)]
    own = [replace(example, weight=0.0, domain=TARGET) for example in asked]
    source = _encoded(tokenizer, setting, setting.source_examples)
    job = replace(_from_source(setting, "adversarial"), train=[*source, *known, *own])
    job = replace(job, validation=_checked(tokenizer, setting))
    game = Game(
        model.backbone.model.config.hidden_size,
        total_steps([job], job.config),
        layer=setting.layer,
        labels=labels if len(set(labels)) == len(labels) else (),
        seed=setting.config.seed,
    )
    return replace(job, auxiliary=game), game


def _from_source(setting: Setting, name: str) -> Job:
    """Return a job without examples that starts from the source's weights."""
    source = setting.source
    scaled = {"rank": source.max_rank, "alpha": float(source.max_rank), "rslora": False}
    config, labels = setting.config.model_copy(update=scaled), len(setting.target.contract.labels)
    return Job(name, (), (), config, start=source, labels=labels)


def _features(
    model: AdapterModel, setting: Setting, own: Sequence[Example]
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


def likelihoods(model: AdapterModel, setting: Setting, teacher: Mix) -> Tensor:
    """Return log p_T(y_i | x_i) of the source's labels under the target's contract, (n,).

    Of a free answer it is the mean over its tokens: a long one is not unlikely for being long.
    """
    contract, examples = setting.target.contract, setting.source_examples
    if contract.labels:
        shares = label_scores(model, contract, examples, teacher)
        labels = list(contract.labels)
        columns = torch.tensor([labels.index(e.answer) for e in examples])
        return shares.gather(1, columns[:, None]).squeeze(1).clamp(min=1e-9).log()
    encoded = _encoded(model.backbone.tokenizer, setting, examples)
    lengths = torch.tensor([len(e.continuations[0]) for e in encoded])
    return -sequence_losses(model, encoded, teacher).squeeze(1) / lengths


def finished(setting: Setting, name: str, trained: Trained) -> AdapterWeights:
    """Return what a method made as a plain adapter: a stack is flattened, ranks side by side."""
    return concatenate([setting.source, trained.weights]) if name in STACKS else trained.weights


def _shots(tokenizer: object, setting: Setting) -> list[Encoded]:
    """Return the target's shots, repeated so that they are SHOT_SHARE of the labelled examples."""
    shots = _encoded(tokenizer, setting, setting.shots)
    if not shots:
        return []
    wanted = SHOT_SHARE / (1 - SHOT_SHARE) * len(setting.source_examples)
    return shots * max(1, round(wanted / len(shots)))


def _checked(tokenizer: object, setting: Setting) -> list[Encoded]:
    """Return what training is validated on: nothing, where that would only be after the last step."""
    config = setting.config
    at_the_end = 0 < config.max_steps <= config.eval_every
    return [] if at_the_end else _encoded(tokenizer, setting, setting.validation)


def _encoded(tokenizer: object, setting: Setting, examples: Sequence[Example]) -> list[Encoded]:
    plain = [replace(example, contract=None) for example in examples]
    length = setting.config.row_length
    return encode_examples(tokenizer, setting.target.contract, plain, max_length=length)


def _aligned(source: AdapterWeights, own: list[str], wanted: list[str]) -> AdapterWeights:
    """Return an encoder's source adapter with the rows of its head in the order of the target's labels."""
    if source.head is None or own == wanted:
        return source
    order = [own.index(label) for label in wanted]
    return replace(source, head=Head(source.head.weight[order], source.head.bias[order]))


def _listed(labels: set[str]) -> str:
    return ", ".join(sorted(labels)) or "none"
