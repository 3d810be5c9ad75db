"""The transfer methods as jobs of the training loop, so that all methods are trained in the same batches.

target: few-shot training, the baseline. finetune: the same from the source's weights. stack: an adapter T on
top of the frozen source, f_T = f_S o T. language: a stack whose T has learnt the target's text first
(language.py). maxent: the source's examples, weighted by the target's likelihood of their labels, or, without
labels of the target, so that their mean features are the target's. adversarial: see adversarial.py.
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
from adapterhub_chat.transfer.setting import TransferProblem, balancing_features
from adapterhub_chat.types import Example, Mix

BASELINE = "target"
STACKS = ("stack", LANGUAGE)
METHODS = (BASELINE, "finetune", *STACKS, "maxent", "adversarial")
SHOT_SHARE = 0.2
"""Share of the target's own examples among the labelled ones of `maxent` and `adversarial`, by repeating."""
TEXT_SHARE = 0.3
"""Unlabelled texts of the target per example of the source in `adversarial`. Few suffice, because the
discriminator stores states, and texts take the place of labelled examples in a batch."""


def few_shot_jobs(tokenizer: object, problem: TransferProblem, methods: Sequence[str]) -> list[Job]:
    """Return the jobs that learn from the shots alone: of `target`, `finetune` and `stack`."""
    if not problem.shots:
        return []
    training = _encoded(tokenizer, problem, problem.shots)
    validation = _validation(tokenizer, problem)
    labels = len(problem.target.contract.labels)
    target = Job("target", training, validation, problem.config, labels=labels)
    jobs = {
        "target": target,
        "finetune": replace(
            _from_source(problem, "finetune"), train=training, validation=validation
        ),
        "stack": replace(
            target, name="stack", frozen=problem.source, config=_stack_config(problem)
        ),
    }
    return [job for name, job in jobs.items() if name in methods or name == BASELINE]


def language_job(model: AdapterModel, problem: TransferProblem) -> Job:
    """Return the job of a T that learns the target's text, with half of the steps if there are shots."""
    return text_job(model, problem.target.contract, problem.unlabelled, _language_config(problem))


def language_stack(tokenizer: object, problem: TransferProblem, start: AdapterWeights) -> Job:
    """Return the job that trains the T of `language_job`, from `start`, on the shots under the source."""
    (stack,) = (j for j in few_shot_jobs(tokenizer, problem, ["stack"]) if j.name == "stack")
    return replace(stack, name=LANGUAGE, start=start, config=_language_config(problem))


def _language_config(problem: TransferProblem) -> TrainConfig:
    """Return the settings of one of the two jobs of `language`; without shots there is only one."""
    steps = problem.config.max_steps
    return _stack_config(problem).model_copy(
        update={"max_steps": -(-steps // 2) if problem.shots else steps}
    )


def _stack_config(problem: TransferProblem) -> TrainConfig:
    """Return the settings of a T, which may be restricted to the first blocks by `stack_layers`."""
    layers = problem.stack_layers or problem.config.layers
    return problem.config.model_copy(update={"layers": layers})


def maxent_job(
    model: AdapterModel, problem: TransferProblem, teacher: Mix, share: float
) -> tuple[Job, Weighting]:
    """Return the job on the reweighted source and the shots; `teacher` is the mix that gives p_T(y | x).

    Without shots, but with unlabelled texts, the weights balance the features instead. The job starts from
    the source's weights.
    """
    tokenizer = model.backbone.tokenizer
    if problem.unlabelled and not problem.shots:
        weighting = balanced(*balancing_features(model, problem, problem.source_examples))
    else:
        log_likelihood = label_log_likelihoods(model, problem, teacher)
        level = problem.level
        weighting = (
            reweighted(log_likelihood, share=share)
            if level is None
            else at_level(log_likelihood, level)
        )
    source = [
        replace(example, weight=weight)
        for example, weight in zip(
            _encoded(tokenizer, problem, problem.source_examples),
            weighting.weights.tolist(),
            strict=True,
        )
        if weight > 0
    ]
    job = replace(_from_source(problem, "maxent"), train=[*source, *_shots(tokenizer, problem)])
    return replace(job, validation=_validation(tokenizer, problem)), weighting


def adversarial_job(
    model: AdapterModel, problem: TransferProblem
) -> tuple[Job, DomainDiscriminator]:
    """Return the job on source, shots and unlabelled texts, from the source's weights; its discriminator."""
    tokenizer, contract = model.backbone.tokenizer, problem.target.contract
    labels = [ids[0] for ids in encode_labels(tokenizer, contract)] if contract.labels else []
    token = labels[0] if labels else int(tokenizer.eos_token_id)
    num_texts = max(1, round(TEXT_SHARE * len(problem.source_examples)))
    texts = sample(problem.unlabelled, num_texts, problem.config.seed)
    plain = [replace(example, contract=None) for example in texts]
    length = problem.config.row_length
    encoded_texts = encode_inputs(tokenizer, contract, plain, token=token, max_length=length)
    shots = [replace(example, domain=TARGET) for example in _shots(tokenizer, problem)]
    unlabelled = [replace(e, weight=0.0, domain=TARGET) for e in encoded_texts]
    source = _encoded(tokenizer, problem, problem.source_examples)
    job = replace(_from_source(problem, "adversarial"), train=[*source, *shots, *unlabelled])
    job = replace(job, validation=_validation(tokenizer, problem))
    discriminator = DomainDiscriminator(
        model.backbone.model.config.hidden_size,
        total_steps([job], job.config),
        layer=problem.layer,
        labels=labels if len(set(labels)) == len(labels) else (),
        seed=problem.config.seed,
    )
    return replace(job, auxiliary=discriminator), discriminator


def _from_source(problem: TransferProblem, name: str) -> Job:
    """Return a job without examples that starts from the source's weights."""
    source = problem.source
    changes = {"rank": source.max_rank, "alpha": float(source.max_rank), "rslora": False}
    config, labels = problem.config.model_copy(update=changes), len(problem.target.contract.labels)
    return Job(name, (), (), config, start=source, labels=labels)


def label_log_likelihoods(model: AdapterModel, problem: TransferProblem, teacher: Mix) -> Tensor:
    """Return log p_T(y_i | x_i) of the source's labels under the target's contract, (n,).

    For free answers it is the mean over the tokens, so that it does not depend on the length.
    """
    contract, examples = problem.target.contract, problem.source_examples
    if contract.labels:
        shares = label_scores(model, contract, examples, teacher)
        labels = list(contract.labels)
        columns = torch.tensor([labels.index(e.answer) for e in examples])
        return shares.gather(1, columns[:, None]).squeeze(1).clamp(min=1e-9).log()
    encoded = _encoded(model.backbone.tokenizer, problem, examples)
    lengths = torch.tensor([len(e.continuations[0]) for e in encoded])
    return -sequence_losses(model, encoded, teacher).squeeze(1) / lengths


def plain_weights(problem: TransferProblem, name: str, trained: Trained) -> AdapterWeights:
    """Return a method's result as a plain adapter: a stack is concatenated, ranks side by side."""
    return concatenate([problem.source, trained.weights]) if name in STACKS else trained.weights


def _shots(tokenizer: object, problem: TransferProblem) -> list[Encoded]:
    """Return the target's shots, repeated so that they are SHOT_SHARE of the labelled examples."""
    shots = _encoded(tokenizer, problem, problem.shots)
    if not shots:
        return []
    num_shots = SHOT_SHARE / (1 - SHOT_SHARE) * len(problem.source_examples)
    return shots * max(1, round(num_shots / len(shots)))


def _validation(tokenizer: object, problem: TransferProblem) -> list[Encoded]:
    """Return the validation examples; none if the only validation would be after the last step."""
    config = problem.config
    only_at_end = 0 < config.max_steps <= config.eval_every
    return [] if only_at_end else _encoded(tokenizer, problem, problem.validation)


def _encoded(
    tokenizer: object, problem: TransferProblem, examples: Sequence[Example]
) -> list[Encoded]:
    plain = [replace(example, contract=None) for example in examples]
    length = problem.config.row_length
    return encode_examples(tokenizer, problem.target.contract, plain, max_length=length)
