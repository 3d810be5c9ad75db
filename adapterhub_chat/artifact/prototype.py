"""What a manifest keeps of the messages that an adapter is for: its prototype, as text."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


@dataclass(frozen=True)
class Cloud:
    """Messages as Gaussians with one covariance, factors^T factors + diag(rest), rounded to float16."""

    centres: Tensor
    """(K, W)"""
    shares: Tensor
    """(K,): how many of the messages are around each; above 0, sum 1."""
    factors: Tensor
    """(R, W)"""
    rest: Tensor
    """(W,): variances, >= 0."""

    @property
    def width(self) -> int:
        """W."""
        return self.rest.shape[0]

    def narrowed(self, width: int) -> Cloud:
        """Return the cloud of the first numbers of the same messages."""
        return Cloud(
            self.centres[:, :width], self.shares, self.factors[:, :width], self.rest[:width]
        )


@dataclass(frozen=True)
class Prototype:
    """What an adapter's messages look like."""

    own: Cloud
    background: Cloud
    """Of the first B numbers."""
    ratios: Tensor
    """(Q,): quantiles over the held-out messages, ascending."""
    densities: Tensor
    """(Q,)"""
    count: int = 0
    """Messages that it was learnt from."""


MAX_TEXT = 800_000
"""Longest text of numbers: a manifest has at most 1 MB."""
HALF = 2
"""Bytes of a float16."""

Size = Annotated[int, Field(ge=1, le=4096)]


class StoredPrototype(BaseModel):
    """A prototype's sizes and numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Size = Field(description="Numbers of a vector.")
    background_width: Size | None = Field(
        default=None, description="How many of them the background has; None: all."
    )
    centres: Size
    rank: Size
    background_rank: Size
    quantiles: Annotated[int, Field(ge=2, le=4096)]
    count: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Messages that it was learnt from."
    )
    numbers: str = Field(
        max_length=MAX_TEXT,
        description="base64 of little-endian float16: own centres, shares, factors, rest; the same of the "
        "background, with one centre; quantiles of ratios and densities.",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> StoredPrototype:
        if self._behind > self.width:
            raise ValueError(f"background_width is {self._behind}, width only {self.width}")
        sizes, found = self._sizes(), len(self.numbers)
        if found != (wanted := -(-HALF * sum(sizes) // 3) * 4):
            raise ValueError(f"numbers: {found} characters, not {wanted}, as the sizes say")
        if problem := _problem(self.prototype()):
            raise ValueError(f"numbers: {problem}")
        return self

    def _sizes(self) -> tuple[int, ...]:
        width, centres, behind = self.width, self.centres, self._behind
        own = (centres * width, centres, self.rank * width, width)
        background = (behind, 1, self.background_rank * behind, behind)
        return (*own, *background, self.quantiles, self.quantiles)

    @property
    def _behind(self) -> int:
        return self.background_width or self.width

    def prototype(self) -> Prototype:
        """Return the numbers; raise ValueError where they are no base64."""
        try:
            raw = bytearray(base64.b64decode(self.numbers, validate=True))
        except binascii.Error as error:
            raise ValueError(f"numbers: {error}") from error
        if len(raw) != HALF * sum(self._sizes()):
            raise ValueError(f"numbers: {len(raw)} bytes, not {HALF * sum(self._sizes())}")
        parts = torch.frombuffer(raw, dtype=torch.float16).double().split(self._sizes())
        own, background = _cloud(parts[:4]), _cloud(parts[4:8])
        return Prototype(own, background, parts[8], parts[9], self.count)


class Glance(StoredPrototype):
    """The prototype of what messages are at a glance."""

    features: Literal["token-mean-1"] = Field(
        default="token-mean-1", description="How a message becomes a vector without any block."
    )


class Routing(StoredPrototype):
    """Prototypes: they hold for the backbone of the manifest's fingerprint, whatever its precision."""

    features: Literal["early-mean-1", "early-mean-2"] = Field(
        default="early-mean-2",
        description="How a message becomes a vector; the first, without words, is used no more.",
    )
    glance: Glance | None = Field(
        default=None, description="The same for plain messages; None: all are looked at."
    )


def routing_of(prototype: Prototype, glance: Prototype | None = None) -> Routing:
    """Return what a manifest keeps of prototypes."""
    return Routing(**_kept(prototype), glance=None if glance is None else Glance(**_kept(glance)))


def _kept(prototype: Prototype) -> dict[str, Any]:
    own, background = prototype.own, prototype.background
    clouds = (part for c in (own, background) for part in (c.centres, c.shares, c.factors, c.rest))
    flat = torch.cat([t.flatten() for t in (*clouds, prototype.ratios, prototype.densities)])
    return {
        "width": own.width,
        "background_width": background.width,
        "centres": len(own.centres),
        "rank": len(own.factors),
        "background_rank": len(background.factors),
        "quantiles": len(prototype.ratios),
        "count": prototype.count,
        "numbers": base64.b64encode(flat.half().numpy().tobytes()).decode("ascii"),
    }


def _cloud(parts: Sequence[Tensor]) -> Cloud:
    centres, shares, factors, rest = parts
    return Cloud(centres.view(-1, len(rest)), shares, factors.view(-1, len(rest)), rest)


def _problem(prototype: Prototype) -> str:
    """Return what numbers of a stranger's prototype cannot be; empty where all is well."""
    clouds = (prototype.own, prototype.background)
    numbers = [t for c in clouds for t in (c.centres, c.shares, c.factors, c.rest)]
    ranks = (prototype.ratios, prototype.densities)
    if not all(bool(t.isfinite().all()) for t in (*numbers, *ranks)):
        return "not all are finite"
    if any(bool((c.rest < 0).any()) for c in clouds):
        return "a variance is negative"
    if any(bool((c.shares <= 0).any()) or float(c.shares.sum()) > 1.01 for c in clouds):
        return "shares of centres must be above 0 and sum to 1"
    if any(bool((t.diff() < 0).any()) for t in ranks):
        return "quantiles do not ascend"
    return ""
