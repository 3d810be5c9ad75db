"""Exports a mix merged into the backbone's weights, as a folder that plain transformers loads.

W' = W + sum_s M_s (alpha_s / r_s) B_s A_s, added in float32 and rounded once. Over a packed backbone (nf4,
int8) rounding W' again may undo what the adapter learnt. So the drift of every form is measured before one
is chosen: the KL divergence, in nats, of its next tokens from those of the unmerged mix.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adapterhub_chat.errors import AdapterError, PoolError, UsageError
from adapterhub_chat.evaluation.retention import mean_kl
from adapterhub_chat.files import new_folder
from adapterhub_chat.inference.likelihood import next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model import attention
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone, Quantize, load_backbone
from adapterhub_chat.model.quantization import dense, rounded
from adapterhub_chat.model.resolve import no_progress_bars
from adapterhub_chat.pool.probe import probe_prompts
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import Mix

AUTO, MERGED, PACKED = "auto", "merged", "requantized"
FORMS = (AUTO, MERGED, PACKED)
MOST_DRIFT = 0.01
"""Largest KL divergence (nats) from the unmerged mix that `auto` accepts."""


@dataclass(frozen=True)
class Exported:
    """A folder with the merged model."""

    path: Path
    form: str
    """`merged` (in the backbone's 16 or 32 bits) or `requantized` (quantized as the backbone is)."""
    drift: Mapping[str, float]
    """Form -> mean KL (nats) of the next token from the unmerged mix, over probe prompts."""


def export(
    registry: Registry, mix: Mix, folder: Path, form: str = AUTO, most_drift: float = MOST_DRIFT
) -> Exported:
    """Write the backbone with a mix merged into it; see AdapterHub.export."""
    backbone = registry.model.backbone
    _check(backbone, mix, folder, form)
    prompts = probe_prompts(backbone.tokenizer, registry.contract(mix))
    expected = next_token_logits(registry.model, [Request(prompt, mix) for prompt in prompts])
    model = plain_copy(backbone)
    _merge(model, registry.model, mix)
    drift = {MERGED: mean_kl(expected, _logits(model, prompts))}
    if backbone.quantize is not None:
        with _rounded(model, registry.model.shapes, backbone.quantize):
            drift[PACKED] = mean_kl(expected, _logits(model, prompts))
    chosen = _choose(form, drift, most_drift)
    _write(backbone, model, folder, chosen)
    return Exported(folder, chosen, drift)


def _check(backbone: Backbone, mix: Mix, folder: Path, form: str) -> None:
    misfits = []
    if form not in FORMS:
        misfits.append(f"form {form!r}: allowed are {', '.join(FORMS)}")
    if form == PACKED and backbone.quantize is None:
        misfits.append(
            f"form {PACKED!r}: this backbone is not quantized; load it with quantize=..."
        )
    if backbone.encodes:
        misfits.append(
            f"{backbone.name} is an encoder: an adapter's head is no part of it; use the folder"
        )
    if not mix.weights:
        misfits.append("there is no adapter to merge; name one")
    if os.path.lexists(folder):
        misfits.append(f"{folder} exists; name a new folder")
    if misfits:
        raise UsageError("; ".join(misfits))


@torch.no_grad()
def _merge(merged: Any, model: AdapterModel, mix: Mix) -> None:
    """Add a mix's update to the plain model's weights, in float32."""
    with model.slots.releasing(model.source.acquire(mix)) as lease:  # includes a stack's bases
        adapters = [(model.weights(name), weight) for name, weight in lease.mix.weights]
    for adapter, share in adapters:
        for module, (a, b) in adapter.factors.items():
            layer = merged.get_submodule(module)
            base = layer.weight
            update = b.float() @ a.float() * (share * adapter.scale(module))
            update = update if isinstance(layer, nn.Linear) else update.T  # Conv1D is (in, out)
            base.data = base.float() + update.to(base.device)
    for module in {module for adapter, _ in adapters for module in adapter.factors}:
        weight = merged.get_submodule(module).weight
        weight.data = weight.to(model.backbone.dtype)


@contextmanager
def _rounded(model: Any, modules: Iterable[str], quantize: str) -> Iterator[None]:
    """Round the linear layers' weights as quantization would, for the duration of the block."""
    weights = {name: model.get_submodule(name).weight for name in modules}
    originals = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = rounded(originals[name], quantize)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data = originals[name]


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return float32 logits (prompts, vocab) of the token after each prompt, on the CPU."""
    rows = (model(input_ids=torch.tensor([p], device=model.device)).logits[0, -1] for p in prompts)
    return torch.stack([row.float().cpu() for row in rows])


def _choose(form: str, drift: Mapping[str, float], max_drift: float) -> str:
    """Return the requested form; for `auto` the smallest form with a drift of at most `max_drift`."""
    if form != AUTO:
        return form
    for candidate in (PACKED, MERGED):
        if drift.get(candidate, math.inf) <= max_drift:
            return candidate
    measured = ", ".join(f"{name} {value:.4f}" for name, value in drift.items())
    raise AdapterError(
        f"merged into this backbone the adapter changes its answers by more than "
        f"{max_drift:g} nats ({measured}): "
        "keep it unmerged, or name a form"
    )


def _write(backbone: Backbone, model: Any, folder: Path, form: str) -> None:
    """Write the folder under a temporary name and rename it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as scratch:
            save_plain(backbone, model, scratch, backbone.quantize if form == PACKED else None)
    except OSError as error:
        raise PoolError(f"{folder} cannot be written: {error.strerror or error}") from error


def plain_copy(backbone: Backbone) -> Any:
    """Return transformers' own model with the same weights, dequantized, and nothing attached."""
    config = copy.deepcopy(backbone.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=backbone.dtype,
            attn_implementation=attention.NAME if backbone.asks_for_masks else None,
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
    """Write a plain copy and the tokenizer for `from_pretrained`, quantized if `quantize` is set."""
    with no_progress_bars():
        model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        if quantize is not None:
            packed = load_backbone(
                str(folder), dtype=backbone.dtype, device=backbone.device, quantize=quantize
            )
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            packed.model.save_pretrained(folder)
