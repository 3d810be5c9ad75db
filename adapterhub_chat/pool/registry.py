"""Registry: loads adapters from the pool or from folders into the model, and tracks which are loaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub_chat.artifact.folder import (
    DEFAULT_TARGET,
    BufferPool,
    ReadTarget,
    config_of,
    new_buffer,
)
from adapterhub_chat.artifact.manifest import Manifest, read_manifest
from adapterhub_chat.errors import AdapterError, AdapterHubError, NoRoomError, UsageError, warn
from adapterhub_chat.files import version_of
from adapterhub_chat.lora.slots import Lease, StagedSlot
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.pool.admission import Admission, Verdict, fingerprint_misfits, status_of
from adapterhub_chat.pool.host_cache import HostCache, ram_budget
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.probe import make_probe
from adapterhub_chat.pool.stacks import Stacks
from adapterhub_chat.pool.stored import FILES, LoadedAdapter, Status, Stored, read_stored
from adapterhub_chat.types import AUTO, AdapterChoice, Mix, PromptContract, Score, as_mix


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter as `hub.adapters()` lists it; rank and parameters are 0 until it is loaded."""

    name: str
    loaded: bool
    status: Status
    task: str = ""
    rank: int = 0
    parameters: int = 0
    scores: tuple[Score, ...] = ()


class Registry:
    """The loaded adapters, each with its folder and manifest, and the pool that others are loaded from."""

    def __init__(self, model: AdapterModel, pool: Pool) -> None:
        """Start with nothing loaded; `model.options.ram_bytes` bounds the host cache."""
        self.model, self.pool = model, pool
        self.host_cache = HostCache(ram_budget(model.options.ram_bytes, model.backbone.device.type))
        self._known: dict[str, LoadedAdapter] = {}
        self._stacks = Stacks(self.model, pool, self._known, self.load)
        self._admission = Admission(model, pool, self._stacks)
        self._buffers = BufferPool()
        self._load_lock = threading.RLock()
        """Loads are serialised, so that an older version cannot overwrite a newer one."""
        model.use_source(self)

    def known(self, name: str) -> LoadedAdapter | None:
        """Return the metadata of an adapter that was loaded, else None."""
        return self._known.get(name)

    def overview(self) -> list[AdapterInfo]:
        """Return all adapters that are in the pool or loaded."""
        loaded = {n: adapter for n in self.model.names if (adapter := self.known(n)) is not None}
        return [self._info(n, loaded.get(n)) for n in sorted({*self.pool.names(), *loaded})]

    def _info(self, name: str, loaded: LoadedAdapter | None) -> AdapterInfo:
        try:
            manifest = loaded.manifest if loaded else self.pool.manifest(name)
        except AdapterError:  # its manifest cannot be read
            return AdapterInfo(name, loaded=False, status="refused")
        return AdapterInfo(
            name=name,
            loaded=loaded is not None,
            status=status_of(manifest, self.model.backbone.fingerprint),
            task=", ".join(manifest.training.tasks) if manifest else "",
            rank=loaded.rank if loaded else 0,
            parameters=loaded.parameters if loaded else 0,
            scores=manifest.scores if manifest else (),
        )

    def load(self, source: str | Path, name: str | None = None, *, defer: bool = False) -> str:
        """Check and load a pool member or a folder; return its name. See AdapterHub.load.

        With `defer`, an adapter for which no slot is free now is loaded by the first row that uses it;
        otherwise NoRoomError is raised.
        """
        with self._load_lock, self._buffers.lent() as allocate, self.model.ahead() as staged:
            stored = self._read_cached(source, name, ReadTarget(allocate, staged.fill))
            try:
                if warning := self._admission.admit(stored, staged):
                    warn(warning)
                self._fill_slot(stored, staged)
            except NoRoomError:
                if not defer:
                    raise
                if stored.name not in self.model.slots:  # else another thread has loaded it
                    self._known[stored.name] = LoadedAdapter.of(stored)
            return stored.name

    def prefetch(self, mix: Mix) -> None:
        """Read the adapters of a mix that are in no slot into the host cache; read errors are ignored."""
        if not self.host_cache.budget:
            return
        with suppress(AdapterHubError):
            for name in self.with_stack_bases(mix).names:
                if name not in self.model.slots:
                    self._read_cached(self._source(name), name)

    def _read_cached(
        self, source: str | Path, name: str | None, target: ReadTarget = DEFAULT_TARGET
    ) -> Stored:
        """Return an adapter from the host cache, else read it from disk and cache it."""
        if not self.host_cache.budget:
            return self.read(source, name, target)
        is_member = isinstance(source, str) and source in self.pool
        folder = self.pool.root / source if is_member else Path(source)
        stored = self.host_cache.get(folder)
        if stored is None:
            version = version_of(folder, FILES)
            stored = self.read(source, name, replace(target, allocate=new_buffer))
            self.host_cache.put(stored, version)
        adapter_name = name or (str(source) if is_member else folder.resolve().name)
        return replace(stored, name=check_name(adapter_name))

    def rollback(self, name: str) -> Manifest | None:
        """Exchange a pool member with its previous version, and reload it if it is loaded. See AdapterHub."""
        loaded, warning = self._known.get(name), ""
        with self._load_lock:
            if is_loaded_member := loaded is not None and loaded.path == self.pool.root / name:
                warning = self._admission.admit(self.pool.load_earlier(name))
            restored = self.pool.rollback(name)
            if is_loaded_member:
                self._admission.admit(restored)  # another process may have saved in between
                self._load_new_version(restored)
        if warning:
            warn(warning)
        return restored.manifest

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        if name in self.model.slots or name not in self._known:  # else it was evicted already
            self.model.unload(name)
        self._known.pop(name, None)

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter without loading it: bytes, shapes, fingerprint, probe."""
        try:
            stored = self.read(source, "candidate")  # a name that is valid whatever the folder's is
        except AdapterError as error:
            return Verdict(False, "refused", error.misfits)
        return self._admission.verdict(stored)

    def read(
        self, source: str | Path, name: str | None = None, target: ReadTarget = DEFAULT_TARGET
    ) -> Stored:
        """Read the pool member of the name `source`, else the adapter in the folder `source`."""
        if isinstance(source, str) and source in self.pool:
            stored = self.pool.load(source, target)
            return replace(stored, name=check_name(name)) if name else stored
        try:
            folder = Path(source).expanduser()
            if isinstance(source, Path) or folder.is_dir():
                return self._read_folder(folder, check_name(name or folder.resolve().name), target)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, AdapterHubError):
                raise
            raise UsageError(f"{str(source)[:100]!r} cannot be a folder: {error!s:.200}") from error
        return self.pool.load(str(source))  # raises, naming the adapters that are there

    def _read_folder(self, folder: Path, name: str, target: ReadTarget) -> Stored:
        """Read a folder outside the pool; raise AdapterError with all misfits in one message."""
        try:
            return read_stored(folder, name, self.model.shapes, target)
        except AdapterError as error:
            extra_misfits: list[str] = []
            with suppress(AdapterError):
                manifest = read_manifest(folder)
                fingerprint = self.model.backbone.fingerprint
                extra_misfits = fingerprint_misfits(manifest, fingerprint) if manifest else []
            message = "\n  - ".join([str(error), *extra_misfits])
            raise AdapterError(message, [*error.misfits, *extra_misfits]) from error

    def resolve(self, choices: Sequence[AdapterChoice]) -> list[Mix]:
        """Return the choices as mixes, after loading those of their adapters that are not loaded yet."""
        mixes = [as_mix(choice) for choice in choices]
        if any(AUTO in mix.names for mix in mixes):
            raise UsageError(
                "'auto' chooses by one row's message, in chat and generate; elsewhere name an adapter, or "
                "ask route(text)"
            )
        for name in dict.fromkeys(n for mix in mixes for n in mix.names):
            if name not in self.model.slots and name not in self._known:
                self.load(name, defer=True)
        return mixes

    def load_usable(
        self, names: Sequence[str], on_refused: Callable[[str, str], None]
    ) -> list[str]:
        """Load adapters and return the names of those that fit; call `on_refused(name, reason)` for others.

        Raises AdapterError when none fits.
        """
        usable = []
        for name in names:
            try:
                self.resolve([name])
            except AdapterError as error:
                on_refused(name, str(error))
                if len(names) == 1:
                    raise
            else:
                usable.append(name)
        if not usable:
            raise AdapterError(
                f"no adapter of {self.pool.root} may be used here: {', '.join(names)}"
            )
        return usable

    def acquire(self, mix: Mix) -> Lease:
        """Lease a mix's adapters and their stack bases; those that are in no slot are loaded first."""
        full_mix = self.with_stack_bases(mix)
        lease = self.model.slots.acquire(full_mix, self._reload)
        try:
            self.with_stack_bases(
                mix
            )  # an adapter loaded just now may not be the version that a stack needs
        except AdapterError:
            self.model.slots.release(lease)
            raise
        return lease

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with its stacks' base adapters added, each with the weight of its stack.

        Raises AdapterError for a stack whose base is missing or has changed.
        """
        return self._stacks.with_stack_bases(mix)

    def _reload(self, name: str) -> None:
        self.load(self._source(name), name)

    def _source(self, name: str) -> str | Path:
        """Return what an adapter is loaded from: its name in the pool, or the folder outside it."""
        loaded = self._known.get(name)
        from_folder = loaded is not None and loaded.path != self.pool.root / name
        return loaded.path if loaded is not None and from_folder else name

    def contract(self, mix: Mix) -> PromptContract | None:
        """Return the prompt contract of the adapter with the largest weight, None if it has none."""
        if not mix.weights:
            return None
        heaviest = max(mix.weights, key=lambda pair: abs(pair[1]))[0]
        loaded = self._known.get(heaviest)
        return loaded.manifest.contract if loaded and loaded.manifest else None

    def save_new(
        self, weights: AdapterWeights, manifest: Manifest, *, probing: bool = True
    ) -> Manifest:
        """Save a new adapter with its probe to the pool and load it; return the final manifest.

        When it cannot be saved, pool and loaded adapters are unchanged. Without `probing` no forward is run,
        and the adapter gets no probe.
        """
        probe = None
        if probing:
            with self.model.temporarily_loaded(weights, manifest.name) as trial:
                probe = make_probe(self.model, self._stacks.trial_mix(trial, manifest))
        config = config_of(weights, manifest.base_model, self.model.shapes)
        draft = manifest.model_copy(update={"probe": probe})
        with self._load_lock:
            stored = self.pool.save(manifest.name, weights, config, draft)
            self._admission.remember_probe(stored)
            self._load_new_version(stored)
        assert stored.manifest is not None
        return stored.manifest

    def record_scores(self, scores: Sequence[Score]) -> None:
        """Write scores into the manifests and cards of their adapters in the pool."""
        for name in dict.fromkeys(score.adapter for score in scores):
            loaded = self._known.get(name)
            if loaded and loaded.manifest and loaded.path == self.pool.root / name:
                adapter_scores = [score for score in scores if score.adapter == name]
                self.describe(name, loaded.manifest.with_scores(adapter_scores))

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace the manifest of a loaded pool member, on disk and in memory."""
        self.pool.describe(name, manifest)
        self._known[name] = replace(self._known[name], manifest=manifest)

    def refresh(self, name: str) -> None:
        """Reread the manifest of a loaded pool member, if its weights are unchanged."""
        loaded, manifest = self._known.get(name), self.pool.manifest(name)
        if loaded and loaded.manifest and manifest and loaded.manifest.sha256 == manifest.sha256:
            self._known[name] = replace(loaded, manifest=manifest)

    def _fill_slot(self, stored: Stored, staged: StagedSlot | None = None) -> None:
        """Put an admitted adapter into a slot, and record its metadata."""
        self.model.load(stored.name, stored.weights, _identity(stored), staged)
        self._known[stored.name] = LoadedAdapter.of(stored)

    def _load_new_version(self, stored: Stored) -> None:
        """Load the pool's new version; without room for it, the next row that uses it loads it."""
        try:
            self._fill_slot(stored)
        except NoRoomError:
            if stored.name in self.model.slots:
                self.model.unload(stored.name)  # running rows finish with the old version
            self._known[stored.name] = LoadedAdapter.of(stored)


def _identity(stored: Stored) -> str | None:
    """Return a digest of an adapter's weights and scaling; None if it has no manifest."""
    if stored.manifest is None:
        return None
    config = json.dumps(dict(stored.config), sort_keys=True)
    return hashlib.sha256(f"{stored.manifest.sha256} {config}".encode()).hexdigest()
