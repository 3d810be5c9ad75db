"""One stored adapter: its name, its files, its manifest and its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapterhub_chat.artifact.folder import DEFAULT_TARGET, ReadTarget, read_folder
from adapterhub_chat.artifact.guard import LayerShapes
from adapterhub_chat.artifact.manifest import MANIFEST, Manifest, read_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.files import version_of
from adapterhub_chat.lora.weights import AdapterWeights

CARD = "README.md"
FILES = (WEIGHTS, CONFIG, MANIFEST)
"""The files that an adapter is read from."""


@dataclass(frozen=True)
class Stored:
    """An adapter as read from a folder."""

    name: str
    path: Path
    weights: AdapterWeights
    config: Mapping[str, Any]
    manifest: Manifest | None
    """None for an adapter made by plain PEFT, which cannot be verified."""


@dataclass(frozen=True)
class LoadedAdapter:
    """Metadata of a loaded adapter; its weights are kept by the model only."""

    path: Path
    manifest: Manifest | None
    """None for an adapter made by plain PEFT, which cannot be verified."""
    rank: int
    parameters: int

    @classmethod
    def of(cls, stored: Stored) -> LoadedAdapter:
        """Return the metadata of a stored adapter."""
        weights = stored.weights
        return cls(stored.path, stored.manifest, weights.max_rank, weights.num_parameters)


def read_stored(
    folder: Path, name: str, layers: LayerShapes | None = None, target: ReadTarget = DEFAULT_TARGET
) -> Stored:
    """Read an adapter folder; raise AdapterError naming all misfits.

    With a backbone's `layers`, module names and sizes are checked against it. A folder that is replaced while
    it is read is read again, so that files of two versions are never combined.
    """
    while True:
        version = version_of(folder, FILES)
        try:
            stored = _read_once(folder, name, layers, target)
        except AdapterError:
            if version_of(folder, FILES) == version:
                raise
        else:
            if version_of(folder, FILES) == version:
                return stored


def _read_once(folder: Path, name: str, layers: LayerShapes | None, target: ReadTarget) -> Stored:
    weights, config, sha256 = read_folder(folder, layers, target)
    manifest = read_manifest(folder)
    if manifest is not None and sha256 != manifest.sha256:
        raise AdapterError(
            f"{folder / WEIGHTS} is not the file that {MANIFEST} describes (sha256 {sha256[:12]}..., not "
            f"{manifest.sha256[:12]}...): pull or train the adapter again"
        )
    return Stored(name, folder, weights, config, manifest)


Status = Literal["exact", "compatible", "unverified", "refused"]
