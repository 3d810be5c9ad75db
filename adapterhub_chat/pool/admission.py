"""Admission: checks an adapter's shapes, fingerprint and probe before it may be loaded."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.peft_config import missing_module_misfits
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.slots import StagedSlot
from adapterhub_chat.lora.weights import misfits
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.probe import probe_key, probe_problem
from adapterhub_chat.pool.stacks import Stacks
from adapterhub_chat.pool.stored import Status, Stored
from adapterhub_chat.types import Fingerprint


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter may be used on a backbone, with all problems and warnings."""

    ok: bool
    status: Status
    problems: tuple[str, ...] = ()


def status_of(manifest: Manifest | None, backbone: Fingerprint) -> Status:
    """Return how an adapter's fingerprint relates to the backbone's."""
    if manifest is None:
        return "unverified"
    if manifest.fingerprint.differences(backbone):
        return "refused"
    is_exact = manifest.fingerprint == backbone and manifest.probe is not None
    return "exact" if is_exact else "compatible"


def check_fit(stored: Stored, model: AdapterModel) -> Verdict:
    """Check an adapter's modules, their shapes and its fingerprint, without a forward."""
    backbone = model.backbone.fingerprint
    problems = list(misfits(stored.weights, model.shapes, model.backbone.width))
    problems += missing_module_misfits(stored.config, stored.weights.factors, model.shapes)
    status = status_of(stored.manifest, backbone)
    if stored.manifest is None:
        problems.append("it has no adapterhub.json: its backbone and its prompt are unknown")
        return Verdict(
            len(problems) == 1, "unverified" if len(problems) == 1 else "refused", tuple(problems)
        )
    recorded = stored.manifest.fingerprint
    problems += fingerprint_misfits(stored.manifest, backbone)
    if problems:
        return Verdict(False, "refused", tuple(problems))
    if stored.manifest.probe is None:
        problems.append(
            "it has no probe: nobody can tell whether it does what it did when it was made"
        )
    if recorded != backbone:
        problems.append(
            f"made on {recorded.dtype} ({recorded.quantization} quantization), "
            f"this backbone is {backbone.dtype} ({backbone.quantization} quantization)"
        )
    return Verdict(True, status, tuple(problems))


def fingerprint_misfits(manifest: Manifest, backbone: Fingerprint) -> list[str]:
    """Return a sentence for each fingerprint field that differs from the manifest's."""
    recorded = manifest.fingerprint
    return [
        f"the backbone's {field} is {getattr(backbone, field)!r}, the adapter was made for "
        f"{getattr(recorded, field)!r}; load it on {manifest.backbone!r}"
        for field in recorded.differences(backbone)
    ]


class Admission:
    """Admits adapters that fit the backbone and reproduce their recorded probe answers."""

    def __init__(self, model: AdapterModel, pool: Pool, stacks: Stacks) -> None:
        """Start with the probe answers that the pool has recorded."""
        self.model, self.pool, self.stacks = model, pool, stacks
        self._answered: set[str] = set()

    def verdict(self, stored: Stored) -> Verdict:
        """Check an adapter's fit, and its probe where it has one."""
        verdict = check_fit(stored, self.model)
        try:
            problem = self._ask_probe(stored, verdict) if verdict.ok else ""
        except AdapterError as error:  # of an adapter that the stack needs
            return Verdict(False, "refused", error.misfits)
        return Verdict(False, "refused", (problem,)) if problem else verdict

    def admit(self, stored: Stored, staged: StagedSlot | None = None) -> str:
        """Return a warning, or an empty string; raise AdapterError when the adapter may not be loaded.

        A `staged` slot is freed when the probe has to run, which needs a slot itself.
        """
        verdict = check_fit(stored, self.model)
        problems = "; ".join(verdict.problems)
        if not verdict.ok:
            message = (
                f"adapter {stored.name!r} is refused on {self.model.backbone.name}: {problems}"
            )
            raise AdapterError(message, verdict.problems)
        self.stacks.base_names(stored.manifest)
        if not self._is_answered(probe_key(stored, self.model)):
            if staged is not None:
                staged.clear()
            if problem := self._ask_probe(stored, verdict):
                message = f"adapter {stored.name!r} does not do what it did: {problem}"
                raise AdapterError(message, (problem,))
            self.remember_probe(stored)
        exact = verdict.status == "exact"
        return "" if exact else f"adapter {stored.name!r} is {verdict.status}: {problems}"

    def remember_probe(self, stored: Stored) -> None:
        """Record, here and in the pool, that an adapter passed its probe."""
        key = probe_key(stored, self.model)
        if key and not self._is_answered(key):
            self._answered.add(key)
            self.pool.record_answered_probe(key)

    def _is_answered(self, key: str) -> bool:
        """Return whether the probe with this key was passed before, by this process or another."""
        if key and key not in self._answered:
            self._answered.update(self.pool.answered_probes())
        return key in self._answered

    def _ask_probe(self, stored: Stored, verdict: Verdict) -> str:
        """Run the probe with the adapter loaded temporarily; return what is wrong with the answer."""
        probe = stored.manifest.probe if stored.manifest else None
        if probe is None:
            return ""
        with self.model.temporarily_loaded(stored.weights, stored.name) as trial:
            mix = self.stacks.trial_mix(trial, stored.manifest)
            return probe_problem(self.model, mix, probe, verdict.status)
