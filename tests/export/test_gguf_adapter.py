"""Adapters as GGUF: the names and numbers that llama.cpp reads, against a reference written out by hand."""

import gguf
import pytest
import torch

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.export.gguf_adapter import interleaved, write_gguf
from adapterhub_chat.lora.weights import AdapterWeights

HEADS, KV_HEADS, WIDTH = 4, 2, 8
"""The pico model's."""


@pytest.fixture
def config(backbone):
    return backbone.model.config.to_dict()


@pytest.fixture
def read(tmp_path, config):
    """read(weights, **changed) -> (fields, tensors) of the file that is written."""

    def written(weights, **changed):
        path = tmp_path / "adapter.gguf"
        write_gguf(path, weights, config | changed)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {t.name: torch.tensor(t.data) for t in reader.tensors}

    return written


def interleaved_by_loop(b, heads):
    """Row 2j + half of a head is the row that stood at half * (width / 2) + j."""
    out = torch.empty_like(b)
    for head in range(heads):
        for half in range(2):
            for j in range(WIDTH // 2):
                old = head * WIDTH + half * (WIDTH // 2) + j
                out[head * WIDTH + 2 * j + half] = b[old]
    return out


def test_every_factor_has_llama_cpps_name(read, make_weights, model):
    fields, tensors = read(make_weights(rank=4, alpha=8.0))
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    layers = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert tensors.keys() == {
        f"blk.{n}.{layer}.weight.lora_{factor}"
        for n in range(2)
        for layer in layers
        for factor in "ab"
    }
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_only_rows_of_q_and_k_are_interleaved(read, make_weights):
    weights = make_weights(rank=4, alpha=8.0)
    _, tensors = read(weights)
    block = "model.layers.1"
    for module, name, reordered in (
        ("self_attn.q_proj", "attn_q", lambda b: interleaved_by_loop(b, HEADS)),
        ("self_attn.k_proj", "attn_k", lambda b: interleaved_by_loop(b, KV_HEADS)),
        ("self_attn.v_proj", "attn_v", lambda b: b),
        ("mlp.down_proj", "ffn_down", lambda b: b),
    ):
        a, b = weights.factors[f"{block}.{module}"]
        assert tensors[f"blk.1.{name}.weight.lora_a"].equal(a.half())
        assert tensors[f"blk.1.{name}.weight.lora_b"].equal(reordered(b).half())


def test_the_order_of_interleaved_rows():
    rows = torch.arange(12.0)[:, None]
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_rows_of_other_architectures_are_not_interleaved(read, make_weights):
    weights = make_weights(rank=4, alpha=8.0)
    _, tensors = read(weights, model_type="qwen2")
    b = weights.factors["model.layers.0.self_attn.q_proj"][1]
    assert tensors["blk.0.attn_q.weight.lora_b"].equal(b.half())


@pytest.mark.parametrize("rslora", [False, True])
def test_differing_scales_are_multiplied_into_b(read, make_weights, rslora):
    start = make_weights(rank=4, alpha=8.0, only=("v_proj", "o_proj"), rslora=rslora)
    alphas = dict(start.alphas) | {"model.layers.0.self_attn.v_proj": 3.0}
    weights = AdapterWeights(start.factors, alphas, rslora)
    fields, tensors = read(weights)
    for module, name in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        full = f"model.layers.0.self_attn.{module}"
        a, b = weights.factors[full]
        read_a = tensors[f"blk.0.{name}.weight.lora_a"].float()
        read_b = tensors[f"blk.0.{name}.weight.lora_b"].float()
        theirs = fields["adapter.lora.alpha"] / read_a.shape[0] * (read_b @ read_a)
        torch.testing.assert_close(theirs, weights.scale(full) * (b @ a), rtol=2e-3, atol=2e-3)


def test_unsupported_architectures_and_layers_are_refused(read, make_weights):
    weights = make_weights()
    with pytest.raises(AdapterError, match="no architecture 'unheard-of'"):
        read(weights, model_type="unheard-of")
    odd = AdapterWeights({"model.odd": (torch.ones(1, 2), torch.ones(2, 1))}, {"model.odd": 1.0})
    with pytest.raises(AdapterError, match=r"no name for the layer 'model\.odd'"):
        read(odd)
