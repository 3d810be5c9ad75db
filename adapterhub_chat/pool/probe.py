"""May this adapter be used on this backbone, and does it do what it did? Answers with all reasons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.artifact.manifest import Probe
from adapterhub_chat.data.encoding import Encoded, encode_prompts, messages_of
from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.inference.likelihood import next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import LIBRARIES
from adapterhub_chat.model.reference import has_reference, reference_logits
from adapterhub_chat.pool.stored import Status, Stored
from adapterhub_chat.types import AdapterChoice, Example, PromptContract, as_mix

Answers = tuple[Tensor, Tensor]
"""Next-token logits (vocab,), float32: with an adapter, and of the backbone alone."""
PROBE_PROMPT = "The quick brown fox jumps over the lazy dog. What do you think about it?"
PROBE_TOKENS = 5
EFFECT = 0.1
"""The share of its recorded shift of the logits that an adapter must still bring about."""
TOLERANCE, PER_DRIFT = 0.25, 3.0
"""Largest change of a probe log-probability that was recorded in 16 bits: for other kernels, which round
otherwise, and for each unit by which the backbone's own log-probabilities have changed (in 4 bits they move
by far more)."""
FLOAT32_TOLERANCE = 0.02
"""The same where both answers are float32: other kernels' rounding, and decimals of the record."""
PER_SHIFT, PER_PACKED_SHIFT = 0.03, 0.5
"""What rounding of the adapter's own numbers to 16 bits adds, as a share of the recorded shift, and what a
backbone packed in 4 or 8 bits adds: the adapter then acts on other activations (measured by
tests/pool/test_probe_rounding.py)."""
PATH_ERROR = 0.5
"""Largest distance of the shift as the backbone's dtype gives it from the shift in float32, as a share of
the latter, beside the rounding that the bare backbone shows."""


def make_probe(model: AdapterModel, name: AdapterChoice) -> Probe:
    """Ask a loaded adapter and the backbone the probe question; return what must come again."""
    running = _probe_logits(model, PROBE_PROMPT, name)
    if not running[0].isfinite().all():
        raise AdapterError(
            f"{as_mix(name)}: it makes logits that are not finite; it cannot be used"
        )
    with_adapter, without = _reference(model, PROBE_PROMPT, name) or running
    tokens = with_adapter.topk(min(PROBE_TOKENS, len(with_adapter))).indices
    return Probe(
        prompt=PROBE_PROMPT,
        tokens=tuple(tokens.tolist()),
        logprobs=_rounded(with_adapter.log_softmax(-1)[tokens]),
        backbone_logprobs=_rounded(without.log_softmax(-1)[tokens]),
        shift=round(float((with_adapter - without).abs().max()), 4),
        dtype="float32" if _is_float32(model) else "",
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
    running = _probe_logits(model, probe.prompt, name)
    if max(probe.tokens) >= len(running[1]):
        return f"its probe names token {max(probe.tokens)}, the backbone has {len(running[1])}"
    shift = float((running[0] - running[1]).abs().max())
    if probe.shift > 0 and not shift > EFFECT * probe.shift:
        return (
            f"the adapter has no effect: it moves a logit by {shift:.2g}, not by {probe.shift:.2g}"
        )
    reference = _reference(model, probe.prompt, name)
    if reference and (problem := _path_problem(running, reference)):
        return problem
    if status != "exact" and not probe.backbone_logprobs:
        return ""
    return _record_problem(reference or running, probe, status, model)


def _path_problem(running: Answers, reference: Answers) -> str:
    """Compare an adapter's shift of all logits, as it is computed here, with the shift in float32."""
    shift, wanted = running[0] - running[1], reference[0] - reference[1]
    rounding = float((running[1] - reference[1]).norm())
    error, limit = float((shift - wanted).norm()), PATH_ERROR * float(wanted.norm()) + 2 * rounding
    if error <= limit:
        return ""
    return f"its effect here is off by {error:.2g} from what float32 gives, more than {limit:.2g}"


def _record_problem(answers: Answers, probe: Probe, status: Status, model: AdapterModel) -> str:
    """Compare the answers with and without the adapter with those on record."""
    with_adapter, without = answers
    change = _change(with_adapter, probe.tokens, probe.logprobs)
    drift = _change(without, probe.tokens, probe.backbone_logprobs)
    if status == "exact" and not drift <= TOLERANCE:
        return f"the backbone alone answers its probe otherwise than is recorded, by {drift:.2f}"
    both = _is_float32(model) and probe.dtype == "float32"
    limit = (FLOAT32_TOLERANCE if both else TOLERANCE) + PER_DRIFT * drift
    limit += (PER_PACKED_SHIFT if model.backbone.quantize else PER_SHIFT) * probe.shift
    if not change <= limit:
        return f"a log-probability of its probe is off by {change:.2f}, more than {limit:.2f}"
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


def _is_float32(model: AdapterModel) -> bool:
    """Return whether `_reference`, or else the running path, computes in float32 of unpacked numbers."""
    backbone = model.backbone
    return has_reference(model) or (backbone.dtype == torch.float32 and backbone.quantize is None)


def _reference(model: AdapterModel, prompt: str, name: AdapterChoice) -> Answers | None:
    """Return the answers in float32; None where the backbone computes in it anyway, or cannot."""
    if not has_reference(model):
        return None
    ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    batch = model.pack([[Encoded(ids, ((0,),))]] * 2, len(ids))
    updates = [(model.weights(part), share) for part, share in as_mix(name).weights]
    first, second = reference_logits(model, batch, updates).cpu()
    return first, second


def _probe_logits(model: AdapterModel, prompt: str, name: AdapterChoice) -> Answers:
    """Return the logits after a prompt with the adapter, and of the backbone alone."""
    ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    rows = [Request(ids, as_mix(name)), Request(ids)]
    first, second = next_token_logits(model, rows)
    return first, second
