"""Resolves a backbone's name (folder, packaged name, GGUF file or Hub id) for `from_pretrained`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.assets.fetch import backbone_path, cache_dir
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.files import new_folder
from adapterhub_chat.model import e5s1

log = logging.getLogger("adapterhub_chat")


def resolve(name: str, dtype: torch.dtype) -> str:
    """Return the folder or Hub id to load; packed files are unpacked in `dtype`.

    Raises UnknownNameError for a file or folder that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownNameError("backbone", name, _packaged(), "There is no such .gguf file.")
        return str(_dequantized(path, dtype))
    if name in _packaged():
        packaged = backbone_path(name)
        return str(packaged if packaged.is_dir() else _dequantized(packaged, dtype))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UnknownNameError("backbone", name, _packaged(), "There is no such folder.")
    return name


def _packaged() -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.kind == "backbone"]


def _dequantized(file: Path, dtype: torch.dtype) -> Path:
    """Return the cached folder with a packed file's weights in `dtype`; made at the first call."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    dtype_name = str(dtype).removeprefix("torch.")
    target = cache_dir() / "dequantized" / f"{file.stem}-{dtype_name}-{key[:8]}"
    if target.is_dir():
        return target
    log.info("unpacking %s to %s (once, about half a minute)", file.name, dtype_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_folder(target, exist_ok=True) as scratch,
        no_progress_bars(),
        naming_known_backbones(str(file)),
    ):
        unpack = _unpack_gguf if file.suffix == ".gguf" else e5s1.unpack
        unpack(file, scratch, dtype)
    return target


def _unpack_gguf(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars while a backbone loads."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def naming_known_backbones(name: str) -> Iterator[None]:
    """Turn a failed load into an UnknownNameError that lists the packaged backbones."""
    try:
        yield
    except UsageError:  # found, and it cannot be used here
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = f"It is neither a packaged name nor a folder nor a model on the Hub ({reason})"
        raise UnknownNameError("backbone", name, _packaged(), cure) from error
