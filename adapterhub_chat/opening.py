"""How the verbs of the command line open a hub, and what they say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.terminal import Say


def open_hub(
    backbone: str, pool: Path, quantize: Any, dtype: str | None, device: str | None, say: Say
) -> AdapterHub:
    """Return a hub, after `say` has heard what the backbone is kept in."""
    hub = AdapterHub(backbone, pool, quantize=quantize, dtype=dtype, device=device)
    shown = precision(hub)
    kind = shown["quantize"] or shown["dtype"]
    size = hub.backbone.nbytes / 2**20
    where = f"{kind} on {shown['device']}, {size:.0f} MiB"
    say(f"{backbone} in {where} (change with --dtype, --quantize, --device)")
    return hub


def precision(hub: AdapterHub) -> dict[str, Any]:
    """Return the backbone's name and what it computes in."""
    backbone = hub.backbone
    return {
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "quantize": backbone.quantize,
    }
