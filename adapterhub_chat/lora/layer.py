"""LoRALinear: a frozen linear layer plus the low-rank products; `attach` installs it in a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adapterhub_chat.errors import UsageError
from adapterhub_chat.lora.plan import _ACTIVE
from adapterhub_chat.lora.sites import Site, SiteLayers


class LoRALinear:
    """The LoRA equation at one linear layer: replaces its `forward`, not the module.

    The backbone keeps its modules, names and bytes, so transformers, PEFT and bitsandbytes see their own
    classes; with no active plan it calls the layer's original forward.
    """

    def __init__(self, layers: SiteLayers, member: int) -> None:
        """Replace the forward of member number `member` of a site."""
        self.layers, self.member = layers, member
        self.base: Callable[[Tensor], Tensor] = layers.linears[member].forward

    def __call__(self, x: Tensor) -> Tensor:
        """Return y + sum_s M[., s] scale_s B_s A_s x under the active plan."""
        plan = _ACTIVE.get()
        if plan is None:
            return self.base(x)
        return plan.apply(self.layers, self.member, x, self.base)


def attach(model: nn.Module, sites: Sequence[Site]) -> Callable[[], None]:
    """Install a LoRALinear at every member of `sites`; return a function that removes them.

    Raises UsageError when the model has some already, since a plan would be applied twice.
    """
    previous: list[tuple[nn.Module, Any]] = []
    for site in sites:
        linears = tuple(model.get_submodule(name) for name in site.members)
        layers = SiteLayers(site, linears, all(_is_plain(linear) for linear in linears))
        for member, linear in enumerate(linears):
            previous_forward = linear.__dict__.get("forward")
            if isinstance(previous_forward, LoRALinear):
                raise UsageError(
                    "the backbone carries adapters already: close the other model first"
                )
            previous.append((linear, previous_forward))
            linear.forward = LoRALinear(layers, member)

    def detach() -> None:
        for linear, previous_forward in previous:
            linear.__dict__.pop("forward", None)
            if previous_forward is not None:
                linear.forward = previous_forward

    return detach


def _is_plain(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    if "forward" in linear.__dict__:  # another library has replaced its forward
        return False
    return type(linear) is nn.Linear and weight is not None and not weight.requires_grad
