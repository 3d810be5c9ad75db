"""Arrow: routing by an adapter's weights alone, where it has no prototype (arXiv 2405.11157).

An adapter's arrow in a module is the first right singular vector v of B A, the input direction to which the
update responds most; messages of the adapter's tasks have hidden states h along it. |v . h| / |h| is averaged
over the tokens and over the modules that read the same states as the block at which `early_states` ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub_chat.lora.lowrank import compress
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.route.message_features import message_states


def arrow_vectors(model: AdapterModel, weights: AdapterWeights) -> Tensor:
    """Return unit vectors (modules, H): the arrows of an adapter's modules that read the block's input."""
    hidden = model.backbone.model.get_input_embeddings().weight.shape[1]
    vectors = [
        _first_right_vector(a.double(), b.double())
        for name, (a, b) in sorted(weights.factors.items())
        if name.startswith(f"{model.early_block}.") and a.shape[1] == hidden
    ]
    return torch.stack(vectors) if vectors else torch.zeros(0, hidden, dtype=torch.float64)


def alignment(model: AdapterModel, text: str, vectors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean |cos| of a message's states and each adapter's arrows, in [0, 1]; 0 without arrows."""
    states = message_states(model, text)
    norm = _first_norm(model.backbone.model.get_submodule(model.early_block))
    with torch.inference_mode():
        inputs = functional.normalize(norm(states).double().cpu(), dim=-1)
    return {n: float((inputs @ v.T).abs().mean()) if len(v) else 0.0 for n, v in vectors.items()}


def _first_norm(block: nn.Module) -> nn.Module:
    """Return the normalisation that a block applies to its input, the identity if it has none."""
    named = ((name.lower(), child) for name, child in block.named_children())
    return next((child for name, child in named if "norm" in name or "ln" in name), nn.Identity())


def _first_right_vector(a: Tensor, b: Tensor) -> Tensor:
    """Return v of the largest singular value of b (out, r) @ a (r, in)."""
    (_, row), _, _ = compress((b, a), 1)
    return functional.normalize(row[0], dim=0)
