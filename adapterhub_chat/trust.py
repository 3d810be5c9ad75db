"""May this adapter be used on this backbone, and does it do what it did? Answers with all reasons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from adapterhub_chat.backbone import LIBRARIES
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.generate import Request, next_token_logits
from adapterhub_chat.manifest import Manifest, Probe
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.peft_config import absent_misfits
from adapterhub_chat.pool import Stored
from adapterhub_chat.prompt import placeholders
from adapterhub_chat.template import encode_prompts, messages_of
from adapterhub_chat.types import AdapterChoice, Example, Fingerprint, PromptContract, as_mix
from adapterhub_chat.weights import misfits

Status = Literal["exact", "compatible", "unverified", "refused"]

PROBE_PROMPT = "The quick brown fox jumps over the lazy dog. What do you think about it?"
PROBE_TOKENS = 5
EFFECT = 0.1
"""The share of its recorded shift of the logits that an adapter must still bring about."""
TOLERANCE, PER_DRIFT = 0.25, 3.0
"""Largest change of a probe log-probability: for other kernels, which round otherwise, and for each unit by
which the backbone's own log-probabilities have changed (in 4 bits they move by far more)."""


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


def make_probe(model: AdapterModel, name: AdapterChoice) -> Probe:
    """Ask a loaded adapter and the backbone the probe question; return what must come again."""
    with_adapter, without = _probe_logits(model, PROBE_PROMPT, name)
    if not with_adapter.isfinite().all():
        raise AdapterError(
            f"{as_mix(name)}: it makes logits that are not finite; it cannot be used"
        )
    tokens = with_adapter.topk(min(PROBE_TOKENS, len(with_adapter))).indices
    return Probe(
        prompt=PROBE_PROMPT,
        tokens=tuple(tokens.tolist()),
        logprobs=_rounded(with_adapter.log_softmax(-1)[tokens]),
        backbone_logprobs=_rounded(without.log_softmax(-1)[tokens]),
        shift=round(float((with_adapter - without).abs().max()), 4),
    )


def probe_prompts(tokenizer: Any, contract: PromptContract | None) -> list[tuple[int, ...]]:
    """Return the probe's prompt as token ids: bare, and as a contract puts it."""
    prompts = [tuple(tokenizer(PROBE_PROMPT).input_ids)]
    if contract is not None:
        fields = dict.fromkeys(placeholders(contract.template), PROBE_PROMPT)
        prompts += encode_prompts(tokenizer, [messages_of(contract, Example(fields, ""))])
    return prompts


def probe_problem(
    model: AdapterModel, name: AdapterChoice, probe: Probe | None, status: Status
) -> str:
    """Return what is wrong with a loaded adapter's answer to its probe, or an empty string."""
    if probe is None:
        return ""
    with_adapter, without = _probe_logits(model, probe.prompt, name)
    if max(probe.tokens) >= len(without):
        return f"its probe names token {max(probe.tokens)}, the backbone has {len(without)}"
    shift = float((with_adapter - without).abs().max())
    if probe.shift > 0 and not shift > EFFECT * probe.shift:
        return (
            f"the adapter has no effect: it moves a logit by {shift:.2g}, not by {probe.shift:.2g}"
        )
    if status != "exact" and not probe.backbone_logprobs:
        return ""
    off = _change(with_adapter, probe.tokens, probe.logprobs)
    drift = _change(without, probe.tokens, probe.backbone_logprobs)
    if status == "exact" and not drift <= TOLERANCE:
        return f"the backbone alone answers its probe otherwise than is recorded, by {drift:.2f}"
    limit = TOLERANCE + PER_DRIFT * drift
    if not off <= limit:
        return f"a log-probability of its probe is off by {off:.2f}, more than {limit:.2f}"
    return ""


def probe_key(stored: Stored, model: AdapterModel) -> str:
    """Return a digest (64 hex digits) of all that the answer to an adapter's probe depends on.

    Once it has been right, it is right for every load under the same key: the same weights, scaling and
    probe on the same backbone, device and libraries. Empty for an adapter without a probe.
    """
    manifest, backbone = stored.manifest, model.backbone
    if manifest is None or manifest.probe is None:
        return ""
    asked = (
        manifest.sha256,
        dict(stored.config),
        manifest.probe.model_dump(),
        asdict(manifest.fingerprint),
        asdict(backbone.fingerprint),
        backbone.device.type,
        LIBRARIES,
        *(under.sha256 for under in manifest.stack),
    )
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _change(logits: Tensor, tokens: Sequence[int], recorded: Sequence[float]) -> float:
    """Return the largest change of the tokens' log-probabilities since they were recorded, if they were."""
    now = logits.log_softmax(-1)[list(tokens)].tolist()
    return max((abs(a - b) for a, b in zip(now, recorded, strict=False)), default=0.0)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())


def _probe_logits(model: AdapterModel, prompt: str, name: AdapterChoice) -> tuple[Tensor, Tensor]:
    ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    rows = [Request(ids, as_mix(name)), Request(ids)]
    first, second = next_token_logits(model, rows)
    return first, second
