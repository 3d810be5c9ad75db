"""Signatures of adapters: Ed25519 (RFC 8032) over the hashes of the files."""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub_chat.errors import AdapterError, UsageError

SIGNATURE_FILE = "adapterhub.sig.json"
"""In the folder of the files that it signs."""
SIGNATURE_PREFIX = "ed25519:"


class Signature(BaseModel):
    """The content of `adapterhub.sig.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(max_length=100, description="The signer's public key.")
    signature: str = Field(max_length=200, description="Base64 of the signature.")
    files: dict[str, str] = Field(max_length=10, description="sha256 of each file that is signed.")


def make_key(path: Path) -> str:
    """Write a new private key to `path`, which must not exist; return the public key."""
    key = _ed25519().Ed25519PrivateKey.generate()
    serialization = _serialization()
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: no key is written there: {error.strerror}") from error
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return _public(key)


def sign(path: Path, hashes: Mapping[str, str]) -> bytes:
    """Return the signature file for files with these sha256, by the private key in `path`."""
    try:
        key = _serialization().load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path} holds no private key; make one: adapterhub-chat keygen"
        ) from error
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise UsageError(
            f"{path} holds a key of another kind than Ed25519; adapterhub-chat keygen makes one"
        )
    signature = Signature(
        key=_public(key),
        signature=base64.b64encode(key.sign(_message(hashes))).decode(),
        files=dict(hashes),
    )
    return (signature.model_dump_json(indent=2) + "\n").encode()


def signer_of(data: bytes, hashes: Mapping[str, str]) -> str:
    """Return the public key that signed files with these sha256; raise AdapterError when it is invalid."""
    try:
        signature = Signature.model_validate_json(data)
    except ValidationError as error:
        raise AdapterError(
            f"{SIGNATURE_FILE} is no signature: {error.error_count()} of its fields do not fit"
        ) from error
    mismatched = sorted(
        {*hashes, *signature.files} - {n for n, h in hashes.items() if signature.files.get(n) == h}
    )
    if mismatched:
        raise AdapterError(
            f"{SIGNATURE_FILE} signs other content than that of {', '.join(map(repr, mismatched))}"
        )
    public = _ed25519().Ed25519PublicKey.from_public_bytes(key_bytes(signature.key))
    try:
        public.verify(base64.b64decode(signature.signature, validate=True), _message(hashes))
    except (ValueError, _import("cryptography.exceptions").InvalidSignature) as error:
        raise AdapterError(
            f"{SIGNATURE_FILE} is not the signature of the key that it names"
        ) from error
    return signature.key


def key_bytes(key: str) -> bytes:
    """Return the 32 bytes of a public key; raise AdapterError when it is malformed."""
    try:
        data = base64.b64decode(key.removeprefix(SIGNATURE_PREFIX), validate=True)
    except ValueError:  # binascii's, too
        data = b""
    if (
        len(data) != 32 or key != SIGNATURE_PREFIX + base64.b64encode(data).decode()
    ):  # one way to write it
        raise AdapterError(
            f"{key!r:.120} is no public key: it is {SIGNATURE_PREFIX} and 44 characters, as "
            "adapterhub-chat keygen prints"
        )
    return data


def _public(key: Any) -> str:
    return SIGNATURE_PREFIX + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def _message(hashes: Mapping[str, str]) -> bytes:
    """Return the signed bytes: the hashes in canonical JSON."""
    return b"adapterhub-chat 1 " + json.dumps(dict(hashes), sort_keys=True).encode()


def _ed25519() -> Any:
    return _import("cryptography.hazmat.primitives.asymmetric.ed25519")


def _serialization() -> Any:
    return _import("cryptography.hazmat.primitives.serialization")


def _import(name: str) -> Any:
    """Import a part of an optional library."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "signatures need cryptography: pip install 'adapterhub-chat[sign]'"
        ) from error
