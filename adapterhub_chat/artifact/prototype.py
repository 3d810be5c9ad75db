"""What a manifest keeps of the messages that an adapter is for: its prototype, as text."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Numbers = npt.NDArray[np.float64]


class MixtureNumbers(NamedTuple):
    """Gaussians with one covariance: K centres of W numbers, and R factors."""

    centres: Numbers
    """(K, W)"""
    shares: Numbers
    """(K,)"""
    factors: Numbers
    """(R, W)"""
    rest: Numbers
    """(W,)"""


class PrototypeNumbers(NamedTuple):
    """All numbers of a prototype, each in its shape."""

    own: MixtureNumbers
    background: MixtureNumbers
    ratios: Numbers
    """(Q,)"""
    densities: Numbers
    """(Q,)"""


MAX_TEXT = 800_000
"""Longest text of numbers: a manifest has at most 1 MB."""
HALF_BYTES = 2
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
        if found != (wanted := -(-HALF_BYTES * sum(sizes) // 3) * 4):
            raise ValueError(f"numbers: {found} characters, not {wanted}, as the sizes say")
        if problem := _problem(self.decoded()):
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

    def decoded(self) -> PrototypeNumbers:
        """Return the numbers; raise ValueError where they are no base64."""
        try:
            raw = base64.b64decode(self.numbers, validate=True)
        except binascii.Error as error:
            raise ValueError(f"numbers: {error}") from error
        sizes = self._sizes()
        if len(raw) != HALF_BYTES * sum(sizes):
            raise ValueError(f"numbers: {len(raw)} bytes, not {HALF_BYTES * sum(sizes)}")
        with np.errstate(invalid="ignore"):  # a signalling NaN, which `_problem` names
            flat = np.frombuffer(raw, "<f2").astype(np.float64)
        parts = np.split(flat, [*accumulate(sizes)][:-1])
        return PrototypeNumbers(_cloud(parts[:4]), _cloud(parts[4:8]), parts[8], parts[9])


class TokenPrototype(StoredPrototype):
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
    glance: TokenPrototype | None = Field(
        default=None, description="The same for plain messages; None: all are looked at."
    )


def _cloud(parts: Sequence[Numbers]) -> MixtureNumbers:
    centres, shares, factors, rest = parts
    width = len(rest)
    return MixtureNumbers(centres.reshape(-1, width), shares, factors.reshape(-1, width), rest)


def _problem(prototype: PrototypeNumbers) -> str:
    """Return what numbers of a stranger's prototype cannot be; empty where all is well."""
    clouds = (prototype.own, prototype.background)
    ranks = (prototype.ratios, prototype.densities)
    if not all(np.isfinite(part).all() for part in (*clouds[0], *clouds[1], *ranks)):
        return "not all are finite"
    if any((c.rest < 0).any() for c in clouds):
        return "a variance is negative"
    if any((c.shares <= 0).any() or c.shares.sum() > 1.01 for c in clouds):
        return "shares of centres must be above 0 and sum to 1"
    if any((np.diff(part) < 0).any() for part in ranks):
        return "quantiles do not ascend"
    return ""
