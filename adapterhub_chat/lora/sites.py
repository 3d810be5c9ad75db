"""Sites: linear layers that share an input, and the selection of layers that an adapter changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterhub_chat.errors import UsageError


def select_targets(
    shapes: Mapping[str, tuple[int, int]], targets: str, layers: str = "all", field: str = "layers"
) -> dict[str, tuple[int, int]]:
    """Return the modules that `targets` and `layers` select, with their shapes.

    `targets` is `all-linear`, or last names such as `q_proj,v_proj`; `layers` is `all`, or a slice of
    block numbers such as `20:30` or `-8:`. Raises UsageError, naming the `field` and what is allowed.
    """
    names = [t.strip() for t in targets.split(",") if t.strip()]
    last_names = {module.rpartition(".")[2] for module in shapes}
    unknown = [t for t in names if t not in last_names]
    if targets != "all-linear" and (unknown or not names):
        problem = f"has no linear layer named {', '.join(unknown)}" if unknown else "needs a name"
        raise UsageError(
            f"targets={targets!r}: the backbone {problem}; "
            f"allowed are all-linear, {', '.join(sorted(last_names))}"
        )
    blocks = _selected_blocks(shapes, layers, field)
    return {
        module: shape
        for module, shape in shapes.items()
        if (targets == "all-linear" or module.rpartition(".")[2] in names)
        and (blocks is None or _block_number(module) in blocks)
    }


def _selected_blocks(
    shapes: Mapping[str, tuple[int, int]], layers: str, field: str
) -> set[int] | None:
    if layers == "all":
        return None
    numbers = sorted({n for module in shapes if (n := _block_number(module)) is not None})
    try:
        first, last = (int(part) if part.strip() else None for part in layers.split(":"))
    except ValueError:
        first, last = 0, 0
    chosen = set(numbers[first:last])
    if not chosen:
        count = len(numbers)
        raise UsageError(
            f"{field}={layers!r} names no block; allowed are all, or a slice of the {count} blocks, "
            f"such as 0:{count // 2} or -{max(1, count // 2)}:"
        )
    return chosen


def _block_number(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
)
"""Last names of sibling modules that read the same tensor and form one site."""


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that share an input, so that their shrink products `A x` are one product."""

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) features of a linear layer (GPT-2's Conv1D too), None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return int(str(module.nx)), int(str(module.nf))
    return None


EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")
FUSED_EXPERTS = (
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "minimax", "minimax_m2", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
    "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
)  # fmt: skip
"""Model types on which PEFT takes the names of EXPERT_LAYERS for the experts' own fused parameters."""
STATE_SPACE_MODELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types on which PEFT refuses `out_proj`."""


def excluded_names(model: nn.Module) -> tuple[str, ...]:
    """Return last names of linear layers that PEFT cannot adapt, so that none is trained in vain here."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    state_space = ("out_proj",) if kind in STATE_SPACE_MODELS else ()
    return (EXPERT_LAYERS if kind in FUSED_EXPERTS else ()) + state_space


def _text_model(model: nn.Module) -> nn.Module:
    """Return the language model of a model that reads images or sounds as well."""
    config = getattr(model, "config", None)
    if config is None or config is config.get_text_config():
        return model
    language: nn.Module | None = getattr(model.base_model, "language_model", None)
    return model if language is None else language


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites of `model`, in module order: the linear layers of its language model, but the head.

    Layers that PEFT cannot adapt are left out; see `excluded_names`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = excluded_names(model)
    inside = {id(module) for module in _text_model(model).modules()}
    shapes = {
        name: shape
        for name, module in model.named_modules()
        if module is not head
        and id(module) in inside
        and name.rpartition(".")[2] not in excluded
        and (shape := linear_shape(module)) is not None
    }
    grouped_names: dict[tuple[str, object], list[str]] = defaultdict(list)
    for name in shapes:
        parent, _, last = name.rpartition(".")
        family = next((f for f in SHARED_INPUT if last in f), last)
        grouped_names[parent, (family, shapes[name][0])].append(name)
    return tuple(
        Site("|".join(names), tuple(names), shapes[names[0]][0], tuple(shapes[n][1] for n in names))
        for names in grouped_names.values()
    )


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer that can carry adapters, by module name."""
    return {
        member: (site.in_features, out)
        for site in find_sites(model)
        for member, out in zip(site.members, site.out_features, strict=True)
    }


@dataclass(frozen=True, slots=True)
class SiteLayers:
    """The linear modules of a site."""

    site: Site
    linears: tuple[nn.Module, ...]
    plain: bool
    """Whether all are nn.Linear with frozen weights, so that their products can be computed together."""

    @property
    def weights(self) -> list[tuple[Any, Any]]:
        """Each layer's weight (out, in) and bias (out,) or None."""
        return [(linear.weight, linear.bias) for linear in self.linears]
