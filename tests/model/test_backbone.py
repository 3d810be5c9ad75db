"""Backbones: names, precision, quantization, fingerprints, and that they are frozen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from pico import VOCABULARY, pico_model, toy_task

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.devices import pick_device, pick_dtype
from adapterhub_chat.training.job import make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import as_mix

IDS = torch.tensor([[5, 9, 60, 31, 7, 120]])


def test_a_folder_loads_as_transformers_loads_it(backbone, pico_folder):
    plain = transformers.AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    assert type(backbone.model) is type(plain)
    with torch.no_grad():
        assert torch.equal(backbone.model(IDS).logits, plain(IDS).logits)
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_hooks_change_no_modules(model, pico_folder):
    plain = transformers.AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    hooked = model.backbone.model
    assert [n for n, _ in hooked.named_modules()] == [n for n, _ in plain.named_modules()]
    assert hooked.state_dict().keys() == plain.state_dict().keys()


def test_dtype_and_device_have_defaults_and_can_be_given(pico_folder):
    assert load_backbone(str(pico_folder), dtype="bf16", device="cpu").dtype is torch.bfloat16
    assert pick_dtype(None, torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert pick_dtype(torch.float16, torch.device("cpu")) is torch.float16
    with pytest.raises(UsageError, match="allowed are float32"):
        pick_dtype("int3", torch.device("cpu"))
    with pytest.raises(UsageError, match="cannot be used here"):
        pick_device("warp:3")
    with pytest.raises(UsageError, match="'nf4' and 'int8'"):
        load_backbone(str(pico_folder), quantize="int2")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "missing.gguf", "a/b/c"])
def test_an_unknown_backbone_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        load_backbone(name)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown backbone"):
        load_backbone(str(tmp_path))


def test_a_gguf_is_unpacked_once(tmp_path, monkeypatch, pico_folder):
    """A real GGUF file of a small Llama, written with the gguf package."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    _write_gguf(gguf, path)
    first = load_backbone(str(path), dtype="fp32", device="cpu")
    folders = list((tmp_path / "cache" / "dequantized").iterdir())
    assert len(folders) == 1
    assert not folders[0].name.startswith(".tmp")
    stamp = folders[0].stat().st_mtime_ns
    second = load_backbone(str(path), dtype="fp32", device="cpu")
    assert folders[0].stat().st_mtime_ns == stamp
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        one, two = (b.model(IDS % 40).logits for b in (first, second))
    assert torch.equal(one, two)
    transformers.AutoModelForCausalLM.from_pretrained(folders[0])


def _write_gguf(gguf, path, width=32, layers=1, vocabulary=64):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    words = ["t", "1", "t1", *(f"w{i}" for i in range(vocabulary - 6)), "<s>", "</s>", "<u>"]
    writer.add_token_list(words)
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(vocabulary - 3)
    writer.add_eos_token_id(vocabulary - 2)
    rng = np.random.default_rng(0)

    def put(name, *shape):
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))

    put("token_embd.weight", vocabulary, width)
    put("output_norm.weight", width)
    put("output.weight", vocabulary, width)
    for i in range(layers):
        for name, shape in {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width),
            "attn_k": (width // 2, width), "attn_v": (width // 2, width),
            "attn_output": (width, width), "ffn_gate": (48, width), "ffn_up": (48, width),
            "ffn_down": (width, 48),
        }.items():  # fmt: skip
            put(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_fingerprints_differ_between_models_not_between_precisions(pico_folder, other_folder):
    exact = load_backbone(str(pico_folder), dtype="fp32", device="cpu").fingerprint
    rounded = load_backbone(str(pico_folder), dtype="bf16", device="cpu").fingerprint
    other = load_backbone(str(other_folder), dtype="fp32", device="cpu").fingerprint
    assert exact != rounded
    assert exact.differences(rounded) == ()
    assert exact.differences(other) == ("weights",)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_backbone_runs_adapters(pico_folder, make_weights, quantize):
    pytest.importorskip("bitsandbytes")
    quantized = load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize=quantize)
    model = AdapterModel(quantized)
    plain = load_backbone(str(pico_folder), dtype="fp32", device="cpu").fingerprint
    assert plain.differences(quantized.fingerprint) == ()
    with torch.no_grad():
        before = quantized.model(IDS).logits
    model.load("a", make_weights())
    with torch.no_grad(), model.mixing([as_mix("a")]):
        changed = quantized.model(IDS).logits
    with torch.no_grad(), model.mixing([as_mix(None)]):
        zero = quantized.model(IDS).logits
    assert torch.equal(zero, before)
    assert (changed - before).abs().max() > 0.1


def test_4bit_gradients_survive_an_evaluation(pico_folder, make_weights):
    """bitsandbytes repacks its weights in the first eval forward on some CPUs and then loses gradients."""
    pytest.importorskip("bitsandbytes")
    model = AdapterModel(
        load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize="nf4")
    )
    modules = list(model.shapes)
    bank = model.new_bank(modules, slots=1, rank=8, dtype=torch.float32, trainable=True)
    bank.write(0, make_weights())

    def gradients():
        bank.zero_gradients()
        with activate(Plan(bank.places, torch.ones(1, 1))):
            model.backbone.model(IDS).logits.square().mean().backward()
        return torch.cat([t.grad.flatten() for t in (*bank.A.values(), *bank.B.values())])

    before = gradients()
    with torch.no_grad():
        model.backbone.model(IDS)
    torch.testing.assert_close(gradients(), before)


def test_training_on_4bit_learns_and_changes_no_weight(pico_folder):
    pytest.importorskip("bitsandbytes")
    model = AdapterModel(
        load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize="nf4")
    )
    before = {n: t.clone() for n, t in model.backbone.model.state_dict().items()}
    config = TrainConfig(row_length=64, rows_per_step=1, max_steps=20, epochs=9, learning_rate=1e-2)
    losses = []
    train(
        model,
        [make_job(model.backbone.tokenizer, "toy", toy_task(), config)],
        on_event=lambda e: losses.append(e.values["loss"]) if e.kind == "step" else None,
    )
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = model.backbone.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_vocabulary_has_the_size_of_the_fixture(backbone):
    assert backbone.model.config.vocab_size == VOCABULARY


def dequantized_copy(quantized):
    """The same network in plain linear layers with the dequantized weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    copy = pico_model()
    copy.requires_grad_(False)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            copy.get_submodule(name).weight.data = weight.float().view(
                copy.get_submodule(name).weight.shape
            )
    return copy


def test_4bit_gradients_are_those_of_the_dense_model_before_and_after_an_evaluation(
    pico_folder, make_weights
):
    quantized = load_backbone(str(pico_folder), dtype="fp32", device="cpu", quantize="nf4")
    model = AdapterModel(quantized)
    dense = AdapterModel(replace(quantized, model=dequantized_copy(quantized.model), quantize=None))

    def gradient(of):
        bank = of.new_bank(list(of.shapes), slots=1, rank=8, dtype=torch.float32, trainable=True)
        bank.write(0, make_weights())
        with activate(Plan(bank.places, torch.ones(1, 1))):
            of.backbone.model(IDS).logits.square().mean().backward()
        return bank.gradient(0, 1.0, bank.scratch)

    wanted = gradient(dense)
    for _ in range(2):
        cosine = torch.nn.functional.cosine_similarity(gradient(model), wanted, dim=0)
        assert cosine > 0.9999
        ratio = gradient(model).norm() / wanted.norm()
        assert abs(float(ratio) - 1) < 1e-3
        with torch.no_grad():
            model.backbone.model(IDS)
