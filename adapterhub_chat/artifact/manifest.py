"""`adapterhub.json`: an adapter's identity, training, prompt contract and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from adapterhub_chat.artifact.prototype import Routing
from adapterhub_chat.artifact.untrusted import parse_json, read_bytes
from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.data.metrics import METRICS
from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.types import Fingerprint, PromptContract, Retention, Score
from adapterhub_chat.validation import explain

MANIFEST, MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES = "adapterhub.json", 2**20, 10_000
How = Literal["joint", "sequence", "shared", "merge", "transfer", "foreign"]


Count = Annotated[int, Field(ge=0, lt=2**63)]


class Training(BaseModel):
    """How the adapter was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    how: How = "joint"
    tasks: tuple[str, ...] = ()
    data_sha256: tuple[str, ...] = ()
    sources: tuple[str, ...] = Field(default=(), description="Where the data comes from.")
    beside: tuple[str, ...] = Field(default=(), description="Adapters trained in the same run.")
    parents: tuple[str, ...] = Field(
        default=(), description="Content hashes of the adapters it was made from."
    )
    settings: dict[str, Any] = Field(default_factory=dict)
    steps: Count = 0
    best_step: Count = 0
    tokens: Count = 0
    seconds: float = 0.0
    backbone_bytes: Count = Field(default=0, description="Of the backbone's weights in training.")
    peak_bytes: Count = Field(
        default=0, description="Most memory that the run had used at its end."
    )
    validation_loss: float | None = None
    stopped: str = ""
    conflict: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="Of a shared adapter: mean cosine of two tasks' gradients on it.",
    )
    note: str = ""


class TransferReport(BaseModel):
    """Result of a transfer on the target's validation examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    source_sha256: str = ""
    method: str
    shots: int
    baseline: str
    verdict: Literal["helps", "neutral", "hurts"]
    gain: FiniteFloat = Field(description="Over the baseline; more is better, whatever the metric.")
    low: FiniteFloat
    high: FiniteFloat
    values: dict[str, FiniteFloat] = Field(default_factory=dict, description="Of every candidate.")
    verdicts: dict[str, Literal["helps", "neutral", "hurts"]] = Field(default_factory=dict)
    effective: FiniteFloat | None = Field(
        default=None, description="Effective sample size of a reweighted source, as a share of it."
    )
    lam: FiniteFloat | None = Field(default=None, description="Multiplier of its weights.")
    clipped: int | None = Field(default=None, description="How many of them were cut.")
    residual: FiniteFloat | None = Field(
        default=None,
        description="Largest distance left between mean features, in deviations of the source.",
    )
    discriminator: FiniteFloat | None = Field(
        default=None, description="Its accuracy at the end of an adversarial transfer; 0.5 is best."
    )
    proxy: str = Field(
        default="",
        description="What the verdict rests on where no example of the target has a label.",
    )
    note: str = Field(default="", description="What did not come out as it should.")
    seconds: FiniteFloat = 0.0


class Probe(BaseModel):
    """A prompt and its recorded next-token log-probabilities, checked when the adapter is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, max_length=500)
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, max_length=100, description="The most likely next tokens, best first."
    )
    logprobs: tuple[FiniteFloat, ...] = Field(
        description="Their log-probabilities with the adapter."
    )
    backbone_logprobs: tuple[FiniteFloat, ...] = Field(
        default=(),
        description="Those of the backbone alone; without them, only the same precision is compared.",
    )
    shift: FiniteFloat = Field(
        ge=0, description="Largest change of a next-token logit against the backbone."
    )
    dtype: Literal["", "float32"] = Field(
        default="", description="What it was computed in; empty: in the fingerprint's dtype."
    )

    @model_validator(mode="after")
    def _same_length(self) -> Probe:
        for logprobs in (self.logprobs, self.backbone_logprobs or self.logprobs):
            if len(logprobs) != len(self.tokens):
                raise ValueError(
                    f"{len(self.tokens)} tokens have {len(logprobs)} log-probabilities"
                )
        return self


class TriedMethod(BaseModel):
    """Validation results of a merge method that `auto` tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    mean: FiniteFloat = Field(description="Retention, over all sources' tasks.")
    lowest: FiniteFloat = Field(description="Retention of the task that suffers most.")


class MergeReport(BaseModel):
    """How an adapter was merged, and how much of its sources' scores it keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    weights: dict[str, FiniteFloat]
    rank: int
    density: FiniteFloat | None = None
    seed: int = 0
    energy: FiniteFloat = Field(
        description="Share that its rank holds of the update without a limit on it: of its squared norm, or, "
        "where a method looks at inputs, of its outputs'."
    )
    retention: tuple[Retention, ...] = Field(
        default=(), description="Merged beside each source, on test items."
    )
    mix: tuple[Retention, ...] = Field(
        default=(), description="The same of the sources mixed at run time."
    )
    drift: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="Mean KL (nats) of each source's next tokens on the probe prompts to the merged ones.",
    )
    tried: tuple[TriedMethod, ...] = ()
    verdict: str = ""


class StackBase(BaseModel):
    """A base adapter of a stack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=96, description="What it was called; its content decides.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The content of `adapterhub.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    about: str = ""
    language: str = ""
    licence: str = ""
    created: str = ""
    sha256: str = Field(
        default="", description="Of adapter_model.safetensors: the adapter's identity."
    )
    backbone: str
    fingerprint: Fingerprint
    contract: PromptContract
    metric: str = ""
    training: Training = Training()
    stack: tuple[StackBase, ...] = Field(
        default=(),
        max_length=8,
        description="What it stands on, the lowest first: it acts together with all of them.",
    )
    scores: tuple[Score, ...] = Field(default=(), max_length=1000)
    probe: Probe | None = None
    transfer: TransferReport | None = None
    merge: MergeReport | None = None
    routing: Routing | None = Field(
        default=None, description="What its messages look like; None: it is not routed to by them."
    )
    published: str = Field(default="", description="The repository on a Hub that it was pushed to.")

    @property
    def base_model(self) -> str:
        """The backbone's id on the Hub where it has one, else the name it was loaded by."""
        asset = ASSETS.get(self.backbone)
        return (asset and asset.upstream) or self.backbone

    def summary(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without the prototypes' encoded numbers."""
        return self.model_dump(
            mode="json", exclude={"routing": {"numbers": True, "glance": {"numbers": True}}}
        )

    def score(self, task: str) -> Score | None:
        """Return the score on a task, None if it was not measured."""
        return next((s for s in self.scores if s.task == task), None)

    def with_scores(self, scores: Sequence[Score]) -> Manifest:
        """Return the manifest with these scores, replacing older ones of the same task and precision."""
        replaced = {(s.task, s.precision) for s in scores}
        others = tuple(
            s for s in self.scores if (s.task, s.precision or scores[0].precision) not in replaced
        )
        return self.model_copy(update={"scores": (*others, *scores)})


def transfer_problem(manifest: Manifest | None) -> str:
    """Return a sentence when the adapter's transfer was judged to hurt, else an empty string."""
    report = manifest.transfer if manifest else None
    if manifest is None or report is None or report.verdict != "hurts":
        return ""
    return f"adapter {manifest.name!r} was judged to hurt beside {report.baseline} (gain {report.gain:.3f})"


def scores_below_backbone(manifest: Manifest) -> list[Score]:
    """Return the scores that the backbone beats, on the adapter's own tasks (on all if it names none)."""
    own_scores = [
        s for s in manifest.scores if s.task in manifest.training.tasks
    ] or manifest.scores
    return [s for s in own_scores if _is_worse(s)]


def _is_worse(score: Score) -> bool:
    if score.backbone_value is None or score.metric not in METRICS:
        return False
    better = score.value - score.backbone_value
    return (better if METRICS[score.metric].higher_is_better else -better) < 0


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest, None if it has none; raise AdapterError naming all misfits."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    data = read_bytes(path, MAX_MANIFEST_BYTES)
    try:
        return Manifest.model_validate(parse_json(data, MAX_MANIFEST_VALUES))
    except ValidationError as error:
        misfits = explain(error, Manifest)
        message = join_misfits(str(path), misfits)
        raise AdapterError(message, [f"{MANIFEST}: {misfit}" for misfit in misfits]) from error
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error


def dump_manifest(manifest: Manifest) -> str:
    """Return the JSON text of a manifest."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
