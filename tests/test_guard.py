# ruff: noqa: E501 - a table reads best with one case a line
"""The guard: what strangers may hand in, and all that they may not. Nothing is left behind, no code runs."""

import hashlib
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_folder import write

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.folder import CONFIG, WEIGHTS, read_folder
from adapterhub_chat.guard import HEADER_BYTES, check
from adapterhub_chat.lora_config import config_misfits, rebuilt
from adapterhub_chat.manifest import FILE as MANIFEST
from adapterhub_chat.manifest import read_manifest

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


class Evil:
    """A pickle that touches a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# ---- ways to spoil a folder ----------------------------------------------------------------------


def config(**changes):
    """Change settings of the config."""

    def spoil(folder, _marker):
        values = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def config_bytes(data):
    return lambda folder, _marker: (folder / CONFIG).write_bytes(data)


def config_text(old, new):
    def spoil(folder, _marker):
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))

    return spoil


def raw(change):
    """Change the bytes of the weights file."""

    def spoil(folder, _marker):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(change(data))

    return spoil


def header(change):
    """Change the header of the weights file, as JSON."""

    def changed(data):
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        text = change(entries)
        text = (
            json.dumps(entries if text is None else text) if not isinstance(text, bytes) else text
        )
        text = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return raw(changed)


def tensors(change):
    """Change the tensors of the weights file."""

    def spoil(folder, _marker):
        found = safetensors.numpy.load_file(folder / WEIGHTS)
        change(found)
        safetensors.numpy.save_file(found, folder / WEIGHTS)

    return spoil


def put(name, value):
    return tensors(lambda found: found.update({name: value}))


def number(value, dtype=np.float32):
    """Put one number into a factor."""

    def change(found):
        found[OTHER] = found[OTHER].astype(dtype)
        found[OTHER][0, 0] = value

    return tensors(change)


def bf16(pattern):
    """Make all factors bf16, with one number of these bits."""

    def spoil(folder, _marker):
        from safetensors.torch import load_file, save_file

        found = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
        found[OTHER].view(torch.int16)[0, 0] = pattern
        save_file(found, folder / WEIGHTS)

    return spoil


def instead(file, make):
    """Put something else where a file was."""

    def spoil(folder, _marker):
        (folder / file).unlink()
        make(folder / file)

    return spoil


def only_pickle(folder, marker):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(marker)))


def pickle_as_weights(folder, marker):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Evil(marker)))


def grow(name, size):
    def spoil(folder, _marker):
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return spoil


def overlap(entries):
    names = [name for name in entries if name != "__metadata__"]
    entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]


def twice(entries):
    text = json.dumps(entries)
    return (text[:-1] + ", " + json.dumps({FIRST: entries[FIRST]})[1:]).encode()


def of_first(**values):
    return header(lambda entries: entries[FIRST].update(values))


def half(found):
    for name in [name for name in found if "layers.1." in name]:
        del found[name]


REDOS = "(a+)+$" + "a" * 30
BAD = {
    # files
    "only a pickle": (only_pickle, "never opened"),
    "a pickle as weights": (pickle_as_weights, "no safetensors file"),
    "weights are a link": (instead(WEIGHTS, lambda p: p.symlink_to("/etc/hostname")), "is a link"),
    "config is a link": (instead(CONFIG, lambda p: p.symlink_to("/dev/zero")), "is a link"),
    "weights are a dangling link": (instead(WEIGHTS, lambda p: p.symlink_to("nowhere")), "is a link"),
    "weights are a pipe": (instead(WEIGHTS, os.mkfifo), "not a regular file"),
    "config is a pipe": (instead(CONFIG, os.mkfifo), "not a regular file"),
    "weights are a folder": (instead(WEIGHTS, Path.mkdir), "not a regular file"),
    "config is missing": (lambda folder, _: (folder / CONFIG).unlink(), "not found"),
    "weights are empty": (raw(lambda _: b""), "no safetensors file"),
    "weights are cut": (raw(lambda data: data[: len(data) // 2]), "do not fill"),
    "weights end one byte early": (raw(lambda data: data[:-1]), "do not fill"),
    "bytes after the tensors": (raw(lambda data: data + b"x"), "do not fill"),
    "config of 65 kB": (config_bytes(b"{" + b" " * 65 * 2**10 + b"}"), "at most 65,536"),
    "weights of 3 GiB": (grow(WEIGHTS, 3 * 2**30), "at most 2,147,483,648"),
    "manifest of 2 MB": (lambda f, _: (f / MANIFEST).write_bytes(b" " * 2**21), "at most 1,048,576"),
    "manifest is a link": (lambda f, _: (f / MANIFEST).symlink_to("/etc/hostname"), "is a link"),
    "manifest is a list": (lambda f, _: (f / MANIFEST).write_bytes(b"[]"), MANIFEST),
    "manifest with a key twice": (lambda f, _: (f / MANIFEST).write_bytes(b'{"name": "a", "name": "b"}'), "there twice"),
    "manifest with NaN": (lambda f, _: (f / MANIFEST).write_bytes(b'{"name": NaN}'), "NaN is no JSON number"),
    "manifest is deep": (lambda f, _: (f / MANIFEST).write_bytes(b"[" * 100_000), "not valid JSON"),
    # the header
    "header of 2^62 bytes": (raw(lambda data: struct.pack("<Q", 2**62) + data[8:]), "no safetensors file"),
    "header of 101 MB": (grow(WEIGHTS, 2**20), "do not fill"),
    "header longer than is read": (raw(lambda d: struct.pack("<Q", HEADER_BYTES + 1) + b" " * (HEADER_BYTES + 2)), "at most 1,048,576"),
    "header of no JSON": (header(lambda _: b"not json"), "not valid JSON"),
    "header of a list": (header(lambda _: b"[1]"), "name at most"),
    "header that is deep": (header(lambda _: b"[" * 90_000), "not valid JSON"),
    "header not UTF-8": (header(lambda _: b'{"\xff": 1}'), "not valid JSON"),
    "header of 7,000 tensors": (header(lambda e: {f"t{n}": {} for n in range(7_000)}), "name at most 6,000"),
    "tensors overlap": (header(overlap), "do not fi"),
    "a tensor twice": (header(twice), "there twice"),
    "a gap": (of_first(data_offsets=[4, 516]), "do not fill"),
    "unknown dtype": (of_first(dtype="X9"), "numbers of type 'X9'"),
    "int8 numbers": (put(FIRST, np.zeros((4, 32), np.int8)), "numbers of type 'I8'"),
    "a shape that overflows": (of_first(shape=[2**33, 2**33]), "has the shape"),
    "a huge shape": (of_first(shape=[2**63, 1]), "has the shape"),
    "a shape of 48,000 numbers": (of_first(shape=[2**61] * 48_000), "has the shape"),
    "a negative shape": (of_first(shape=[-4, -32]), "has the shape"),
    "a shape of fractions": (of_first(shape=[4.0, 32]), "has the shape"),
    "a shape of booleans": (of_first(shape=[True, 128]), "has the shape"),
    "a shape of text": (of_first(shape="ab"), "has the shape"),
    "a negative place": (of_first(data_offsets=[-512, 0]), "data_offsets"),
    "a place of three": (of_first(data_offsets=[0, 512, 512]), "do not fit"),
    "an entry with more": (of_first(code="x"), "must have dtype, shape and data_offsets"),
    "an entry that is text": (header(lambda e: e.update({FIRST: "x"})), "must have dtype"),
    "metadata of numbers": (header(lambda e: e.update(__metadata__={"a": 1})), "must hold texts"),
    # the numbers
    "1e150 beside 1e-170": (tensors(lambda f: f.update({n: np.full(t.shape, 1e150 if "lora_B" in n else 1e-170) for n, t in f.items()})), "not finite"),
    "NaN in fp32": (number(math.nan), "not finite"),
    "infinity in fp32": (number(-math.inf), "not finite"),
    "NaN in fp16": (number(math.nan, np.float16), "not finite"),
    "infinity in fp64": (number(math.inf, np.float64), "not finite"),
    "NaN in bf16": (bf16(0x7FC0), "not finite"),
    "infinity in bf16": (bf16(0x7F80), "not finite"),
    "1e30 everywhere": (tensors(lambda f: f.update({n: np.full_like(t, 1e30) for n, t in f.items()})), "not finite"),
    "1e15 in one factor": (number(1e15), "not finite"),
    "a large update": (tensors(lambda f: f.update({n: t * 100 for n, t in f.items()})), "may change weights by"),
    "a large scale": (config(lora_alpha=900_000), "may change weights by"),
    # the names and shapes
    "no factor at all": (tensors(lambda f: f.clear()), "not one LoRA factor"),
    "one factor alone": (tensors(lambda f: f.pop(FIRST)), "not the other factor"),
    "half of the layers": (tensors(half), "layers that have no factors"),
    "the head's own weights": (put("base_model.model.lm_head.weight", np.zeros((300, 32), np.float32)), "not a LoRA factor"),
    "a layer's own weights": (put("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", np.zeros((32, 32), np.float32)), "not a LoRA factor"),
    "a layer without its prefix": (put("model.layers.0.self_attn.q_proj.weight", np.zeros((32, 32), np.float32)), "not a LoRA factor"),
    "a layer that is not there": (tensors(lambda f: [f.update({n.replace("0", "7"): f[n]}) for n in (FIRST, OTHER)]), "no linear layer"),
    "an embedding's factor": (put("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 300), np.float32)), "not a LoRA factor"),
    "DoRA's magnitude": (put("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", np.ones((32, 1), np.float32)), "not a LoRA factor"),
    "a name with escapes": (put("\x1b[2J", np.zeros((1, 1), np.float32)), "not a LoRA factor"),
    "a name of 10,000 letters": (put("a" * 10_000, np.zeros((1, 1), np.float32)), "not a LoRA factor"),
    "another rank": (tensors(lambda f: f.update({FIRST: f[FIRST][:2].copy()})), "the config says rank"),
    "another width": (tensors(lambda f: f.update({FIRST: f[FIRST][:, :16].copy()})), "the backbone 32 -> 32"),
    "three dimensions": (tensors(lambda f: f.update({FIRST: f[FIRST][None].copy()})), "factors must be matrices"),
    # the config
    "r = 50,000,000": (config(r=50_000_000), "between 1 and 1024"),
    "r = -4": (config(r=-4), "between 1 and 1024"),
    "r = '4'": (config(r="4"), "between 1 and 1024"),
    "r = 0": (config(r=0), "between 1 and 1024"),
    "r = true": (config(r=True), "between 1 and 1024"),
    "r = 4.0": (config(r=4.0), "between 1 and 1024"),
    "r = null": (config(r=None), "between 1 and 1024"),
    "alpha NaN": (config_text('"lora_alpha": 8', '"lora_alpha": NaN'), "NaN is no JSON number"),
    "alpha infinite": (config_text('"lora_alpha": 8', '"lora_alpha": 1e999'), "too large for a number"),
    "alpha negative": (config(lora_alpha=-1), "between 0 and a million"),
    "alpha a text": (config(lora_alpha="8"), "between 0 and a million"),
    "alpha a list": (config(lora_alpha=[8]), "between 0 and a million"),
    "a setting twice": (config_text('"r": 4', '"r": 4, "r": 8'), "there twice"),
    "targets that hang": (config(target_modules=REDOS), "regular expression"),
    "targets of everything": (config(target_modules=".*"), "regular expression"),
    "targets that are no pattern": (config(target_modules="("), "regular expression"),
    "a target with a pattern": (config(target_modules=["q_proj", "(a+)+$"]), "plain module names only"),
    "a target of numbers": (config(target_modules=[1]), "plain module names only"),
    "targets in an object": (config(target_modules={"a": 1}), "list of module names"),
    "exclusions that hang": (config(exclude_modules=REDOS), "PEFT reads a text as a pattern"),
    "ranks that hang": (config(rank_pattern={REDOS: 4}), "plain module names only"),
    "alphas that hang": (config(alpha_pattern={REDOS: 4}), "plain module names only"),
    "ranks in a list": (config(rank_pattern=["q_proj"]), "must be an object"),
    "a huge rank in a pattern": (config(rank_pattern={"q_proj": 10**9}), "between 1 and 1024"),
    "layers copied 3000 times": (config(layer_replication=[[0, 2]] * 3000), "layer_replication"),
    "the head replaced": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "DoRA": (config(use_dora=True), "use_dora"),
    "DoRA by a number": (config(use_dora=1), "use_dora"),
    "rsLoRA by a text": (config(use_rslora="yes"), "use_rslora"),
    "biases": (config(bias="all"), "bias"),
    "lora_bias": (config(lora_bias=True), "lora_bias"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights"),
    "tokens by index": (config(trainable_token_indices=[10**9]), "trainable_token_indices"),
    "aLoRA": (config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "parameters": (config(target_parameters=["x"]), "target_parameters"),
    "prompt tuning": (config(peft_type="PROMPT_TUNING"), "peft_type"),
    "a type that is not": (config(peft_type="EVIL"), "peft_type"),
    "a type that is a list": (config(peft_type=["LORA"]), "peft_type"),
    "a task that is not": (config(task_type="EVIL"), "task_type"),
    "unknown settings": (config(evil_field="x", trust_remote_code=True), "'evil_field'"),
    "a base with escapes": (config(base_model_name_or_path="\x1b[2J"), "base_model_name_or_path"),
    "a base that is a list": (config(base_model_name_or_path=["x"]), "base_model_name_or_path"),
    "config a list": (config_bytes(b"[]"), "must hold a JSON object"),
    "config a number": (config_bytes(b"1e5"), "must hold a JSON object"),
    "config empty": (config_bytes(b""), "not valid JSON"),
    "config not UTF-8": (config_bytes(b'{"r": "\xff"}'), "not valid JSON"),
    "config UTF-16": (config_bytes('{"r": 4}'.encode("utf-16")), "not valid JSON"),
    "900 settings twice": (config_bytes(json.dumps({str(n): 1 for n in range(4500)})[:-1].encode() + b"," + json.dumps({str(n): 1 for n in range(900)})[1:].encode()), "there twice"),
    "config deep": (config_bytes(b'{"a":' * 9_000), "not valid JSON"),
    "config YAML": (config_bytes(b"r: 4\nlora_alpha: 8\n"), "not valid JSON"),
    "a number of 10,000 digits": (config_bytes(b'{"r": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, model, make_weights):
    return write(tmp_path / "adapter", model, make_weights(rank=4))


def everything(root):
    return {
        str(p.relative_to(root)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in root.rglob("*")
    }


def numbers_of(hub):
    digest = hashlib.sha256()
    for tensor in hub.backbone.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_there_are_enough_bad_inputs():
    assert len(BAD) >= 100


@pytest.mark.parametrize("what", BAD)
def test_what_is_bad_is_refused_and_changes_nothing(what, folder, hub, tmp_path, make_weights):
    spoil, reason = BAD[what]
    marker = tmp_path / "marker"
    hub.load(write(tmp_path / "good", hub.model, make_weights(seed=3)))
    spoil(folder, marker)
    before = everything(tmp_path), numbers_of(hub), hub.model.names
    logits = hub.next_token_logits(["film"], ["good"])
    started = time.monotonic()
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    seconds = time.monotonic() - started
    assert reason in str(refused.value)
    assert all(c.isprintable() or c == "\n" for c in str(refused.value))
    assert len(str(refused.value)) < 10_000
    assert seconds < 1
    assert (everything(tmp_path), numbers_of(hub), hub.model.names) == before
    assert torch.equal(hub.next_token_logits(["film"], ["good"]), logits)
    assert not marker.exists()
    verdict = hub.verify(folder)
    assert (verdict.ok, verdict.status) == (False, "refused")


def test_what_is_good_is_taken(folder, hub):
    with pytest.warns(UserWarning, match="unverified"):
        assert hub.load(folder) == "adapter"


def test_all_misfits_come_at_once(folder, hub):
    for what in ("DoRA", "r = -4", "targets that hang", "the head's own weights"):
        BAD[what][0](folder, None)
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    for word in ("use_dora", "r = -4", "target_modules", "lm_head"):
        assert word in str(refused.value)


def test_the_config_that_is_handed_on_is_ours(folder, hub):
    config(runtime_config={"evil": 1}, peft_version="9", lora_dropout=0.5, revision="x")(
        folder, None
    )
    _, rebuilt_config, _ = read_folder(folder)
    assert set(rebuilt_config) <= {f.name for f in fields(peft.LoraConfig)}
    assert rebuilt_config["lora_dropout"] == 0.0
    assert "runtime_config" not in rebuilt_config
    assert "revision" not in rebuilt_config


def test_folders_that_we_write_come_back_to_the_byte(folder):
    _, config_read, _ = read_folder(folder)
    assert json.dumps(config_read) == (folder / CONFIG).read_text()


def test_a_manifest_is_read_strictly_too(tmp_path):
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(AdapterError, match="not a regular file"):
        read_manifest(tmp_path)


# ---- any header, any config ----------------------------------------------------------------------

DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@st.composite
def files(draw):
    """Weights of one to four modules, in any order and of any of the types."""
    names = [
        f"base_model.model.m{n}.lora_{f}.weight"
        for n in range(draw(st.integers(1, 4)))
        for f in "AB"
    ]
    entries, place = {}, 0
    for name in draw(st.permutations(names)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        width = draw(st.integers(1, 5))
        shape = [4, width] if "_A" in name else [width, 4]
        size = 4 * width * DTYPES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    text += b" " * draw(st.integers(0, 9))
    return struct.pack("<Q", len(text)) + text + b"\x01" * place


PLAIN = json.dumps(
    {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
).encode()


def understood(data):
    """Return names, types, shapes and places, or None for what is refused."""
    try:
        found = check(Path("x"), memoryview(PLAIN), memoryview(data))
    except AdapterError:
        return None
    return {
        n: (t.dtype, t.shape, data[found.start + t.begin : found.start + t.end])
        for n, t in found.tensors.items()
    }


@given(files())
def test_a_header_is_understood_as_safetensors_does(data):
    found = understood(data)
    assert found is not None
    theirs = dict(safetensors.deserialize(data))
    assert {n: (d, list(s), bytes(b)) for n, (d, s, b) in found.items()} == {
        n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in theirs.items()
    }


@given(files(), st.data())
def test_what_is_accepted_of_any_bytes_safetensors_accepts(data, draw):
    spoilt = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(spoilt) - 1))
        spoilt[place] = draw.draw(st.integers(0, 255))
    spoilt = bytes(
        spoilt[: draw.draw(st.integers(0, len(spoilt)))] if draw.draw(st.booleans()) else spoilt
    )
    found = understood(spoilt)
    if found is not None:
        theirs = dict(safetensors.deserialize(spoilt))
        assert {n: (d, list(s)) for n, (d, s, _) in found.items()} == {
            n: (t["dtype"], t["shape"]) for n, t in theirs.items()
        }


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(data):
    assert understood(data) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=8,
)
SETTINGS = [*sorted(f.name for f in fields(peft.LoraConfig)), "evil"]


@given(st.dictionaries(st.sampled_from(SETTINGS), JSON, max_size=4))
def test_any_config_is_refused_or_made_plain(changes):
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "task_type": "CAUSAL_LM"} | changes
    misfits = config_misfits(values)
    assert all(isinstance(misfit, str) and len(misfit) < 1000 for misfit in misfits)
    if misfits:
        return
    made = rebuilt(values, {"model.q": None})
    loaded = peft.LoraConfig(**made)  # PEFT takes it as it is
    assert not loaded.use_dora
    assert not loaded.modules_to_save
    assert all(
        isinstance(t, str) and t.replace("_", "").replace(".", "").isalnum()
        for t in loaded.target_modules
    )
    assert math.isfinite(loaded.lora_alpha)


# ---- what it costs -------------------------------------------------------------------------------

COST = """
import json, resource, struct, sys, time
from pathlib import Path
from adapterhub_chat import guard
config, weights, layers = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes(), json.loads(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = []
for _ in range(3):
    guard._parsed.cache_clear()
    started = time.perf_counter()
    try:
        guard.check(Path("x"), memoryview(config), memoryview(weights), layers)
    except guard.AdapterError:
        pass
    seconds.append(time.perf_counter() - started)
print(json.dumps([min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))
"""


def big_header():
    """1 MB of header that almost fits: 6,000 small tensors with long names."""
    entries = {
        f"base_model.model.layer{n:05d}.{'x' * 60}.lora_A.weight": {
            "dtype": "F32",
            "shape": [1, 1],
            "data_offsets": [4 * n, 4 * n + 4],
        }
        for n in range(6_000)
    }
    text = json.dumps(entries).encode()
    assert 0.8 * HEADER_BYTES < len(text) <= HEADER_BYTES
    return struct.pack("<Q", len(text)) + text + b"\0" * 24_000


def large_adapter():
    """5 M numbers in bf16 for 30 layers."""
    entries, place = {}, 0
    for n in range(30):
        for factor, shape in (("A", [16, 5120]), ("B", [5120, 16])):
            size = 2 * 16 * 5120
            entries[f"base_model.model.l{n}.lora_{factor}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [place, place + size],
            }
            place += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * place


@pytest.mark.parametrize("make", [big_header, large_adapter])
def test_the_worst_case_is_cheap(make, tmp_path):
    (tmp_path / "w").write_bytes(make())
    values = json.loads(PLAIN) | {"r": 16}
    (tmp_path / "c").write_text(json.dumps(values))
    layers = {f"l{n}": [5120, 5120] for n in range(30)}
    command = [
        sys.executable,
        "-c",
        COST,
        str(tmp_path / "c"),
        str(tmp_path / "w"),
        json.dumps(layers),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = json.loads(done.stdout)
    assert seconds < 0.1
    assert memory < 100e6


def test_this_process_may_open_few_files(folder, hub):
    """Refusals leave no file open."""
    limit = len(os.listdir("/proc/self/fd"))
    raw(lambda data: data[:-1])(folder, None)
    for _ in range(50):
        with pytest.raises(AdapterError):
            hub.load(folder)
    assert len(os.listdir("/proc/self/fd")) <= limit + 2
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 50
