"""Encoders as backbones: BERT's family, read through features of a text instead of next tokens.

An adapter brings its own head, so what the checkpoint has of a head is taken off. A checkpoint with a trained
pooling layer is read through it, at the first token, as transformers' classifying class and therefore PEFT
do; a sentence encoder, or a checkpoint without that layer, by the mean over its tokens (arXiv 1908.10084).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import cached_file

from adapterhub_chat.data.packing import Batch
from adapterhub_chat.errors import UsageError
from adapterhub_chat.model.pooling import group_means

Pooling = Literal["first", "mean"]
FAMILIES = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
"""Model types with position ids and features as they are used here."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
SENTENCES = ("modules.json", "1_Pooling/config.json")
"""What a folder of sentence-transformers has."""


def is_encoder(folder: str) -> bool:
    """Return whether a checkpoint (folder or Hub id) is an encoder; raise UsageError for an unknown one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    masked = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    made = (config.architectures or [""])[0]
    if config.model_type not in masked or config.is_encoder_decoder or made.endswith(CAUSAL):
        return False
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{folder} is an encoder of the family {config.model_type!r}; allowed are {', '.join(FAMILIES)}"
        )
    return True


def load_encoder(folder: str, options: dict[str, Any]) -> tuple[Any, Pooling]:
    """Return the classifying model of a checkpoint, its head taken off, and how features are made."""
    logs = transformers.utils.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()  # else it reports that head and pooling layer are new
    try:
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, **options
        )
    finally:
        logs.set_verbosity(level)
    base = model.base_model
    for name, child in model.named_children():
        if child is not base:
            setattr(model, name, nn.Identity())
    missing = any("pooler." in key for key in told["missing_keys"])
    pooled = hasattr(getattr(base, "pooler", None), "dense") and not missing
    if not pooled or any(_has(folder, name) for name in SENTENCES):
        base.pooler = None
        return model, "mean"
    return model, "first"


def _has(folder: str, file: str) -> bool:
    found = cached_file(
        folder,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def first_position(config: Any) -> int:
    """Return the position id of a text's first token: RoBERTa's family counts from behind its padding."""
    return int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0


def pooled(base: Any, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Return features (P, W), float32, of the pieces around the kept positions, from `hidden` (N, L, W).

    Every token goes through the pooling layer, so that rows stay rows for the adapter on it.
    """
    pieces = batch.pieces().flatten()
    wanted = pieces[batch.keep]
    if pooling == "first":
        every: Tensor = base.pooler.activation(base.pooler.dense(hidden)).flatten(0, 1)
        first = torch.full((int(pieces.max()) + 1,), len(pieces), device=pieces.device)
        places = torch.arange(len(pieces), device=pieces.device)
        first.scatter_reduce_(0, pieces, places, "amin")
        return every[first[wanted]].float()
    return group_means(hidden.flatten(0, 1), pieces, int(pieces.max()) + 1)[wanted]
