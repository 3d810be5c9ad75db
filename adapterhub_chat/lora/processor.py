"""The processor's name and features, read from /proc/cpuinfo where it exists."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_fields(path: Path = CPUINFO) -> dict[str, str]:
    """Return each field's first value ("model name", "flags", ...); nothing if `path` cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def processor_name(path: Path = CPUINFO) -> str:
    """Return the processor's model name, or as much as Python's `platform` knows of it."""
    return cpu_fields(path).get("model name") or platform.processor() or platform.machine()
