"""`LoRALinear`: a frozen linear plus the products of its slots; `attach` puts it into a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adapterhub_chat.errors import UsageError
from adapterhub_chat.lora.plan import _ACTIVE
from adapterhub_chat.lora.sites import Layers, Site


class LoRALinear:
    """The equation at one linear layer: stands in for its `forward`, the layer itself stays as it was.

    The backbone keeps its modules, names and bytes (transformers, PEFT and bitsandbytes all see their own
    classes); with no plan active it is the layer's own forward.
    """

    def __init__(self, layers: Layers, member: int) -> None:
        """Stand in for member number `member` of a site."""
        self.layers, self.member = layers, member
        self.base: Callable[[Tensor], Tensor] = layers.linears[member].forward

    def __call__(self, x: Tensor) -> Tensor:
        """Return y + sum_s M[., s] scale_s B_s A_s x under the active plan."""
        plan = _ACTIVE.get()
        if plan is None:
            return self.base(x)
        return plan.apply(self.layers, self.member, x, self.base)


def attach(model: nn.Module, sites: Sequence[Site]) -> Callable[[], None]:
    """Let a LoRALinear stand in for every member of `sites`; return what takes them off again.

    Raises UsageError when the model carries some already: a plan would act twice.
    """
    before: list[tuple[nn.Module, Any]] = []
    for site in sites:
        linears = tuple(model.get_submodule(name) for name in site.members)
        layers = Layers(site, linears, all(_is_plain(linear) for linear in linears))
        for member, linear in enumerate(linears):
            own = linear.__dict__.get("forward")
            if isinstance(own, LoRALinear):
                raise UsageError(
                    "the backbone carries adapters already: close the other model first"
                )
            before.append((linear, own))
            linear.forward = LoRALinear(layers, member)

    def detach() -> None:
        for linear, own in before:
            linear.__dict__.pop("forward", None)
            if own is not None:
                linear.forward = own

    return detach


def _is_plain(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    if "forward" in linear.__dict__:  # somebody else stands in for it
        return False
    return type(linear) is nn.Linear and weight is not None and not weight.requires_grad
