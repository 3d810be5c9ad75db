"""Backbone: a frozen model and its tokenizer, loaded through transformers and bitsandbytes.

A name is looked up in this order: local folder or `.gguf` file, packaged name (assets/catalogue.py), Hub id.
GGUF files are de-quantized once into a cached folder: transformers needs half a minute for what the
folder gives in half a second.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
import transformers
from torch import nn

from adapterhub_chat.data.chat_template import check_template, turn_end
from adapterhub_chat.data.encoding import ENCODER_TEMPLATE, classifies
from adapterhub_chat.errors import UsageError
from adapterhub_chat.model import attention
from adapterhub_chat.model.devices import explain_dtype, pick_device
from adapterhub_chat.model.encoders import Pooling, first_position, is_encoder, load_encoder
from adapterhub_chat.model.kv_shapes import KVShapes, kv_shapes_of
from adapterhub_chat.model.quantization import keep_gradients, stored_quantization
from adapterhub_chat.model.resolve import naming_known_backbones, no_progress_bars, resolve
from adapterhub_chat.model.rope import make_rows_independent
from adapterhub_chat.types import Fingerprint

Quantize = Literal["nf4", "int8"]


ARCHITECTURE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "layer_norm_eps",
    "rope_parameters", "tie_word_embeddings", "sliding_window", "n_embd", "n_layer", "n_head",
)  # fmt: skip
"""Settings that define the architecture; others may differ between transformers versions."""
PROBE_TEXT = "Hello, world! 12,345 naïve cafés\n\t<tag> 你好\uff0c世界 ε→∞ 🙂 don't"

LIBRARIES = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
"""Versions of the libraries that compute a forward."""


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
    """How an encoder pools hidden states into features; None: a causal language model."""
    kv_shapes: KVShapes | None = None
    """The shapes of each layer's keys and values; None if layers carry something else as well."""
    length_matters: bool = False
    """Whether its rotary frequencies depend on the length of a row."""
    dtype_reason: str = ""
    """Why it has this dtype, in a few words; empty if nothing was measured."""

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder: its adapters classify with a head, and it generates no text."""
        return self.pooling is not None

    @property
    def width(self) -> int | None:
        """Width of an encoder's features; None for a language model."""
        return int(self.model.config.hidden_size) if self.encodes else None

    @property
    def max_length(self) -> int | None:
        """Number of tokens that an encoder can read at once; None for a language model."""
        if not self.encodes:
            return None
        config = self.model.config
        return int(config.max_position_embeddings) - first_position(config)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, the template's and the model's own."""
        generation = getattr(self.model, "generation_config", None)
        ends = [self.tokenizer.eos_token_id, turn_end(self.tokenizer)]
        for config in (self.text_config, generation):
            value = getattr(config, "eos_token_id", None)
            ends += value if isinstance(value, list) else [value]
        return frozenset(int(end) for end in ends if end is not None)

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, also where it is a part of a larger model."""
        return self.model.config.get_text_config()

    @property
    def asks_for_masks(self) -> bool:
        """Whether its layers' masks are made by model/masks.py, for whatever pattern each layer has."""
        return _asks_for_masks(self.model)

    @property
    def packs(self) -> bool:
        """Whether a row may hold several examples, and a prompt be computed in parts.

        Not if a layer carries a state through a row, nor if frequencies depend on a row's length.
        """
        return self.encodes or not (self.length_matters or self.kv_shapes is None)

    @property
    def precision(self) -> str:
        """Precision of the linear layers: `nf4`, `int8`, `bfloat16`, ..."""
        return self.quantize or str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, quantized ones as they are packed."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder or encoder layers, as transformers marks them for gradient checkpointing."""
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        return [module for module in self.model.modules() if isinstance(module, kind)]

    @property
    def cache_argument(self) -> str:
        """Name of `forward`'s argument for a key-value cache; it changed in transformers 5.24."""
        return _cache_argument(self.model)


def _asks_for_masks(model: Any) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == attention.NAME)


def _cache_argument(model: Any) -> str:
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _kv_shapes(name: str, model: Any, quantize: Quantize | None) -> KVShapes | None:
    """Return what the layers cache; raise UsageError if the model cannot be run."""
    if not _asks_for_masks(model):
        return None
    try:
        return kv_shapes_of(model, _cache_argument(model))
    except RuntimeError as error:
        how = f" with quantize={quantize!r}; choose another" if quantize else ""
        raise UsageError(f"{name}: {type(model).__name__} cannot be run{how} ({error})") from error


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: Quantize | None = None,
) -> Backbone:
    """Load, freeze and fingerprint a backbone.

    `dtype` None takes bf16 on a GPU that has it, fp32 on a CPU without bf16 instructions, and on one with
    them the faster of the two by a short measurement (`choose_dtype`); `quantize` keeps the linear layers
    in 4-bit NF4 or int8 through bitsandbytes. Raises UsageError for invalid options and UnknownNameError
    for a backbone that is not found.
    """
    if quantize is not None and quantize not in get_args(Quantize):
        raise UsageError(f"quantize={quantize!r}: allowed are None, 'nf4' and 'int8'")
    target = pick_device(device)
    choice = explain_dtype(dtype, target)
    folder = resolve(name, choice.dtype)
    options: dict[str, Any] = {"dtype": choice.dtype}
    with no_progress_bars(), naming_known_backbones(name):
        stored = stored_quantization(name, transformers.AutoConfig.from_pretrained(folder))
        if stored and quantize not in (None, stored):
            raise UsageError(
                f"{name} is packed in {stored} already; leave out quantize={quantize!r}"
            )
        quantize = cast(Quantize | None, stored or quantize)
        if quantize is not None:
            options["device_map"] = {"": target}
        if quantize is not None and not stored:
            options["quantization_config"] = _quantization_config(quantize, choice.dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        check_template(tokenizer)
        pooling: Pooling | None = None
        if is_encoder(folder):
            model, pooling = load_encoder(folder, options)
            if not classifies(tokenizer):
                tokenizer.chat_template = ENCODER_TEMPLATE
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if quantize is None:
        model.to(target)
    else:
        keep_gradients(model)
    if getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(attention.NAME)
    model.requires_grad_(False).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fingerprint = fingerprint_of(model, tokenizer, quantize, choice.dtype, pooling)
    return Backbone(
        name,
        model,
        tokenizer,
        choice.dtype,
        target,
        quantize,
        fingerprint,
        pooling,
        _kv_shapes(name, model, quantize) if pooling is None else None,
        make_rows_independent(model),
        choice.reason,
    )


def _quantization_config(quantize: Quantize, dtype: torch.dtype) -> Any:
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
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
    """Return the hashes of architecture, tokenizer, template and sampled weights, and the precision."""
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
