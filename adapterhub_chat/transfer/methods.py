"""The transfer methods: each is a job or two for the one training loop, so that all share its batches.

target: few-shot, the baseline. finetune: the same from the source's weights. stack: T under the frozen
source, f_T = f_S o T. language: a stack whose T has learnt the target's text first (language.py). maxent: the
source's examples, weighted by how the target would label them, or, where nobody knows, so that their features
are the target's on average. adversarial: see adversarial.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded, encode_examples, encode_labels
from adapterhub_chat.data.splits import sample
from adapterhub_chat.inference.likelihood import label_scores, sequence_losses
from adapterhub_chat.lora.weights import AdapterWeights, concatenate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import encode_inputs
from adapterhub_chat.training.job import Job
from adapterhub_chat.training.learner import Trained, total_steps
from adapterhub_chat.transfer.adversarial import TARGET, DomainDiscriminator
from adapterhub_chat.transfer.language import LANGUAGE, text_job
from adapterhub_chat.transfer.maxent import Weighting, at_level, balanced, reweighted
from adapterhub_chat.transfer.setting import TransferProblem, _features
from adapterhub_chat.types import Example, Mix

BASELINE = "target"
STACKS = ("stack", LANGUAGE)
METHODS = (BASELINE, "finetune", *STACKS, "maxent", "adversarial")
SHOT_SHARE = 0.2
"""Share of the target's own examples among the labelled ones of `maxent` and `adversarial`, by repeating."""
TEXT_SHARE = 0.3
"""Texts of the target without labels beside one example of the source in `adversarial`. Its discriminator
remembers, and they take the place of examples that teach."""


def few_shot_jobs(tokenizer: object, setting: TransferProblem, methods: Sequence[str]) -> list[Job]:
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


def language_job(model: AdapterModel, setting: TransferProblem) -> Job:
    """Return the job of a T that learns the target's text, with half of the steps where there are shots."""
    return text_job(model, setting.target.contract, setting.unlabelled, _share(setting))


def language_stack(tokenizer: object, setting: TransferProblem, learnt: AdapterWeights) -> Job:
    """Return the job of the T that has learnt the language: the shots, under the frozen source."""
    (stack,) = (j for j in few_shot_jobs(tokenizer, setting, ["stack"]) if j.name == "stack")
    return replace(stack, name=LANGUAGE, start=learnt, config=_share(setting))


def _share(setting: TransferProblem) -> TrainConfig:
    """Return the budget of one of `language`'s two turns; without shots there is but one."""
    steps = setting.config.max_steps
    return _of_t(setting).model_copy(
        update={"max_steps": -(-steps // 2) if setting.shots else steps}
    )


def _of_t(setting: TransferProblem) -> TrainConfig:
    """Return the settings of a T, which may act on the input side of the network alone."""
    layers = setting.stack_layers or setting.config.layers
    return setting.config.model_copy(update={"layers": layers})


def maxent_job(
    model: AdapterModel, setting: TransferProblem, teacher: Mix, share: float
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


def adversarial_job(
    model: AdapterModel, setting: TransferProblem
) -> tuple[Job, DomainDiscriminator]:
    """Return the job on source, shots and unlabelled text, from the source's weights, and its game."""
    tokenizer, contract = model.backbone.tokenizer, setting.target.contract
    labels = [ids[0] for ids in encode_labels(tokenizer, contract)] if contract.labels else []
    token = labels[0] if labels else int(tokenizer.eos_token_id)
    number = max(1, round(TEXT_SHARE * len(setting.source_examples)))
    texts = sample(setting.unlabelled, number, setting.config.seed)
    plain = [replace(example, contract=None) for example in texts]
    length = setting.config.row_length
    asked = encode_inputs(tokenizer, contract, plain, token=token, max_length=length)
    known = [replace(example, domain=TARGET) for example in _shots(tokenizer, setting)]
    own = [replace(example, weight=0.0, domain=TARGET) for example in asked]
    source = _encoded(tokenizer, setting, setting.source_examples)
    job = replace(_from_source(setting, "adversarial"), train=[*source, *known, *own])
    job = replace(job, validation=_checked(tokenizer, setting))
    game = DomainDiscriminator(
        model.backbone.model.config.hidden_size,
        total_steps([job], job.config),
        layer=setting.layer,
        labels=labels if len(set(labels)) == len(labels) else (),
        seed=setting.config.seed,
    )
    return replace(job, auxiliary=game), game


def _from_source(setting: TransferProblem, name: str) -> Job:
    """Return a job without examples that starts from the source's weights."""
    source = setting.source
    scaled = {"rank": source.max_rank, "alpha": float(source.max_rank), "rslora": False}
    config, labels = setting.config.model_copy(update=scaled), len(setting.target.contract.labels)
    return Job(name, (), (), config, start=source, labels=labels)


def likelihoods(model: AdapterModel, setting: TransferProblem, teacher: Mix) -> Tensor:
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


def finished(setting: TransferProblem, name: str, trained: Trained) -> AdapterWeights:
    """Return what a method made as a plain adapter: a stack is flattened, ranks side by side."""
    return concatenate([setting.source, trained.weights]) if name in STACKS else trained.weights


def _shots(tokenizer: object, setting: TransferProblem) -> list[Encoded]:
    """Return the target's shots, repeated so that they are SHOT_SHARE of the labelled examples."""
    shots = _encoded(tokenizer, setting, setting.shots)
    if not shots:
        return []
    wanted = SHOT_SHARE / (1 - SHOT_SHARE) * len(setting.source_examples)
    return shots * max(1, round(wanted / len(shots)))


def _checked(tokenizer: object, setting: TransferProblem) -> list[Encoded]:
    """Return what training is validated on: nothing, where that would only be after the last step."""
    config = setting.config
    at_the_end = 0 < config.max_steps <= config.eval_every
    return [] if at_the_end else _encoded(tokenizer, setting, setting.validation)


def _encoded(
    tokenizer: object, setting: TransferProblem, examples: Sequence[Example]
) -> list[Encoded]:
    plain = [replace(example, contract=None) for example in examples]
    length = setting.config.row_length
    return encode_examples(tokenizer, setting.target.contract, plain, max_length=length)
