"""Whether an adapter may be used here: fit, verdict and status."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.peft_config import absent_misfits
from adapterhub_chat.lora.weights import misfits
from adapterhub_chat.model.adapter_model import AdapterModel
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
