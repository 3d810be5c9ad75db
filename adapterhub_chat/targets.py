"""Targets: which of the backbone's linear layers an adapter changes, by name and by block."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub_chat.errors import UsageError


def targeted(
    shapes: Mapping[str, tuple[int, int]], targets: str, layers: str = "all", field: str = "layers"
) -> dict[str, tuple[int, int]]:
    """Return the modules that the settings name.

    `targets` is `all-linear`, or last names such as `q_proj,v_proj`; `layers` is `all`, or a slice of
    block numbers such as `20:30` or `-8:`. Raises UsageError, naming the `field` and what is allowed.
    """
    wanted = [t.strip() for t in targets.split(",") if t.strip()]
    known = {module.rpartition(".")[2] for module in shapes}
    unknown = [t for t in wanted if t not in known]
    if targets != "all-linear" and (unknown or not wanted):
        what = f"has no linear layer named {', '.join(unknown)}" if unknown else "needs a name"
        raise UsageError(
            f"targets={targets!r}: the backbone {what}; "
            f"allowed are all-linear, {', '.join(sorted(known))}"
        )
    blocks = _blocks(shapes, layers, field)
    return {
        module: shape
        for module, shape in shapes.items()
        if (targets == "all-linear" or module.rpartition(".")[2] in wanted)
        and (blocks is None or _block(module) in blocks)
    }


def _blocks(shapes: Mapping[str, tuple[int, int]], layers: str, field: str) -> set[int] | None:
    if layers == "all":
        return None
    numbers = sorted({n for module in shapes if (n := _block(module)) is not None})
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


def _block(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
