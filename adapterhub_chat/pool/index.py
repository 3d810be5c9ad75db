"""PoolIndex: the names and manifests of a pool's adapters, read without weights and without torch."""

from __future__ import annotations

from pathlib import Path

from adapterhub_chat.artifact.manifest import Manifest, read_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.errors import PoolError, UnknownNameError
from adapterhub_chat.pool.names import ADAPTER_NAME
from adapterhub_chat.pool.transaction import sweep


class PoolIndex:
    """The names, folders and manifests of a pool's adapters."""

    def __init__(self, root: Path | str) -> None:
        """Open (not create) the pool at `root`; sweep up after killed runs."""
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise PoolError(f"the pool {self.root} is a file, not a folder; name another folder")
        sweep(self.root)

    def names(self) -> list[str]:
        """Return the adapters in the pool, by name."""
        try:
            entries = [path.name for path in self.root.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PoolError(f"the pool {self.root} cannot be read: {error.strerror}") from error
        return sorted(name for name in entries if name in self)

    def __contains__(self, name: object) -> bool:
        """Return whether an adapter of that name is in the pool."""
        is_name = isinstance(name, str) and ADAPTER_NAME.fullmatch(name)
        return bool(is_name) and (self.root / str(name) / CONFIG).is_file()

    def path(self, name: str) -> Path:
        """Return an adapter's folder; raise UnknownNameError when there is none."""
        if name not in self:
            raise UnknownNameError(
                "adapter", name, self.names(), f"(pool: {self.root}) Train it or load it by folder."
            )
        return self.root / name

    def manifest(self, name: str) -> Manifest | None:
        """Return an adapter's manifest without reading its weights."""
        return read_manifest(self.path(name))
