"""Where a verb works: the options that say so, the hub that they open, and what is said of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.options import (
    BackboneOption,
    DeviceOption,
    DtypeOption,
    PoolOption,
    QuantizeOption,
    wear,
)
from adapterhub_chat.terminal import Say


@dataclass(frozen=True)
class Where:
    """On which backbone, kept in what, and in which pool."""

    backbone: BackboneOption = "smollm2-135m"
    pool: PoolOption = Path("adapters")
    quantize: QuantizeOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None

    def open(self, say: Say) -> AdapterHub:
        """Return a hub, after `say` has heard what the backbone is kept in."""
        given: Any = {"quantize": self.quantize, "dtype": self.dtype, "device": self.device}
        hub = AdapterHub(self.backbone, self.pool, **given)
        shown = precision(hub)
        kind = shown["quantize"] or shown["dtype"]
        size = hub.backbone.nbytes / 2**20
        where = f"{kind} on {shown['device']}, {size:.0f} MiB"
        say(f"{self.backbone} in {where} (change with --dtype, --quantize, --device)")
        return hub


HERE = Where()


def with_backbone(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of Where; they arrive as one, `where`."""
    fields = inspect.signature(Where, eval_str=True).parameters.values()
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fields]

    def run(**given: Any) -> None:
        where = Where(**{option.name: given.pop(option.name) for option in options})
        command(**given, where=where)

    return wear(run, command, {"where": options})


def precision(hub: AdapterHub) -> dict[str, Any]:
    """Return the backbone's name and what it computes in."""
    backbone = hub.backbone
    return {
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "quantize": backbone.quantize,
    }
