"""Registry: the pool and its loaded part together. Adapters come into it checked, under their contract."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub_chat.artifact.folder import DEFAULT_TARGET, BufferPool, ReadTarget, config_of, fresh
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
    """What `hub.adapters()` tells of one adapter; rank and parameters once it is loaded."""

    name: str
    loaded: bool
    status: Status
    task: str = ""
    rank: int = 0
    parameters: int = 0
    scores: tuple[Score, ...] = ()


class Registry:
    """Which adapters are loaded, where each came from, and what its manifest says."""

    def __init__(self, model: AdapterModel, pool: Pool) -> None:
        """Start with nothing loaded; the model's options say how much of what is read is kept in RAM."""
        self.model, self.pool = model, pool
        self.ram = HostCache(ram_budget(model.options.ram_bytes, model.backbone.device.type))
        self._known: dict[str, LoadedAdapter] = {}
        self._stacks = Stacks(self.model, pool, self._known, self.load)
        self._admission = Admission(model, pool, self._stacks)
        self._scratch = BufferPool()
        self._changing = threading.RLock()
        """Held from reading an adapter until it is loaded: an older version must not follow a newer one."""
        model.use_source(self)

    def known(self, name: str) -> LoadedAdapter | None:
        """Return what is known of an adapter, None when it was not loaded."""
        return self._known.get(name)

    def overview(self) -> list[AdapterInfo]:
        """Return what is in the pool and what is loaded."""
        loaded = {n: h for n in self.model.names if (h := self.known(n)) is not None}
        return [self._info(n, loaded.get(n)) for n in sorted({*self.pool.names(), *loaded})]

    def _info(self, name: str, held: LoadedAdapter | None) -> AdapterInfo:
        try:
            manifest = held.manifest if held else self.pool.manifest(name)
        except AdapterError:  # its manifest cannot be read
            return AdapterInfo(name, loaded=False, status="refused")
        return AdapterInfo(
            name=name,
            loaded=held is not None,
            status=status_of(manifest, self.model.backbone.fingerprint),
            task=", ".join(manifest.training.tasks) if manifest else "",
            rank=held.rank if held else 0,
            parameters=held.parameters if held else 0,
            scores=manifest.scores if manifest else (),
        )

    def load(self, source: str | Path, name: str | None = None, *, waiting: bool = False) -> str:
        """Check and load a pool member or a folder; return its name. See AdapterHub.load.

        `waiting`: where there is no room now, whoever is given a row with it loads it.
        """
        with self._changing, self._scratch.lent() as memory, self.model.ahead() as ahead:
            stored = self._read(source, name, ReadTarget(memory, ahead.fill))
            try:
                if note := self._admission.accepted(stored, ahead):
                    warn(note)
                self._hold(stored, ahead)
            except NoRoomError:
                if not waiting:
                    raise
                if stored.name not in self.model.slots:  # else somebody has loaded it meanwhile
                    self._known[stored.name] = LoadedAdapter.of(stored)
            return stored.name

    def prefetch(self, mix: Mix) -> None:
        """Read into the host's memory what a mix needs and is in no slot; what cannot be read is left."""
        if not self.ram.budget:
            return
        with suppress(AdapterHubError):
            for name in self.with_stack_bases(mix).names:
                if name not in self.model.slots:
                    self._read(self._source(name), name)

    def _read(
        self, source: str | Path, name: str | None, landing: ReadTarget = DEFAULT_TARGET
    ) -> Stored:
        """Find an adapter in the host's memory, else on disk, from where it then is there, too."""
        if not self.ram.budget:
            return self.find(source, name, landing)
        member = isinstance(source, str) and source in self.pool
        folder = self.pool.root / source if member else Path(source)
        stored = self.ram.find(folder)
        if stored is None:
            version = version_of(folder, FILES)
            stored = self.find(source, name, replace(landing, memory=fresh))
            self.ram.keep(stored, version)
        own = name or (str(source) if member else folder.resolve().name)
        return replace(stored, name=check_name(own))

    def rollback(self, name: str) -> Manifest | None:
        """Exchange a pool member with its earlier version, here too where it is loaded. See AdapterHub."""
        held, note = self._known.get(name), ""
        with self._changing:
            if mine := held is not None and held.path == self.pool.root / name:
                note = self._admission.accepted(self.pool.earlier(name))
            restored = self.pool.rollback(name)
            if mine:
                self._admission.accepted(restored)  # another process may have saved in between
                self._replace(restored)
        if note:
            warn(note)
        return restored.manifest

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        if name in self.model.slots or name not in self._known:  # else it was evicted
            self.model.unload(name)
        self._known.pop(name, None)

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter without loading it: bytes, shapes, fingerprint, probe."""
        try:
            stored = self.find(source, "candidate")  # what the folder is called is no matter here
        except AdapterError as error:
            return Verdict(False, "refused", error.misfits)
        return self._admission.verdict(stored)

    def find(
        self, source: str | Path, name: str | None = None, landing: ReadTarget = DEFAULT_TARGET
    ) -> Stored:
        """Read the pool member called `source`, else the adapter in the folder `source`."""
        if isinstance(source, str) and source in self.pool:
            stored = self.pool.load(source, landing)
            return replace(stored, name=check_name(name)) if name else stored
        try:
            folder = Path(source).expanduser()
            if isinstance(source, Path) or folder.is_dir():
                return self._strangers(folder, check_name(name or folder.resolve().name), landing)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, AdapterHubError):
                raise
            raise UsageError(f"{str(source)[:100]!r} cannot be a folder: {error!s:.200}") from error
        return self.pool.load(str(source))  # raises, naming the adapters that are there

    def _strangers(self, folder: Path, name: str, landing: ReadTarget) -> Stored:
        """Read a folder that is no pool member, with all that speaks against it in one message."""
        try:
            return read_stored(folder, name, self.model.shapes, landing)
        except AdapterError as error:
            more: list[str] = []
            with suppress(AdapterError):
                manifest = read_manifest(folder)
                fingerprint = self.model.backbone.fingerprint
                more = fingerprint_misfits(manifest, fingerprint) if manifest else []
            message = "\n  - ".join([str(error), *more])
            raise AdapterError(message, [*error.misfits, *more]) from error

    def resolve(self, choices: Sequence[AdapterChoice]) -> list[Mix]:
        """Return the mixes, after loading from the pool what they name and is not loaded yet."""
        mixes = [as_mix(choice) for choice in choices]
        if any(AUTO in mix.names for mix in mixes):
            raise UsageError(
                "'auto' chooses by one row's message, in chat and generate; elsewhere name an adapter, or "
                "ask route(text)"
            )
        for name in dict.fromkeys(n for mix in mixes for n in mix.names):
            if name not in self.model.slots and name not in self._known:
                self.load(name, waiting=True)
        return mixes

    def usable(self, names: Sequence[str], on_refused: Callable[[str, str], None]) -> list[str]:
        """Return those that may be used here, loaded; `on_refused` is told the others' names and reasons.

        Raises AdapterError when none of them may.
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
        """Hold a mix's adapters, and what its stacks stand on; those that are in no slot are loaded first."""
        whole = self.with_stack_bases(mix)
        held = self.model.slots.acquire(whole, self._load_again)
        try:
            self.with_stack_bases(
                mix
            )  # what was loaded just now may not be what a stack was made on
        except AdapterError:
            self.model.slots.release(held)
            raise
        return held

    def with_stack_bases(self, mix: Mix) -> Mix:
        """Return a mix with what its stacks stand on, each as heavy as its stack.

        Raises AdapterError for a stack under which something is missing or has changed.
        """
        return self._stacks.with_stack_bases(mix)

    def _load_again(self, name: str) -> None:
        self.load(self._source(name), name)

    def _source(self, name: str) -> str | Path:
        """Return where a name's adapter comes from: the pool, or the folder it was loaded from."""
        known = self._known.get(name)
        outside = known is not None and known.path != self.pool.root / name
        return known.path if known is not None and outside else name

    def contract(self, mix: Mix) -> PromptContract | None:
        """Return the contract of the mix's heaviest adapter, None when it has none."""
        if not mix.weights:
            return None
        heaviest = max(mix.weights, key=lambda pair: abs(pair[1]))[0]
        held = self._known.get(heaviest)
        return held.manifest.contract if held and held.manifest else None

    def save_new(
        self, weights: AdapterWeights, manifest: Manifest, *, probing: bool = True
    ) -> Manifest:
        """Save a new adapter with its probe to the pool and load it; return the final manifest.

        When it cannot be saved, pool and loaded adapters are as before. Without `probing` no forward is
        run, and the adapter has no probe.
        """
        probe = None
        if probing:
            with self.model.temporarily_loaded(weights, manifest.name) as trial:
                probe = make_probe(self.model, self._stacks.beside(trial, manifest))
        config = config_of(weights, manifest.base_model, self.model.shapes)
        draft = manifest.model_copy(update={"probe": probe})
        with self._changing:
            stored = self.pool.save(manifest.name, weights, config, draft)
            self._admission.note(stored)
            self._replace(stored)
        assert stored.manifest is not None
        return stored.manifest

    def record(self, scores: Sequence[Score]) -> None:
        """Write scores into the manifests and cards of the pool members that they belong to."""
        for name in dict.fromkeys(score.adapter for score in scores):
            held = self._known.get(name)
            if held and held.manifest and held.path == self.pool.root / name:
                own = [score for score in scores if score.adapter == name]
                self.describe(name, held.manifest.with_scores(own))

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace the manifest of a loaded pool member, on disk and here."""
        self.pool.describe(name, manifest)
        self._known[name] = replace(self._known[name], manifest=manifest)

    def refresh(self, name: str) -> None:
        """Read a pool member's manifest anew where it is loaded and its weights are still the same."""
        held, manifest = self._known.get(name), self.pool.manifest(name)
        if held and held.manifest and manifest and held.manifest.sha256 == manifest.sha256:
            self._known[name] = replace(held, manifest=manifest)

    def _hold(self, stored: Stored, ahead: StagedSlot | None = None) -> None:
        """Load what was accepted, and keep all but its numbers."""
        self.model.load(stored.name, stored.weights, _identity(stored), ahead)
        self._known[stored.name] = LoadedAdapter.of(stored)

    def _replace(self, stored: Stored) -> None:
        """Load what the pool has now; where there is no room, whoever asks for it next loads it."""
        try:
            self._hold(stored)
        except NoRoomError:
            if stored.name in self.model.slots:
                self.model.unload(stored.name)  # who runs with it ends with it
            self._known[stored.name] = LoadedAdapter.of(stored)


def _identity(stored: Stored) -> str | None:
    """Return a digest of all that an adapter computes: its numbers and their scaling; None if unverified."""
    if stored.manifest is None:
        return None
    config = json.dumps(dict(stored.config), sort_keys=True)
    return hashlib.sha256(f"{stored.manifest.sha256} {config}".encode()).hexdigest()
