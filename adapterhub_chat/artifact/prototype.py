"""Prototype of an adapter's messages: Gaussian mixtures, stored as base64 text in the manifest."""

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
    """A Gaussian mixture with a shared covariance: K centres of width W, R covariance factors."""

    centres: Numbers
    """(K, W)"""
    shares: Numbers
    """(K,)"""
    factors: Numbers
    """(R, W)"""
    variances: Numbers
    """(W,)"""


class PrototypeNumbers(NamedTuple):
    """The arrays of a prototype."""

    own: MixtureNumbers
    background: MixtureNumbers
    ratios: Numbers
    """(Q,)"""
    densities: Numbers
    """(Q,)"""


MAX_NUMBERS_TEXT = 800_000
"""Maximal length of the encoded numbers, in characters: a manifest has at most 1 MB."""
FLOAT16_BYTES = 2
"""Bytes of a float16."""

Size = Annotated[int, Field(ge=1, le=4096)]


class StoredPrototype(BaseModel):
    """The sizes and the encoded numbers of a prototype."""

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
        max_length=MAX_NUMBERS_TEXT,
        description="base64 of little-endian float16: own centres, shares, factors, rest; the same of the "
        "background, with one centre; quantiles of ratios and densities.",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> StoredPrototype:
        if self._background_width > self.width:
            raise ValueError(
                f"background_width is {self._background_width}, width only {self.width}"
            )
        sizes, length = self._sizes(), len(self.numbers)
        if length != (expected := -(-FLOAT16_BYTES * sum(sizes) // 3) * 4):
            raise ValueError(f"numbers: {length} characters, not {expected}, as the sizes say")
        if problem := _problem(self.decoded()):
            raise ValueError(f"numbers: {problem}")
        return self

    def _sizes(self) -> tuple[int, ...]:
        width, centres, background_width = self.width, self.centres, self._background_width
        own_sizes = (centres * width, centres, self.rank * width, width)
        background_sizes = (
            background_width,
            1,
            self.background_rank * background_width,
            background_width,
        )
        return (*own_sizes, *background_sizes, self.quantiles, self.quantiles)

    @property
    def _background_width(self) -> int:
        return self.background_width or self.width

    def decoded(self) -> PrototypeNumbers:
        """Return the decoded arrays; raise ValueError for invalid base64."""
        try:
            raw = base64.b64decode(self.numbers, validate=True)
        except binascii.Error as error:
            raise ValueError(f"numbers: {error}") from error
        sizes = self._sizes()
        if len(raw) != FLOAT16_BYTES * sum(sizes):
            raise ValueError(f"numbers: {len(raw)} bytes, not {FLOAT16_BYTES * sum(sizes)}")
        with np.errstate(invalid="ignore"):  # a signalling NaN, which `_problem` names
            flat = np.frombuffer(raw, "<f2").astype(np.float64)
        parts = np.split(flat, [*accumulate(sizes)][:-1])
        return PrototypeNumbers(_mixture(parts[:4]), _mixture(parts[4:8]), parts[8], parts[9])


class TokenPrototype(StoredPrototype):
    """Prototype of cheap features, computed from token embeddings only."""

    features: Literal["token-mean-1"] = Field(
        default="token-mean-1", description="How a message becomes a vector without any block."
    )


class Routing(StoredPrototype):
    """Prototypes for the backbone of the manifest's fingerprint, valid for any precision."""

    features: Literal["early-mean-1", "early-mean-2"] = Field(
        default="early-mean-2",
        description="How a message becomes a vector; the first, without words, is used no more.",
    )
    glance: TokenPrototype | None = Field(
        default=None, description="The same for plain messages; None: all are looked at."
    )


def _mixture(parts: Sequence[Numbers]) -> MixtureNumbers:
    centres, shares, factors, variances = parts
    width = len(variances)
    return MixtureNumbers(centres.reshape(-1, width), shares, factors.reshape(-1, width), variances)


def _problem(prototype: PrototypeNumbers) -> str:
    """Return what is invalid in a prototype's numbers, or an empty string."""
    mixtures = (prototype.own, prototype.background)
    quantiles = (prototype.ratios, prototype.densities)
    if not all(np.isfinite(values).all() for values in (*mixtures[0], *mixtures[1], *quantiles)):
        return "not all are finite"
    if any((mixture.variances < 0).any() for mixture in mixtures):
        return "a variance is negative"
    if any((mixture.shares <= 0).any() or mixture.shares.sum() > 1.01 for mixture in mixtures):
        return "shares of centres must be above 0 and sum to 1"
    if any((np.diff(values) < 0).any() for values in quantiles):
        return "quantiles do not ascend"
    return ""
