"""Shelf: the pool and its loaded part together. Adapters come onto it checked, under their contract."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.folder import config_of
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pool import Pool, Stored, check_name, read_stored
from adapterhub_chat.trust import Verdict, check_fit, make_probe, probe_problem
from adapterhub_chat.types import AdapterChoice, Mix, PromptContract, Score, as_mix
from adapterhub_chat.weights import AdapterWeights


class Shelf:
    """Which adapters are loaded, where each came from, and what its manifest says."""

    def __init__(self, model: AdapterModel, pool: Pool) -> None:
        """Start with nothing loaded."""
        self.model, self.pool = model, pool
        self._stored: dict[str, Stored] = {}

    def stored(self, name: str) -> Stored | None:
        """Return a loaded adapter as it was read, None when it is not loaded."""
        return self._stored.get(name)

    def load(self, source: str | Path, name: str | None = None) -> str:
        """Check and load a pool member or a folder; return its name. See AdapterHub.load."""
        stored = self.find(source, name)
        verdict = check_fit(stored, self.model)
        problems = "; ".join(verdict.problems)
        if not verdict.ok:
            backbone = self.model.backbone.name
            raise AdapterError(f"adapter {stored.name!r} is refused on {backbone}: {problems}")
        if verdict.status != "exact":
            note = f"adapter {stored.name!r} is {verdict.status}: {problems}"
            warnings.warn(note, stacklevel=3)
        if problem := self._probed(stored, verdict):
            raise AdapterError(f"adapter {stored.name!r} does not do what it did: {problem}")
        self.model.load(stored.name, stored.weights)
        self._stored[stored.name] = stored
        return stored.name

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        self.model.unload(name)
        self._stored.pop(name, None)

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter without loading it: bytes, shapes, fingerprint, probe."""
        try:
            stored = self.find(source, "candidate")  # what the folder is called is no matter here
        except AdapterError as error:
            return Verdict(False, "refused", (str(error),))
        verdict = check_fit(stored, self.model)
        if verdict.ok and (problem := self._probed(stored, verdict)):
            return Verdict(False, "refused", (problem,))
        return verdict

    def find(self, source: str | Path, name: str | None = None) -> Stored:
        """Read the pool member called `source`, else the adapter in the folder `source`."""
        if isinstance(source, str) and source in self.pool:
            stored = self.pool.load(source)
            return replace(stored, name=check_name(name)) if name else stored
        folder = Path(source).expanduser()
        if isinstance(source, Path) or folder.is_dir():
            return read_stored(folder, check_name(name or folder.resolve().name))
        return self.pool.load(source)  # raises, naming the adapters that are there

    def ready(self, choices: Sequence[AdapterChoice]) -> list[Mix]:
        """Return the mixes, after loading from the pool what they name and is not loaded yet."""
        mixes = [as_mix(choice) for choice in choices]
        for name in dict.fromkeys(n for mix in mixes for n in mix.names):
            if name not in self.model.names:
                self.load(name)
        return mixes

    def contract(self, mix: Mix) -> PromptContract | None:
        """Return the contract of the mix's heaviest adapter, None when it has none."""
        if not mix.weights:
            return None
        heaviest = max(mix.weights, key=lambda pair: abs(pair[1]))[0]
        stored = self._stored.get(heaviest)
        return stored.manifest.contract if stored and stored.manifest else None

    def keep(
        self, weights: AdapterWeights, manifest: Manifest, *, probing: bool = True
    ) -> Manifest:
        """Save a new adapter with its probe to the pool and load it; return the final manifest.

        When it cannot be saved, pool and loaded adapters are as before. Without `probing` no forward is
        run, and the adapter has no probe.
        """
        probe = None
        if probing:
            with self._on_trial(manifest.name, weights) as trial:
                probe = make_probe(self.model, trial)
        config = config_of(weights, manifest.base_model, self.model.shapes)
        draft = manifest.model_copy(update={"probe": probe})
        stored = self.pool.save(manifest.name, weights, config, draft)
        self.model.load(stored.name, weights)
        self._stored[stored.name] = stored
        assert stored.manifest is not None
        return stored.manifest

    def record(self, scores: Sequence[Score]) -> None:
        """Write scores into the manifests and cards of the pool members that they belong to."""
        for name in dict.fromkeys(score.adapter for score in scores):
            stored = self._stored.get(name)
            if stored and stored.manifest and stored.path == self.pool.root / name:
                own = [score for score in scores if score.adapter == name]
                self.describe(name, stored.manifest.with_scores(own))

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace the manifest of a loaded pool member, on disk and here."""
        self.pool.describe(name, manifest)
        self._stored[name] = replace(self._stored[name], manifest=manifest)

    def _probed(self, stored: Stored, verdict: Verdict) -> str:
        """Return what the adapter's answer to its probe is wrong in; it is in no name's slot yet."""
        probe = stored.manifest.probe if stored.manifest else None
        if probe is None:
            return ""
        with self._on_trial(stored.name, stored.weights) as trial:
            return probe_problem(self.model, trial, probe, verdict.status)

    @contextmanager
    def _on_trial(self, name: str, weights: AdapterWeights) -> Iterator[str]:
        """Load weights under a name that nobody uses, for as long as the block runs."""
        trial = f"{name} on trial {time.monotonic_ns()} {threading.get_ident()}"
        self.model.load(trial, weights)
        try:
            yield trial
        finally:
            self.model.unload(trial)
