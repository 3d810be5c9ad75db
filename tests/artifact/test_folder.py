"""PEFT's folder format, both ways against the real peft; and everything that must be refused."""

import contextlib
import json
import math
import shutil
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterhub_chat.artifact.folder import BufferPool, config_of, read_folder, write_weights
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.weights import AdapterWeights, PackedFactors
from adapterhub_chat.types import as_mix

IDS = torch.tensor([[5, 9, 60, 31, 7, 120], [8, 8, 99, 3, 200, 41]])
TOLERANCE = {"atol": 1e-4, "rtol": 0}
"""fp32, logits of size about 10 (so 1e-5 of them): the same numbers, multiplied in another order."""
EFFECT = 10 * TOLERANCE["atol"]
ONCE_PER_TEST = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def plain(folder):
    """The backbone by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@torch.no_grad()
def our_logits(model, name):
    with model.mixing([as_mix(name)] * len(IDS)):
        return model.backbone.model(IDS).logits


def write(folder, model, weights):
    """Write weights as the pool does, without a manifest."""
    folder.mkdir(exist_ok=True)
    config = config_of(weights, str(model.backbone.name), model.shapes)
    (folder / CONFIG).write_text(json.dumps(config))
    write_weights(folder / WEIGHTS, weights)
    return folder


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(hub):
    tensors = hub.backbone.model.state_dict()
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


@pytest.fixture
def refuses(hub):
    """refuses(folder, *words): loading raises AdapterError with all the words, and changes nothing."""

    def check(folder, *words):
        before = contents(hub.pool.root), contents(folder), state(hub), hub.model.names
        with pytest.raises(AdapterError) as refused:
            hub.load(folder)
        for word in words:
            assert word in str(refused.value)
        assert (contents(hub.pool.root), contents(folder), state(hub), hub.model.names) == before
        verdict = hub.verify(folder)
        assert not verdict.ok
        assert verdict.status == "refused"
        return str(refused.value)

    return check


@pytest.fixture
def folder(tmp_path, model, make_weights):
    return write(tmp_path / "adapter", model, make_weights(rank=4))


# ---- ours, read by peft --------------------------------------------------------------------------


def assert_peft_agrees(folder, model, weights, pico_folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(plain(pico_folder), folder)
    assert not [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    model.load("ours", weights)
    ours = our_logits(model, "ours")
    torch.testing.assert_close(ours, logits_of(theirs), **TOLERANCE)
    assert (ours - logits_of(model.backbone.model)).abs().max() > EFFECT


def joined(*parts):
    """One adapter out of several on different modules."""
    factors = {m: pair for part in parts for m, pair in part.factors.items()}
    alphas = {m: alpha for part in parts for m, alpha in part.alphas.items()}
    return AdapterWeights(factors, alphas, parts[0].rslora)


def in_layer(weights, layer):
    factors = {m: pair for m, pair in weights.factors.items() if f"layers.{layer}." in m}
    return AdapterWeights(factors, {m: weights.alphas[m] for m in factors}, weights.rslora)


SHAPES_OF_ADAPTERS = {
    "all modules": lambda make: make(rank=4),
    "two kinds of module": lambda make: make(rank=8, only=("q_proj", "down_proj")),
    "rsLoRA": lambda make: make(rank=6, rslora=True),
    "odd alpha": lambda make: make(rank=3, alpha=2.5),
    "one layer": lambda make: in_layer(make(rank=4), 1),
    "ranks and alphas by module": lambda make: joined(
        make(rank=2, only=("q_proj", "v_proj")),
        make(rank=8, alpha=3.0, only=("up_proj",)),
        in_layer(make(rank=5, alpha=20.0, only=("down_proj",)), 0),
    ),
    "ranks by layer": lambda make: joined(
        in_layer(make(rank=2, rslora=True), 0), in_layer(make(rank=7, alpha=1.0, rslora=True), 1)
    ),
}


@pytest.mark.parametrize("kind", SHAPES_OF_ADAPTERS)
def test_peft_reads_our_folder_and_agrees(kind, tmp_path, model, make_weights, pico_folder):
    weights = SHAPES_OF_ADAPTERS[kind](make_weights)
    written = write(tmp_path / "adapter", model, weights)
    assert_peft_agrees(written, model, weights, pico_folder)


@settings(max_examples=8, deadline=None, suppress_health_check=ONCE_PER_TEST)
@given(data=st.data())
def test_peft_agrees_on_any_choice_of_modules_ranks_and_alphas(
    data, tmp_path, model, make_weights, pico_folder
):
    modules = data.draw(st.lists(st.sampled_from(sorted(model.shapes)), min_size=1, unique=True))
    rslora = data.draw(st.booleans())
    parts = []
    for module in modules:
        rank, alpha = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1.0, 8.0, 12.5]))
        whole = make_weights(rank=rank, alpha=alpha, rslora=rslora)
        parts.append(AdapterWeights({module: whole.factors[module]}, {module: alpha}, rslora))
    weights = joined(*parts)
    assert_peft_agrees(write(tmp_path / "adapter", model, weights), model, weights, pico_folder)


def test_target_modules_select_exactly_the_adapters_modules(model, make_weights):
    some = make_weights(only=("q_proj", "v_proj"))
    assert config_of(some, "b", model.shapes)["target_modules"] == ["q_proj", "v_proj"]
    half = in_layer(some, 0)
    assert config_of(half, "b", model.shapes)["target_modules"] == sorted(half.factors)


def test_our_config_is_complete_for_peft(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.LoraConfig.from_pretrained(folder)
    assert config.r == 4
    assert config.task_type == "CAUSAL_LM"
    assert config.inference_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_weights_are_read_bit_for_bit(dtype, tmp_path, model, make_weights):
    weights = make_weights(rank=5, alpha=2.5, rslora=True).to(dtype)
    read, *_ = read_folder(write(tmp_path / "one", model, weights))
    assert read.rslora
    assert dict(read.alphas) == dict(weights.alphas)
    for module, (a, b) in weights.factors.items():
        assert torch.equal(read.factors[module][0], a)
        assert torch.equal(read.factors[module][1], b)
        assert read.factors[module][0].dtype == dtype
    write(tmp_path / "two", model, read)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert (tmp_path / "one" / CONFIG).read_bytes() == (tmp_path / "two" / CONFIG).read_bytes()


def test_factors_that_share_memory_or_are_views_can_be_written(tmp_path, model, make_weights):
    weights = make_weights(rank=4, only=("q_proj",))
    square = torch.randn(32, 32)
    views = dict.fromkeys(weights.factors, (square[:4], square.T[:, :4]))
    read, *_ = read_folder(write(tmp_path / "adapter", model, weights.with_factors(views)))
    for a, b in read.factors.values():
        assert torch.equal(a, square[:4])
        assert torch.equal(b, square.T[:, :4])


def test_weights_do_not_change_with_the_file(folder):
    read, *_ = read_folder(folder)
    kept = {m: a.clone() for m, (a, _) in read.factors.items()}
    with (folder / WEIGHTS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(torch.equal(a, kept[m]) for m, (a, _) in read.factors.items())


# ---- peft's, read here ---------------------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PEFT_KINDS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "rsLoRA": {"r": 6, "lora_alpha": 3, "target_modules": ["up_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj", "o_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"o_proj": 1, "model.layers.0.self_attn.q_proj": 30},
    },
    "patterns with rsLoRA": {
        "r": 3,
        "target_modules": ATTENTION,
        "rank_pattern": {"self_attn.k_proj": 6},
        "alpha_pattern": {"k_proj": 2.5},
        "use_rslora": True,
    },
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "left out": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "full name": {"r": 4, "target_modules": ["model.layers.1.mlp.up_proj"]},
    "dropout": {"r": 4, "target_modules": ATTENTION, "lora_dropout": 0.3},
    "gaussian": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "mica"},
}


def peft_saves(pico_folder, folder, config):
    """Save an adapter by peft with random factors; return its model."""
    torch.manual_seed(7)
    theirs = peft.get_peft_model(plain(pico_folder), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_we_read_pefts_folder_and_agree(kind, tmp_path, hub, pico_folder):
    theirs = peft_saves(pico_folder, tmp_path / "theirs", peft.LoraConfig(**PEFT_KINDS[kind]))
    with pytest.warns(UserWarning, match="unverified"):
        name = hub.load(tmp_path / "theirs")
    ours = our_logits(hub.model, name)
    torch.testing.assert_close(ours, logits_of(theirs), **TOLERANCE)
    assert (ours - logits_of(hub.backbone.model)).abs().max() > EFFECT


def test_pefts_own_random_start_agrees_too(tmp_path, hub, pico_folder):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain(pico_folder), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="unverified"):
        name = hub.load(tmp_path / "theirs")
    torch.testing.assert_close(our_logits(hub.model, name), logits_of(theirs), **TOLERANCE)


def test_of_a_regular_expression_the_modules_are_those_of_the_weights(tmp_path, hub, pico_folder):
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.0\..*_proj", init_lora_weights=False)
    theirs = peft_saves(pico_folder, tmp_path / "theirs", config)
    with pytest.warns(UserWarning, match="unverified"):
        name = hub.load(tmp_path / "theirs")
    torch.testing.assert_close(our_logits(hub.model, name), logits_of(theirs), **TOLERANCE)
    _, rebuilt, _ = read_folder(tmp_path / "theirs")
    held = {key.rsplit(".lora_")[0] for key in load_file(tmp_path / "theirs" / WEIGHTS)}
    assert {f"base_model.model.{m}" for m in rebuilt["target_modules"]} == held


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_start_is_plain_lora_again(tmp_path, hub, pico_folder):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(plain(pico_folder), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    wanted = logits_of(theirs.eval())
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start)
    with pytest.warns(UserWarning, match="unverified"):
        name = hub.load(tmp_path / "theirs")
    torch.testing.assert_close(our_logits(hub.model, name), wanted, atol=1e-4, rtol=1e-4)


QUERY = {"r": 4, "target_modules": ["q_proj"]}
OTHER_KINDS = {
    "DoRA": (peft.LoraConfig(use_dora=True, **QUERY), ["use_dora", "DoRA", "lora_magnitude"]),
    "bias": (peft.LoraConfig(bias="all", **QUERY), ["bias = 'all'", "belong to the backbone"]),
    "lora_bias": (peft.LoraConfig(lora_bias=True, **QUERY), ["lora_bias", "beside B"]),
    "modules_to_save": (
        peft.LoraConfig(modules_to_save=["lm_head"], **QUERY),
        ["modules_to_save = ['lm_head']", "lm_head.weight"],
    ),
    "tokens": (
        peft.LoraConfig(trainable_token_indices=[1, 2], **QUERY),
        ["trainable_token_indices", "embeddings"],
    ),
    "embedding": (
        peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
        ["lora_embedding_A", "not a LoRA factor"],
    ),
    "head": (peft.LoraConfig(r=4, target_modules=["lm_head"]), ["lm_head.base_layer.weight"]),
    "PiSSA": (
        peft.LoraConfig(init_lora_weights="pissa", **QUERY),
        ["init_lora_weights = 'pissa'", "path_initial_model_for_weight_conversion"],
    ),
    "OLoRA": (peft.LoraConfig(init_lora_weights="olora", **QUERY), ["init_lora_weights = 'olora'"]),
    "IA3": (
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        ["peft_type is 'IA3'"],
    ),
    "LoHa": (peft.LoHaConfig(**QUERY), ["peft_type is 'LOHA'"]),
    "AdaLoRA": (
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        ["peft_type is 'ADALORA'"],
    ),
    "prompt": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ["peft_type is 'PROMPT_TUNING'"],
    ),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapter_are_refused_with_the_reason(kind, tmp_path, refuses, pico_folder):
    config, words = OTHER_KINDS[kind]
    peft.get_peft_model(plain(pico_folder), config).save_pretrained(tmp_path / "theirs")
    refuses(tmp_path / "theirs", *words)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_replication", [[0, 1], [0, 2]]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts"]),
        ("use_rslora", "no"),
        ("init_lora_weights", "loftq"),
        ("kasa_config", {"beta": 1}),
        ("use_the_next_idea", True),
    ],
)
def test_settings_that_change_the_equation_are_refused(setting, value, folder, refuses):
    edit_config(folder, **{setting: value})
    refuses(folder, setting)


def test_settings_that_are_off_or_irrelevant_are_accepted(folder, hub):
    edit_config(folder, use_the_next_idea=False, eva_config={"rho": 2.0}, peft_version="9.9")
    with pytest.warns(UserWarning, match="unverified"):
        hub.load(folder)


# ---- damage and misfits --------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_missing_files_are_named(missing, folder, refuses):
    (folder / missing).unlink()
    refuses(folder, missing, "not found")


def test_pickled_weights_are_never_opened(folder, refuses):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    refuses(folder, WEIGHTS, ".bin weights are never opened")


def test_a_missing_folder_is_refused(tmp_path, hub):
    with pytest.raises(AdapterError, match="is not a folder"):
        hub.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"r = 8",
        b"[1, 2]",
        b"null",
        b'"LORA"',
        b"\xff\xfe{}",
        '{"peft_type": "LÖRA"}'.encode("latin-1"),
        b"[" * 100_000,
        b"{}",
        b'{"peft_type": "LORA"}',
    ],
)
def test_an_invalid_config_is_refused(text, folder, refuses):
    (folder / CONFIG).write_bytes(text)
    refuses(folder, str(folder))


def raw_safetensors(kind, shape, size):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:-9],
        lambda data: data + b"more",
        lambda data: data[:8] + b"#" + data[9:],
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: bytes(len(data)),
        lambda data: raw_safetensors("F32", [10**9, 10**9], 64),
        lambda data: raw_safetensors("F32", [-4, -32], 512),
    ],
)
def test_damaged_weights_are_refused(damage, folder, refuses):
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    refuses(folder, str(folder), f"{WEIGHTS} cannot be read")


@pytest.mark.parametrize(
    "places",
    [
        ([0, 512], [0, 512]),  # one over the other
        ([0, 512], [256, 768]),
        ([512, 1024], [512, 1024]),
        ([0, 512], [516, 1028]),  # a gap
        ([0, 512], [1024, 1536]),  # after the end
        ([0, 512], [512, 1020]),  # too short
        ([-512, 0], [512, 1024]),
    ],
)
def test_tensors_that_do_not_cover_the_file_are_refused(places, folder, refuses):
    header = {
        key(FIRST, factor): {"dtype": "F32", "shape": shape, "data_offsets": place}
        for factor, shape, place in zip("AB", ([4, 32], [32, 4]), places, strict=True)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.ones(256).numpy().tobytes()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    refuses(folder, str(folder), f"{WEIGHTS} cannot be read")


@pytest.mark.parametrize("spaces", range(1, 5))
def test_unaligned_tensors_are_read(spaces, folder):
    before, *_ = read_folder(folder)
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * spaces
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    after, *_ = read_folder(folder)
    for module, pair in before.factors.items():
        assert all(map(torch.equal, pair, after.factors[module]))
    assert after.is_finite


def test_factors_of_one_dtype_are_views_of_the_file(folder):
    """They are what safetensors reads, and names and shapes are known before any of them is made."""
    weights, *_ = read_folder(folder)
    factors, expected = weights.factors, load_file(folder / WEIGHTS)
    assert isinstance(factors, PackedFactors)
    assert len(factors) == len(list(factors)) == len(expected) // 2
    addresses = weights.addresses(torch.float32)
    assert weights.addresses(torch.bfloat16) is None
    for (module, pair), places in zip(factors.items(), addresses, strict=True):
        for letter, factor, place in zip("AB", pair, places, strict=True):
            assert torch.equal(factor, expected[key(module, letter)])
            assert factor.data_ptr() == place
        assert weights.shapes[module] == tuple(tuple(factor.shape) for factor in pair)
    assert FIRST in factors
    assert "nobody" not in factors
    plain = weights.with_factors(dict(factors))
    assert not isinstance(plain.factors, PackedFactors)
    for what in ("shapes", "num_parameters", "max_rank"):
        assert getattr(plain, what) == getattr(weights, what)
    assert plain.addresses(torch.float32) == addresses
    turned = {m: (a, b.T.contiguous().T) for m, (a, b) in factors.items()}
    assert weights.with_factors(turned).addresses(torch.float32) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_number_that_is_not_finite_is_found(bad, folder):
    weights, *_ = read_folder(folder)
    assert weights.is_finite
    a, b = weights.factors[FIRST]
    broken = b.clone()
    broken[3, 2] = bad
    assert not weights.with_factors({**weights.factors, FIRST: (a, broken)}).is_finite
    edit_tensors(folder, lambda tensors: tensors[key(FIRST, "B")][3, 2].fill_(bad))
    with pytest.raises(AdapterError, match=f"{FIRST}: some numbers are not finite"):
        read_folder(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=ONCE_PER_TEST)
@given(data=st.data())
def test_any_damage_is_either_harmless_or_an_adapter_error(data, folder, tmp_path):
    file = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn, dirs_exist_ok=True)
    content = bytearray((torn / file).read_bytes())
    reach = min(len(content), 4000)  # the header and some numbers
    for place in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    keep = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (torn / file).write_bytes(content[:keep])
    with contextlib.suppress(AdapterError):
        weights, *_ = read_folder(torn)
        assert all(math.isfinite(weights.scale(m)) for m in weights.factors)


FIRST = "model.layers.0.self_attn.q_proj"
SECOND = "model.layers.1.mlp.up_proj"


def key(module, factor):
    return f"base_model.model.{module}.lora_{factor}.weight"


def put(module, factor, tensor):
    return lambda tensors: tensors.update({key(module, factor): tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(FIRST, "A", torch.zeros(3, 32)), [FIRST, "rank 4", "(3, 32)"]),
        (put(FIRST, "B", torch.zeros(32, 5)), [FIRST, "rank 4", "(32, 5)"]),
        (put(FIRST, "A", torch.zeros(4, 33)), [FIRST, "33 -> 32", "32 -> 32"]),
        (put(SECOND, "B", torch.zeros(64, 4)), [SECOND, "32 -> 64", "32 -> 48"]),
        (put(FIRST, "A", torch.zeros(4)), [FIRST, "matrices"]),
        (put(FIRST, "A", torch.zeros(4, 32, 1)), [FIRST, "matrices"]),
        (put(FIRST, "A", torch.zeros(4, 32).long()), [FIRST, "'I64'"]),
        (put(FIRST, "A", torch.zeros(4, 32).to(torch.float8_e4m3fn)), [FIRST, "F8_E4M3"]),
        (put(FIRST, "B", torch.zeros(32, 4).cfloat()), [FIRST, "'C64'"]),
        (put(FIRST, "A", torch.full((4, 32), math.nan)), [FIRST, "not finite"]),
        (put(FIRST, "B", torch.full((32, 4), math.inf)), [FIRST, "not finite"]),
        (lambda tensors: tensors.pop(key(FIRST, "A")), [FIRST, "lora_B but not the other"]),
        (lambda tensors: tensors.clear(), ["not one LoRA factor"]),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
            ["not a LoRA factor", "lm_head.weight"],
        ),
        (lambda tensors: tensors.update({FIRST: torch.zeros(1)}), ["not a LoRA factor", FIRST]),
        (
            lambda tensors: tensors.update(
                {key("model.layers.7.mlp.up_proj", f): torch.zeros(4, 4) for f in "AB"}
            ),
            ["no linear layer 'model.layers.7.mlp.up_proj'"],
        ),
        (
            lambda tensors: tensors.update({key("lm_head", f): torch.zeros(4, 4) for f in "AB"}),
            ["'lm_head' is shared by all rows of a batch", "merge the adapter with PEFT"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words, folder, refuses):
    edit_tensors(folder, change)
    refuses(folder, *words)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("r", 8, [f"{FIRST}: the config says rank 8", f"{SECOND}: the config says rank 8"]),
        ("rank_pattern", {"q_proj": 2}, [f"{FIRST}: the config says rank 2"]),
        ("r", 0, ["r = 0 is refused: it must be a whole number from 1 to 1024"]),
        ("r", "4", ["r = '4' is refused"]),
        ("r", True, ["r = True is refused"]),
        ("r", None, ["r = None is refused"]),
        ("lora_alpha", math.nan, ["NaN is no number in JSON"]),
        ("lora_alpha", math.inf, ["Infinity is no number in JSON"]),
        ("lora_alpha", -1, ["lora_alpha = -1"]),
        ("lora_alpha", [8], ["lora_alpha = [8]"]),
        ("rank_pattern", [4], ["rank_pattern must be an object"]),
        ("alpha_pattern", {"q_proj": math.nan}, ["NaN is no number"]),
        ("alpha_pattern", {"q_proj": math.inf}, ["Infinity is no number"]),
        ("alpha_pattern", {"q_proj": 0}, ["alpha_pattern: q_proj = 0"]),
        ("alpha_pattern", {"^model.*q_proj": 2}, ["'^model.*q_proj' is refused", "plain module"]),
        ("rank_pattern", {".*": 4}, ["'.*' is refused"]),
        ("rank_pattern", {"(q|k)_proj": 4}, ["'(q|k)_proj' is refused"]),
        ("alpha_pattern", {"a\\.b": 4}, ["plain module names only"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, value, words, folder, refuses):
    edit_config(folder, **{setting: value})
    refuses(folder, *words)


def test_all_misfits_are_in_one_message(folder, refuses):
    edit_config(folder, use_dora=True, lora_alpha=-3, rank_pattern={"q.*": 2}, bias="all")
    edit_tensors(
        folder,
        lambda tensors: (
            tensors.pop(key(FIRST, "A")),
            tensors.update({f"extra.{i}": torch.zeros(1) for i in range(30)}),
        ),
    )
    message = refuses(folder, "use_dora", "lora_alpha", "'q.*'", "bias", FIRST, "and 27 more")
    assert "6 problems" in message


def test_all_misfits_with_the_backbone_are_in_one_message(folder, refuses):
    def change(tensors):
        tensors[key(FIRST, "A")] = torch.zeros(4, 7)
        for factor in "AB":
            del tensors[key(SECOND, factor)]
            tensors[key("model.layers.9.mlp.up_proj", factor)] = torch.zeros(4, 4)

    edit_tensors(folder, change)
    refuses(folder, "7 -> 32", f"target_modules mean {SECOND}, which", "layers.9.mlp.up_proj")


def test_a_pattern_that_only_peft_would_match_is_not_passed_on(tmp_path, model, make_weights):
    """To PEFT a dot in a pattern's key is any letter: this one would scale every q_proj."""
    folder = write(tmp_path / "adapter", model, make_weights(rank=4, alpha=8))
    edit_config(folder, alpha_pattern={"q.proj": 1e5})
    _, config, _ = read_folder(folder)
    assert config["alpha_pattern"] == {}
    edit_config(folder, alpha_pattern={"layers.0.self_attn.q_proj": 4})
    _, config, _ = read_folder(folder)
    assert config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 4}


def test_a_buffer_is_lent_to_one_reader_at_a_time():
    scratch = BufferPool()
    with scratch.lent() as mine, scratch.lent() as its:
        one, other = mine(100), its(100)
        assert one.data_ptr() != other.data_ptr()
        assert len(mine(40)) == 40
    with scratch.lent() as again:
        assert again(100).data_ptr() in (one.data_ptr(), other.data_ptr())
        assert len(again(200)) == 200  # a larger file gets more
    with pytest.raises(ZeroDivisionError), scratch.lent() as memory:
        memory(300)[0] = 1 / 0
    with scratch.lent() as memory:
        assert len(memory(300)) == 300
