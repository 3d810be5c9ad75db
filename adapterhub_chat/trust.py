"""May this adapter be used on this backbone, and does it do what it did? Answers with all reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterhub_chat.generate import Request, next_token_logits
from adapterhub_chat.manifest import Manifest, Probe
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pool import Stored
from adapterhub_chat.types import Fingerprint, as_mix
from adapterhub_chat.weights import misfits

Status = Literal["exact", "compatible", "unverified", "refused"]

PROBE_PROMPT = "The quick brown fox jumps over the lazy dog. What do you think about it?"
PROBE_TOKENS = 5
PROBE_TOLERANCE: dict[Status, float] = {"exact": 0.25, "compatible": 1.0}
"""Largest change of a probe log-probability: other kernels round otherwise, 4-bit far more so."""


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
    return "exact" if manifest.fingerprint == backbone else "compatible"


def check_fit(stored: Stored, model: AdapterModel) -> Verdict:
    """Judge an adapter by its shapes and its fingerprint, without running it."""
    mine = model.backbone.fingerprint
    found = list(misfits(stored.weights, model.shapes))
    status = status_of(stored.manifest, mine)
    if stored.manifest is None:
        found.append("it has no adapterhub.json: its backbone and its prompt are unknown")
        return Verdict(
            len(found) == 1, "unverified" if len(found) == 1 else "refused", tuple(found)
        )
    its = stored.manifest.fingerprint
    for difference in its.differences(mine):
        found.append(
            f"the backbone's {difference} is {getattr(mine, difference)!r}, the adapter was made for "
            f"{getattr(its, difference)!r}; load it on {stored.manifest.backbone!r}"
        )
    if found:
        return Verdict(False, "refused", tuple(found))
    if status == "compatible":
        found.append(
            f"made on {its.dtype} ({its.quantization} quantization), "
            f"this backbone is {mine.dtype} ({mine.quantization} quantization)"
        )
    return Verdict(True, status, tuple(found))


def make_probe(model: AdapterModel, name: str) -> Probe:
    """Ask a loaded adapter and the backbone the probe question; return what must come again."""
    with_adapter, without = _probe_logits(model, PROBE_PROMPT, name)
    best = with_adapter.log_softmax(-1).topk(PROBE_TOKENS)
    return Probe(
        prompt=PROBE_PROMPT,
        tokens=tuple(best.indices.tolist()),
        logprobs=tuple(round(v, 4) for v in best.values.tolist()),
        shift=round(float((with_adapter - without).abs().max()), 4),
    )


def probe_problem(model: AdapterModel, name: str, probe: Probe | None, status: Status) -> str:
    """Return what is wrong with a loaded adapter's answer to its probe, or an empty string."""
    if probe is None:
        return ""
    with_adapter, without = _probe_logits(model, probe.prompt, name)
    if probe.shift > 0 and torch.equal(with_adapter, without):
        return "its logits equal the backbone's: the adapter has no effect"
    logprobs = with_adapter.log_softmax(-1)[list(probe.tokens)]
    off = float((logprobs - torch.tensor(probe.logprobs)).abs().max())
    limit = PROBE_TOLERANCE.get(status, PROBE_TOLERANCE["compatible"])
    if not off <= limit:
        return f"a log-probability of its probe is off by {off:.2f}, more than {limit}"
    return ""


def _probe_logits(model: AdapterModel, prompt: str, name: str) -> tuple[Tensor, Tensor]:
    ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    rows = [Request(ids, as_mix(name)), Request(ids)]
    first, second = next_token_logits(model, rows)
    return first, second
