"""Encoders as backbones: the BERT family, with features of a text instead of next tokens.

An adapter has its own classification head, so a checkpoint's head is removed. A checkpoint with a trained
pooling layer is pooled by it, at the first token, as transformers' classification class and therefore PEFT
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
"""Supported model types."""
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names of causal language models."""
SENTENCE_TRANSFORMERS_FILES = ("modules.json", "1_Pooling/config.json")
"""Files of a sentence-transformers folder."""


def is_encoder(folder: str) -> bool:
    """Return whether a checkpoint (folder or Hub id) is an encoder.

    Raises UsageError for an encoder whose family is not supported.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    masked_types = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    class_name = (config.architectures or [""])[0]
    if (
        config.model_type not in masked_types
        or config.is_encoder_decoder
        or class_name.endswith(CAUSAL_SUFFIXES)
    ):
        return False
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{folder} is an encoder of the family {config.model_type!r}; allowed are {', '.join(FAMILIES)}"
        )
    return True


def load_encoder(folder: str, options: dict[str, Any]) -> tuple[Any, Pooling]:
    """Return the classification model of a checkpoint without its head, and how features are pooled."""
    logs = transformers.utils.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()  # else it reports that the head is new
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, **options
        )
    finally:
        logs.set_verbosity(level)
    base = model.base_model
    for name, child in model.named_children():
        if child is not base:
            setattr(model, name, nn.Identity())
    pooler_missing = any("pooler." in key for key in info["missing_keys"])
    has_pooler = hasattr(getattr(base, "pooler", None), "dense") and not pooler_missing
    if not has_pooler or any(_has_file(folder, name) for name in SENTENCE_TRANSFORMERS_FILES):
        base.pooler = None
        return model, "mean"
    return model, "first"


def _has_file(folder: str, file: str) -> bool:
    path = cached_file(
        folder,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path is not None


def first_position(config: Any) -> int:
    """Return the position id of a text's first token: in RoBERTa's family, the padding id plus 1."""
    return int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0


def pooled(base: Any, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Return features (P, W), float32, of the pieces at the predicting positions, from `hidden` (N, L, W).

    Every token goes through the pooling layer, so that an adapter on it sees rows.
    """
    pieces = batch.pieces().flatten()
    targets = pieces[batch.keep]
    if pooling == "first":
        states: Tensor = base.pooler.activation(base.pooler.dense(hidden)).flatten(0, 1)
        first = torch.full((int(pieces.max()) + 1,), len(pieces), device=pieces.device)
        indices = torch.arange(len(pieces), device=pieces.device)
        first.scatter_reduce_(0, pieces, indices, "amin")
        return states[first[targets]].float()
    return group_means(hidden.flatten(0, 1), pieces, int(pieces.max()) + 1)[targets]
