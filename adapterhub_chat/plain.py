"""The backbone as a model of transformers' own: unpacked, with nothing attached; and as a folder."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers

from adapterhub_chat.backbone import Backbone, Quantize, load_backbone, quiet
from adapterhub_chat.quantized import dense


def plain_copy(backbone: Backbone) -> Any:
    """Return transformers' own model with the same numbers, unpacked, to which nothing is attached."""
    config = copy.deepcopy(backbone.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=backbone.dtype, attn_implementation="sdpa"
        )
    with suppress(ValueError):  # transformers reads a contradictory one, but does not write it
        backbone.model.generation_config.validate(strict=True)
        model.generation_config = copy.deepcopy(backbone.model.generation_config)
    model.to(backbone.device).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        module = backbone.model.get_submodule(layer)
        parameter.copy_(dense(module) if kind == "weight" else getattr(module, kind))
    return model


def save_plain(backbone: Backbone, model: Any, folder: Path, quantize: Quantize | None) -> None:
    """Write a plain copy with the backbone's tokenizer, as `from_pretrained` reads it, packed if asked."""
    with quiet():
        model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        if quantize is not None:
            packed = load_backbone(
                str(folder), dtype=backbone.dtype, device=backbone.device, quantize=quantize
            )
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            packed.model.save_pretrained(folder)
