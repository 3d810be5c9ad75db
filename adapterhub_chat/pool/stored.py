"""One stored adapter: its name, its files, its manifest and its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapterhub_chat.artifact.folder import DEFAULT_TARGET, ReadTarget, read_folder
from adapterhub_chat.artifact.guard import LayerShapes
from adapterhub_chat.artifact.manifest import FILE as MANIFEST
from adapterhub_chat.artifact.manifest import Manifest, read_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.files import version_of
from adapterhub_chat.lora.weights import AdapterWeights

CARD = "README.md"
FILES = (WEIGHTS, CONFIG, MANIFEST)
"""What an adapter is read from."""


@dataclass(frozen=True)
class Stored:
    """An adapter as it lies in a folder."""

    name: str
    path: Path
    weights: AdapterWeights
    config: Mapping[str, Any]
    manifest: Manifest | None
    """None: made by plain PEFT, nothing about it is verified."""


@dataclass(frozen=True)
class LoadedAdapter:
    """What is known of an adapter that was loaded; its numbers are the model's alone."""

    path: Path
    manifest: Manifest | None
    """None: made by plain PEFT, nothing about it is verified."""
    rank: int
    parameters: int

    @classmethod
    def of(cls, stored: Stored) -> LoadedAdapter:
        """Return what is kept of a loaded adapter."""
        weights = stored.weights
        return cls(stored.path, stored.manifest, weights.max_rank, weights.num_parameters)


def read_stored(
    folder: Path, name: str, layers: LayerShapes | None = None, landing: ReadTarget = DEFAULT_TARGET
) -> Stored:
    """Read an adapter folder, a stranger's with a backbone's `layers`; raise AdapterError for what is wrong.

    A folder that is replaced while it is read is read again: files of two versions never meet.
    """
    while True:
        version = version_of(folder, FILES)
        try:
            stored = _read_once(folder, name, layers, landing)
        except AdapterError:
            if version_of(folder, FILES) == version:
                raise
        else:
            if version_of(folder, FILES) == version:
                return stored


def _read_once(folder: Path, name: str, layers: LayerShapes | None, landing: ReadTarget) -> Stored:
    weights, config, actual = read_folder(folder, layers, landing)
    manifest = read_manifest(folder)
    if manifest is not None and actual != manifest.sha256:
        raise AdapterError(
            f"{folder / WEIGHTS} is not the file that {MANIFEST} describes (sha256 {actual[:12]}..., not "
            f"{manifest.sha256[:12]}...): pull or train the adapter again"
        )
    return Stored(name, folder, weights, config, manifest)


Status = Literal["exact", "compatible", "unverified", "refused"]
