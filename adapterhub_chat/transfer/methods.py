"""The transfer methods: each is a job or two for the one training loop, so that all share its batches.

target: few-shot, the baseline. finetune: the same from the source's weights. stack: T under the frozen
source, f_T = f_S o T. maxent: the source's examples, weighted by how the target would label them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import DataError, join_misfits
from adapterhub_chat.evaluate import label_scores, sequence_losses
from adapterhub_chat.jobs import Job, sample
from adapterhub_chat.learner import Trained
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.task import Task
from adapterhub_chat.template import Encoded, encode_examples
from adapterhub_chat.transfer.maxent import Weighting, reweighted
from adapterhub_chat.transfer.select import stratified
from adapterhub_chat.types import Example, Mix
from adapterhub_chat.weights import AdapterWeights, Head, concatenate

BASELINE, METHODS = "target", ("target", "finetune", "stack", "maxent")
SHOT_SHARE = 0.2
"""Share of the target's own examples among those of `maxent`, by repeating them."""


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
    config: TrainConfig


def make_setting(
    source: AdapterWeights, source_task: Task, target: Task, shots: int, config: TrainConfig
) -> Setting:
    """Draw the examples; raise DataError for everything in which source and target do not fit."""
    found = []
    own, wanted = set(source_task.contract.labels), set(target.contract.labels)
    if own != wanted:
        found.append(
            f"the source's labels are {_listed(own)}, the target's {_listed(wanted)}: they must be the same"
        )
    pool = target.split("train")
    if shots and len(pool) < shots:
        found.append(f"the target has {len(pool)} training examples, {shots} shots are asked for")
    if not target.split("validation"):
        found.append("the target has no validation examples: nothing says whether a transfer helps")
    chosen = shots_of(target, shots, config.seed) if shots and len(pool) >= shots else []
    if chosen and wanted and len({e.answer for e in chosen}) < 2:
        found.append(f"all {shots} shots of the target have the label {chosen[0].answer!r}")
    if not source_task.split("train"):
        found.append("the source has no training examples")
    if found:
        raise DataError(join_misfits("the transfer", found))
    examples = sample(source_task.split("train"), config.train_examples, config.seed)
    held_out = sample(target.split("validation"), config.eval_examples)
    source = _aligned(source, list(source_task.contract.labels), list(target.contract.labels))
    return Setting(concatenate([source]), examples, target, chosen, held_out, config)


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
    checked = _encoded(tokenizer, setting, setting.validation)
    fresh = Job(
        "target", learnt, checked, setting.config, labels=len(setting.target.contract.labels)
    )
    source = setting.source
    as_source = setting.config.model_copy(
        update={"rank": source.max_rank, "alpha": float(source.max_rank), "rslora": False}
    )
    jobs = {
        "target": fresh,
        "finetune": replace(fresh, name="finetune", config=as_source, start=source),
        "stack": replace(fresh, name="stack", under=source),
    }
    return [job for name, job in jobs.items() if name in methods or name == BASELINE]


def maxent_job(
    model: AdapterModel, setting: Setting, teacher: Mix, share: float
) -> tuple[Job, Weighting]:
    """Return the job on the reweighted source and the shots; `teacher` is who says p_T (y | x)."""
    tokenizer = model.backbone.tokenizer
    weighting = reweighted(likelihoods(model, setting, teacher), share=share)
    source = [
        replace(example, weight=weight)
        for example, weight in zip(
            _encoded(tokenizer, setting, setting.source_examples),
            weighting.weights.tolist(),
            strict=True,
        )
        if weight > 0
    ]
    shots = _encoded(tokenizer, setting, setting.shots)
    times = round(SHOT_SHARE / (1 - SHOT_SHARE) * len(source) / len(shots)) if shots else 0
    checked = _encoded(tokenizer, setting, setting.validation)
    learnt, labels = [*source, *shots * max(1, times)], len(setting.target.contract.labels)
    return Job("maxent", learnt, checked, setting.config, labels=labels), weighting


def likelihoods(model: AdapterModel, setting: Setting, teacher: Mix) -> Tensor:
    """Return log p_T(y_i | x_i) of the source's labels under the target's contract, (n,)."""
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
    return concatenate([setting.source, trained.weights]) if name == "stack" else trained.weights


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
