"""Signed upload URLs, each valid for one operation on one object until it expires."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from .errors import HubError


@dataclass(frozen=True)
class Permit:
    """To PUT an object or a part of it (part 0: the whole), or to POST that its parts are joined."""

    method: str
    repo: int
    sha256: str
    size: int
    part: int = 0

    @property
    def path(self) -> str:
        return f"/lfs/{self.repo}/{self.sha256}/{self.size}/{self.part}"


class Signer:
    """Makes and checks upload URLs, with a key of its own."""

    def __init__(self, seconds: float) -> None:
        self._key, self._seconds = secrets.token_bytes(32), seconds

    def _signature(self, permit: Permit, expires: str) -> str:
        text = f"{permit.method} {permit.path}?{expires}"
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def path(self, permit: Permit) -> str:
        expires = str(time.time() + self._seconds)
        return f"{permit.path}?expires={expires}&signature={self._signature(permit, expires)}"

    def check(self, permit: Permit, expires: str, signature: str) -> None:
        true = self._signature(permit, expires).encode()
        if not hmac.compare_digest(signature.encode(), true):
            raise HubError(403, "The signature of this URL is wrong.")
        if float(expires) < time.time():
            raise HubError(403, "This URL has expired.")
