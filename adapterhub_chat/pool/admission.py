"""Whether an adapter may be used here: fit, verdict, status, and the probes that were answered."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.peft_config import absent_misfits
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
    """Whether an adapter may be used on a backbone, and all that is wrong or worth knowing."""

    ok: bool
    status: Status
    problems: tuple[str, ...] = ()


def status_of(manifest: Manifest | None, backbone: Fingerprint) -> Status:
    """Return how an adapter's fingerprint relates to the backbone's."""
    if manifest is None:
        return "unverified"
    if manifest.fingerprint.differences(backbone):
        return "refused"
    same = manifest.fingerprint == backbone and manifest.probe is not None
    return "exact" if same else "compatible"


def check_fit(stored: Stored, model: AdapterModel) -> Verdict:
    """Judge an adapter by its modules, their shapes and its fingerprint, without running it."""
    mine = model.backbone.fingerprint
    found = list(misfits(stored.weights, model.shapes, model.backbone.width))
    found += absent_misfits(stored.config, stored.weights.factors, model.shapes)
    status = status_of(stored.manifest, mine)
    if stored.manifest is None:
        found.append("it has no adapterhub.json: its backbone and its prompt are unknown")
        return Verdict(
            len(found) == 1, "unverified" if len(found) == 1 else "refused", tuple(found)
        )
    its = stored.manifest.fingerprint
    found += fingerprint_misfits(stored.manifest, mine)
    if found:
        return Verdict(False, "refused", tuple(found))
    if stored.manifest.probe is None:
        found.append(
            "it has no probe: nobody can tell whether it does what it did when it was made"
        )
    if its != mine:
        found.append(
            f"made on {its.dtype} ({its.quantization} quantization), "
            f"this backbone is {mine.dtype} ({mine.quantization} quantization)"
        )
    return Verdict(True, status, tuple(found))


def fingerprint_misfits(manifest: Manifest, backbone: Fingerprint) -> list[str]:
    """Return a sentence for each field in which a backbone is another than the adapter's."""
    its = manifest.fingerprint
    return [
        f"the backbone's {field} is {getattr(backbone, field)!r}, the adapter was made for "
        f"{getattr(its, field)!r}; load it on {manifest.backbone!r}"
        for field in its.differences(backbone)
    ]


class Admission:
    """Lets adapters in: those that fit the backbone and answer their probes as they did."""

    def __init__(self, model: AdapterModel, pool: Pool, stacks: Stacks) -> None:
        """Know of no answer but those that the pool has noted."""
        self.model, self.pool, self.stacks = model, pool, stacks
        self._answered: set[str] = set()

    def verdict(self, stored: Stored) -> Verdict:
        """Judge an adapter by its fit, and by its probe where it has one."""
        verdict = check_fit(stored, self.model)
        try:
            problem = self._asked(stored, verdict) if verdict.ok else ""
        except AdapterError as error:  # of what it stands on
            return Verdict(False, "refused", error.misfits)
        return Verdict(False, "refused", (problem,)) if problem else verdict

    def accepted(self, stored: Stored, ahead: StagedSlot | None = None) -> str:
        """Return what is worth a warning; raise AdapterError for what may not be loaded here.

        A slot that was filled `ahead` is given back where the probe needs one.
        """
        verdict = check_fit(stored, self.model)
        problems = "; ".join(verdict.problems)
        if not verdict.ok:
            message = (
                f"adapter {stored.name!r} is refused on {self.model.backbone.name}: {problems}"
            )
            raise AdapterError(message, verdict.problems)
        self.stacks.standing(stored.manifest)
        if not self._knows(probe_key(stored, self.model)):
            if ahead is not None:
                ahead.clear()
            if problem := self._asked(stored, verdict):
                message = f"adapter {stored.name!r} does not do what it did: {problem}"
                raise AdapterError(message, (problem,))
            self.note(stored)
        exact = verdict.status == "exact"
        return "" if exact else f"adapter {stored.name!r} is {verdict.status}: {problems}"

    def note(self, stored: Stored) -> None:
        """Remember that an adapter's probe was answered rightly, here and in the pool."""
        key = probe_key(stored, self.model)
        if key and not self._knows(key):
            self._answered.add(key)
            self.pool.note_answered(key)

    def _knows(self, key: str) -> bool:
        """Return whether the probe with this key was answered rightly, here or as the pool says."""
        if key and key not in self._answered:
            self._answered.update(self.pool.answered())
        return key in self._answered

    def _asked(self, stored: Stored, verdict: Verdict) -> str:
        """Return what the adapter's answer to its probe is wrong in; it is in no name's slot yet."""
        probe = stored.manifest.probe if stored.manifest else None
        if probe is None:
            return ""
        with self.model.temporarily_loaded(stored.weights, stored.name) as trial:
            mix = self.stacks.beside(trial, stored.manifest)
            return probe_problem(self.model, mix, probe, verdict.status)
