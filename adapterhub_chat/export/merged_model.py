"""Export: a mix merged into the backbone's own weights, as a folder that plain transformers loads.

W' = W + sum_s M_s (alpha_s / r_s) B_s A_s, added in float32 and rounded once. Over a packed backbone (nf4,
int8) rounding W' again may undo what the adapter learnt. So every form is measured before one is chosen: how
far, in nats of KL, its next tokens are from those of the mix as it runs, unmerged.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adapterhub_chat.errors import AdapterError, PoolError, UsageError
from adapterhub_chat.evaluation.retention import divergence
from adapterhub_chat.inference.likelihood import next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone, Quantize, load_backbone
from adapterhub_chat.model.quantization import dense, rounded
from adapterhub_chat.model.resolve import quiet
from adapterhub_chat.pool.probe import probe_prompts
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import Mix

AUTO, MERGED, PACKED = "auto", "merged", "requantized"
FORMS = (AUTO, MERGED, PACKED)
MOST_DRIFT = 0.01
"""Nats of KL up to which `auto` takes a form for the mix as it runs."""


@dataclass(frozen=True)
class Exported:
    """A folder with the merged model."""

    path: Path
    form: str
    """merged (in the backbone's 16 or 32 bits), or requantized (packed as the backbone is)."""
    drift: Mapping[str, float]
    """Form -> mean KL (nats) of the next token, against the mix unmerged, over probe prompts."""


def export(
    registry: Registry, mix: Mix, folder: Path, form: str = AUTO, most_drift: float = MOST_DRIFT
) -> Exported:
    """Write the backbone with a mix merged into it; see AdapterHub.export."""
    backbone = registry.model.backbone
    _check(backbone, mix, folder, form)
    prompts = probe_prompts(backbone.tokenizer, registry.contract(mix))
    wanted = next_token_logits(registry.model, [Request(prompt, mix) for prompt in prompts])
    model = plain_copy(backbone)
    _add(model, registry.model, mix)
    drift = {MERGED: divergence(wanted, _logits(model, prompts))}
    if backbone.quantize is not None:
        with _packed(model, registry.model.shapes, backbone.quantize):
            drift[PACKED] = divergence(wanted, _logits(model, prompts))
    chosen = _choose(form, drift, most_drift)
    _write(backbone, model, folder, chosen)
    return Exported(folder, chosen, drift)


def _check(backbone: Backbone, mix: Mix, folder: Path, form: str) -> None:
    found = []
    if form not in FORMS:
        found.append(f"form {form!r}: allowed are {', '.join(FORMS)}")
    if form == PACKED and backbone.quantize is None:
        found.append(f"form {PACKED!r}: this backbone is not quantized; load it with quantize=...")
    if backbone.encodes:
        found.append(
            f"{backbone.name} is an encoder: an adapter's head is no part of it; use the folder"
        )
    if not mix.weights:
        found.append("there is no adapter to merge; name one")
    if os.path.lexists(folder):
        found.append(f"{folder} exists; name a new folder")
    if found:
        raise UsageError("; ".join(found))


@torch.no_grad()
def _add(merged: Any, model: AdapterModel, mix: Mix) -> None:
    """Add a mix's update to the plain model's weights, in float32."""
    with model.slots.releasing(model.source.acquire(mix)) as held:  # with what a stack stands on
        adapters = [(model.weights(name), weight) for name, weight in held.mix.weights]
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
def _packed(model: Any, modules: Iterable[str], quantize: str) -> Iterator[None]:
    """Give the linear layers the numbers that they would have once packed, inside the block."""
    kept = {name: model.get_submodule(name).weight for name in modules}
    before = {name: weight.data for name, weight in kept.items()}
    for name, weight in kept.items():
        weight.data = rounded(before[name], quantize)
    try:
        yield
    finally:
        for name, weight in kept.items():
            weight.data = before[name]


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return float32 logits (prompts, vocab) of the token after each prompt, on the CPU."""
    each = (model(input_ids=torch.tensor([p], device=model.device)).logits[0, -1] for p in prompts)
    return torch.stack([row.float().cpu() for row in each])


def _choose(form: str, drift: Mapping[str, float], most: float) -> str:
    """Return the form asked for; for `auto` the smallest whose drift is no more than `most`."""
    if form != AUTO:
        return form
    for one in (PACKED, MERGED):
        if drift.get(one, math.inf) <= most:
            return one
    measured = ", ".join(f"{name} {value:.4f}" for name, value in drift.items())
    raise AdapterError(
        f"merged into this backbone the adapter changes its answers by more than {most:g} nats ({measured}): "
        "keep it unmerged, or name a form"
    )


def _write(backbone: Backbone, model: Any, folder: Path, form: str) -> None:
    """Write the folder under a temporary name, and rename it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-export-") as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            save_plain(backbone, model, made, backbone.quantize if form == PACKED else None)
            os.rename(made, folder)
    except OSError as error:
        raise PoolError(f"{folder} cannot be written: {error.strerror or error}") from error


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
