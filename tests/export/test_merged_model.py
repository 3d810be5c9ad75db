"""Export: a merged model is plain transformers' and answers as the adapter does."""

import json
import shutil

import pytest
import torch
from pico import VOCABULARY
from pico import keep_adapter as keep
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from typer.testing import CliRunner

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.app import app
from adapterhub_chat.errors import AdapterError, PoolError, UsageError
from adapterhub_chat.lora.weights import initial_weights

PROMPTS = ["good film", "the quick brown fox", "a"]


def opened(folder, tmp_path, **options):
    return AdapterHub(str(folder), tmp_path / "pool", device="cpu", **options)


@pytest.fixture
def hub(pico_folder, tmp_path, make_weights):
    made = opened(pico_folder, tmp_path, dtype="fp32")
    keep(made, make_weights(seed=1))
    keep(made, make_weights(seed=2), "other")
    return made


def plain_logits(folder, prompts=PROMPTS):
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    with torch.inference_mode():
        each = [model(**tokenizer(p, return_tensors="pt")).logits[0, -1] for p in prompts]
    return torch.stack(each).float()


@pytest.mark.parametrize("choice", ["toy", {"toy": 0.5, "other": 0.75}])
def test_plain_transformers_gives_the_logits_of_the_mix(hub, tmp_path, choice):
    done = hub.export(choice, tmp_path / "merged")
    wanted = hub.next_token_logits(PROMPTS, [choice] * len(PROMPTS))
    assert done.form == "merged"
    assert done.drift["merged"] < 1e-9
    torch.testing.assert_close(plain_logits(done.path), wanted, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(wanted, hub.next_token_logits(PROMPTS, [None] * 3), atol=1e-2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def test_the_backbone_is_not_changed(hub, tmp_path):
    before = {n: t.clone() for n, t in hub.backbone.model.state_dict().items()}
    hub.export("toy", tmp_path / "merged")
    after = hub.backbone.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_bf16_rounds_once(pico_folder, tmp_path, make_weights):
    hub = opened(pico_folder, tmp_path, dtype="bf16")
    keep(hub, make_weights(seed=1))
    done = hub.export("toy", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(done.path)
    assert model.dtype == torch.bfloat16
    weights = hub.model.weights("toy")
    for module, (a, b) in weights.factors.items():
        own = hub.backbone.model.get_submodule(module).weight.float()
        merged = (own + b.float() @ a.float() * weights.scale(module)).bfloat16()
        assert torch.equal(model.get_submodule(module).weight, merged)


def test_a_merged_model_can_be_used_as_a_backbone(hub, tmp_path):
    done = hub.export("toy", tmp_path / "merged")
    again = AdapterHub(str(done.path), tmp_path / "elsewhere", dtype="fp32", device="cpu")
    wanted = hub.generate(PROMPTS, ["toy"] * 3, max_new_tokens=8, ignore_eos=True)
    assert again.generate(PROMPTS, max_new_tokens=8, ignore_eos=True) == wanted


def test_transposed_layers_are_merged(hub, tmp_path):
    """GPT-2's Conv1D is (in, out); a square one would take a wrong update without a word."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=2, **shape)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    hub.backbone.tokenizer.save_pretrained(tmp_path / "gpt2")
    gpt2 = opened(tmp_path / "gpt2", tmp_path, dtype="fp32")
    start = initial_weights(gpt2.model.shapes, rank=4, alpha=8.0, seed=1)
    keep(
        gpt2,
        start.with_factors(
            {m: (a, torch.randn(b.shape) * 0.1) for m, (a, b) in start.factors.items()}
        ),
        "own",
    )
    done = gpt2.export("own", tmp_path / "merged")
    wanted = gpt2.next_token_logits(PROMPTS, ["own"] * 3)
    assert done.drift["merged"] < 1e-9
    torch.testing.assert_close(plain_logits(done.path), wanted, atol=2e-5, rtol=1e-5)


def test_the_generation_config_is_exported(pico_folder, tmp_path, make_weights):
    shutil.copytree(pico_folder, tmp_path / "backbone")
    own = GenerationConfig.from_pretrained(tmp_path / "backbone")
    own.update(eos_token_id=[2, 5], repetition_penalty=1.25)
    own.save_pretrained(tmp_path / "backbone")
    hub = opened(tmp_path / "backbone", tmp_path, dtype="fp32")
    keep(hub, make_weights())
    done = hub.export("toy", tmp_path / "merged")
    again = GenerationConfig.from_pretrained(done.path)
    assert (again.eos_token_id, again.repetition_penalty) == ([2, 5], 1.25)
    hub.backbone.model.generation_config.update(do_sample=False, temperature=0.5)
    assert hub.export("toy", tmp_path / "again").path.is_dir()  # transformers would not write that


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_on_a_quantized_backbone_each_form_is_measured(
    pico_folder, tmp_path, make_weights, quantize
):
    hub = opened(pico_folder, tmp_path, dtype="fp32", quantize=quantize)
    keep(hub, make_weights(seed=1))
    merged = hub.export("toy", tmp_path / "merged", form="merged")
    assert set(merged.drift) == {"merged", "requantized"}
    assert merged.drift["merged"] < merged.drift["requantized"]
    wanted = hub.next_token_logits(PROMPTS, ["toy"] * 3)
    near = {"nf4": 2e-4, "int8": 0.2}[quantize]  # int8 rounds what goes in as well
    torch.testing.assert_close(plain_logits(merged.path), wanted, atol=near, rtol=1e-3)
    with pytest.raises(AdapterError, match="keep it unmerged"):
        hub.export("toy", tmp_path / "none", most_drift=0.0)
    assert not (tmp_path / "none").exists()
    between = sum(merged.drift.values()) / 2
    assert hub.export("toy", tmp_path / "auto", most_drift=between).form == "merged"


def test_a_requantized_model_has_the_measured_drift(pico_folder, tmp_path, make_weights):
    hub = opened(pico_folder, tmp_path, dtype="fp32", quantize="nf4")
    keep(hub, make_weights(seed=1))
    done = hub.export("toy", tmp_path / "packed", form="requantized")
    config = json.loads((done.path / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    own = hub.next_token_logits(PROMPTS, ["toy"] * 3).log_softmax(-1)
    again = opened(done.path, tmp_path / "again", dtype="fp32")
    assert again.backbone.quantize == again.backbone.fingerprint.quantization == "nf4"
    with pytest.raises(UsageError, match="packed in nf4 already; leave out quantize='int8'"):
        opened(done.path, tmp_path / "again", quantize="int8")
    its = again.next_token_logits(PROMPTS).log_softmax(-1)
    drift = float((own.exp() * (own - its)).sum(-1).mean())
    assert 0.1 < drift / done.drift["requantized"] < 10
    packed, merged = (
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (done.path, hub.export("toy", tmp_path / "m", form="merged").path)
    )
    assert packed < merged


def test_all_misfits_of_an_export_are_reported_together(hub, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError) as error:
        hub.export(None, tmp_path / "there", form="int3")
    for words in ("'int3': allowed are auto, merged, requantized", "no adapter", "exists"):
        assert words in str(error.value)
    with pytest.raises(UsageError, match="not quantized"):
        hub.export("toy", tmp_path / "new", form="requantized")


def test_a_folder_that_cannot_be_written_is_an_error(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PoolError, match="cannot be written"):
        hub.export("toy", tmp_path / "file" / "merged")


def test_the_export_command(hub, pico_folder, tmp_path):
    command = ["export", "toy", str(tmp_path / "out"), "--json", "--device", "cpu"]
    command += ["--backbone", str(pico_folder), "--pool", str(hub.pool.root), "--dtype", "fp32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["form"] == "merged"
    assert (tmp_path / "out" / "config.json").is_file()
