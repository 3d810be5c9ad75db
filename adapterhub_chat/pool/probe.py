"""Probes: recorded next-token log-probabilities that show whether an adapter still works."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.artifact.manifest import Probe
from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import Encoded, messages_of
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
NUM_PROBE_TOKENS = 5
MIN_EFFECT = 0.1
"""Smallest allowed shift of the logits, as a share of the recorded shift."""
TOLERANCE, TOLERANCE_PER_DRIFT = 0.25, 3.0
"""Largest allowed change of a probe log-probability that was recorded in 16 bits: for kernels that round
differently, and for each unit by which the backbone's own log-probabilities have changed (in 4 bits they
change by far more)."""
FLOAT32_TOLERANCE = 0.02
"""The same where both answers are float32: rounding of other kernels, and of the recorded decimals."""
TOLERANCE_PER_SHIFT, TOLERANCE_PER_QUANTIZED_SHIFT = 0.03, 0.6
"""Added tolerance, as a share of the recorded shift: for rounding the adapter to 16 bits, and for a backbone
in 4 or 8 bits, whose activations differ (measured by tests/pool/test_probe_rounding.py)."""
MAX_PATH_ERROR = 0.5
"""Largest distance between the shift in the backbone's dtype and the shift in float32, as a share of the
latter, in addition to the rounding error of the backbone alone."""


def make_probe(model: AdapterModel, choice: AdapterChoice) -> Probe:
    """Run the probe prompt with a loaded adapter and with the backbone alone; return the recorded answers."""
    answers = _probe_logits(model, PROBE_PROMPT, choice)
    if not answers[0].isfinite().all():
        raise AdapterError(
            f"{as_mix(choice)}: it makes logits that are not finite; it cannot be used"
        )
    adapter_logits, backbone_logits = _reference(model, PROBE_PROMPT, choice) or answers
    tokens = adapter_logits.topk(min(NUM_PROBE_TOKENS, len(adapter_logits))).indices
    return Probe(
        prompt=PROBE_PROMPT,
        tokens=tuple(tokens.tolist()),
        logprobs=_rounded(adapter_logits.log_softmax(-1)[tokens]),
        backbone_logprobs=_rounded(backbone_logits.log_softmax(-1)[tokens]),
        shift=round(float((adapter_logits - backbone_logits).abs().max()), 4),
        dtype="float32" if _is_float32(model) else "",
    )


def probe_prompts(tokenizer: Any, contract: PromptContract | None) -> list[tuple[int, ...]]:
    """Return the probe prompt as token ids: plain, and formatted by a contract if there is one."""
    prompts = [tuple(tokenizer(PROBE_PROMPT).input_ids)]
    if contract is not None:
        fields = dict.fromkeys(placeholders(contract.template), PROBE_PROMPT)
        prompts += encode_prompts(tokenizer, [messages_of(contract, Example(fields, ""))])
    return prompts


def probe_problem(
    model: AdapterModel, choice: AdapterChoice, probe: Probe | None, status: Status
) -> str:
    """Return what is wrong with a loaded adapter's answer to its probe, or an empty string."""
    if probe is None:
        return ""
    answers = _probe_logits(model, probe.prompt, choice)
    if max(probe.tokens) >= len(answers[1]):
        return f"its probe names token {max(probe.tokens)}, the backbone has {len(answers[1])}"
    shift = float((answers[0] - answers[1]).abs().max())
    if probe.shift > 0 and not shift > MIN_EFFECT * probe.shift:
        return (
            f"the adapter has no effect: it moves a logit by {shift:.2g}, not by {probe.shift:.2g}"
        )
    reference = _reference(model, probe.prompt, choice)
    if reference and (problem := _path_problem(answers, reference)):
        return problem
    if status != "exact" and not probe.backbone_logprobs:
        return ""
    return _record_problem(reference or answers, probe, status, model)


def _path_problem(answers: Answers, reference: Answers) -> str:
    """Compare an adapter's shift of all logits, in the running dtype, with the shift in float32."""
    shift, expected = answers[0] - answers[1], reference[0] - reference[1]
    rounding = float((answers[1] - reference[1]).norm())
    error, limit = (
        float((shift - expected).norm()),
        MAX_PATH_ERROR * float(expected.norm()) + 2 * rounding,
    )
    if error <= limit:
        return ""
    return f"its effect here is off by {error:.2g} from what float32 gives, more than {limit:.2g}"


def _record_problem(answers: Answers, probe: Probe, status: Status, model: AdapterModel) -> str:
    """Compare the log-probabilities with and without the adapter with the recorded ones."""
    adapter_logits, backbone_logits = answers
    change = _max_logprob_change(adapter_logits, probe.tokens, probe.logprobs)
    drift = _max_logprob_change(backbone_logits, probe.tokens, probe.backbone_logprobs)
    if status == "exact" and not drift <= TOLERANCE:
        return f"the backbone alone answers its probe otherwise than is recorded, by {drift:.2f}"
    both_float32 = _is_float32(model) and probe.dtype == "float32"
    limit = (FLOAT32_TOLERANCE if both_float32 else TOLERANCE) + TOLERANCE_PER_DRIFT * drift
    limit += (
        TOLERANCE_PER_QUANTIZED_SHIFT if model.backbone.quantize else TOLERANCE_PER_SHIFT
    ) * probe.shift
    if not change <= limit:
        return f"a log-probability of its probe is off by {change:.2f}, more than {limit:.2f}"
    return ""


def probe_key(stored: Stored, model: AdapterModel) -> str:
    """Return a digest (64 hex digits) of all that the answer to an adapter's probe depends on.

    A probe that was passed once need not run again under the same key: the same weights, scaling and probe
    on the same backbone, device and libraries. Empty for an adapter without a probe.
    """
    manifest, backbone = stored.manifest, model.backbone
    if manifest is None or manifest.probe is None:
        return ""
    dependencies = (
        manifest.sha256,
        dict(stored.config),
        manifest.probe.model_dump(),
        asdict(manifest.fingerprint),
        asdict(backbone.fingerprint),
        backbone.device.type,
        LIBRARIES,
        *(base.sha256 for base in manifest.stack),
    )
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()


def _max_logprob_change(logits: Tensor, tokens: Sequence[int], recorded: Sequence[float]) -> float:
    """Return the largest change of the tokens' log-probabilities against their record; 0 without one."""
    current = logits.log_softmax(-1)[list(tokens)].tolist()
    return max((abs(a - b) for a, b in zip(current, recorded, strict=False)), default=0.0)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())


def _is_float32(model: AdapterModel) -> bool:
    """Return whether the probe is answered in float32 from unquantized weights."""
    backbone = model.backbone
    return has_reference(model) or (backbone.dtype == torch.float32 and backbone.quantize is None)


def _reference(model: AdapterModel, prompt: str, choice: AdapterChoice) -> Answers | None:
    """Return the answers in float32; None where the backbone runs in float32 itself, or cannot."""
    if not has_reference(model):
        return None
    token_ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    batch = model.pack([[Encoded(token_ids, ((0,),))]] * 2, len(token_ids))
    updates = [(model.weights(adapter), weight) for adapter, weight in as_mix(choice).weights]
    adapter_logits, backbone_logits = reference_logits(model, batch, updates).cpu()
    return adapter_logits, backbone_logits


def _probe_logits(model: AdapterModel, prompt: str, choice: AdapterChoice) -> Answers:
    """Return the logits after a prompt with the adapter, and of the backbone alone."""
    token_ids = tuple(model.backbone.tokenizer(prompt).input_ids)
    rows = [Request(token_ids, as_mix(choice)), Request(token_ids)]
    adapter_logits, backbone_logits = next_token_logits(model, rows)
    return adapter_logits, backbone_logits
