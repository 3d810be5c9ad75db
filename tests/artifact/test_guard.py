"""Hostile adapters: each is refused with the reason, at once, and nothing anywhere has changed."""

import json
import math
import os
import pickle
import re
import shutil
import stat
import time
import tracemalloc
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load, save

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.folder import config_of, read_folder, write_weights
from adapterhub_chat.artifact.guard import MAX_GAIN, MAX_VALUE, check_files
from adapterhub_chat.artifact.manifest import MANIFEST
from adapterhub_chat.artifact.peft_config import (
    CONFIG,
    PEFT_SETTINGS,
    missing_module_misfits,
    plain_config,
    surplus_module_misfits,
    values_by_module,
)
from adapterhub_chat.artifact.safetensors_header import MAX_HEADER, MAX_TENSORS, WEIGHTS
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.weights import initial_weights

FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
BUSY = 10
"""How much longer than on a quiet machine anything may take."""


def key(module, factor):
    return f"base_model.model.{module}.lora_{factor}.weight"


# ---- the good adapter, and ways to spoil it ------------------------------------------------------


@pytest.fixture(scope="module")
def hub(pico_folder, tmp_path_factory):
    """One hub for all: nothing that is done here may change it."""
    pool = tmp_path_factory.mktemp("hub") / "pool"
    hub = AdapterHub(str(pico_folder), pool, dtype="fp32", device="cpu")
    for name in ("one", "two"):
        write_good(pool / name, hub)
    loaded(hub, "two")
    with pytest.warns(UserWarning, match="unverified"):
        hub.load("one")
    return hub


def good_weights(hub, size=0.3):
    start = initial_weights(hub.model.shapes, rank=4, alpha=8, seed=1)
    generator = torch.Generator().manual_seed(1)
    factors = {
        m: (a, torch.randn(b.shape, generator=generator) * size)
        for m, (a, b) in start.factors.items()
    }
    return start.with_factors(factors)


def write_good(folder, hub):
    folder.mkdir(parents=True)
    weights = good_weights(hub)
    (folder / CONFIG).write_text(json.dumps(config_of(weights, "pico", hub.model.shapes)))
    write_weights(folder / WEIGHTS, weights)
    return folder


@pytest.fixture
def folder(tmp_path, hub):
    return write_good(tmp_path / "adapter", hub)


class Touch:
    """Pickled, it is a program that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def marker(folder):
    return folder.parent / "code-ran"


def setting(**changes):
    def spoil(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return spoil


def without(name):
    def spoil(folder):
        values = json.loads((folder / CONFIG).read_text())
        del values[name]
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def config(change):
    """Change the bytes of the config."""

    def spoil(folder):
        (folder / CONFIG).write_bytes(change((folder / CONFIG).read_bytes()))

    return spoil


def weights(change):
    """Change the bytes of the weights."""

    def spoil(folder):
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return spoil


def tensors(change):
    """Change the tensors, and write them by safetensors itself."""

    def spoil(folder):
        found = load((folder / WEIGHTS).read_bytes())
        change(found)
        (folder / WEIGHTS).write_bytes(save({n: t.contiguous() for n, t in found.items()}))

    return spoil


def put(module, factor, value):
    return tensors(lambda found: found.update({key(module, factor): value}))


def extra(name, value=None):
    return tensors(lambda found: found.update({name: torch.ones(4) if value is None else value}))


def packed(header, numbers):
    return len(header).to_bytes(8, "little") + header + numbers


def header(change):
    """Change the text of the header of the weights; the numbers stay."""

    def spoil(data):
        end = 8 + int.from_bytes(data[:8], "little")
        return packed(change(data[8:end]), data[end:])

    return weights(spoil)


def entries(change):
    """Change the header of the weights as JSON."""

    def spoil(text):
        found = json.loads(text)
        change(found)
        return json.dumps(found).encode()

    return header(spoil)


def entry(**changes):
    return entries(lambda found: found[key(FIRST, "A")].update(changes))


def numbers(kind, value, place=-1):
    """Make all tensors of one kind, with one number replaced."""

    def change(found):
        for name, tensor in found.items():
            found[name] = tensor.to(DTYPES[kind])
        found[key(LAST, "B")].view(-1)[place] = value

    return tensors(change)


def only_b(value):
    return tensors(lambda found: [t.fill_(value) for name, t in found.items() if "lora_B" in name])


def each(value):
    return tensors(lambda found: [tensor.fill_(value) for tensor in found.values()])


def drop(words):
    def change(found):
        for name in [n for n in found if words in n]:
            del found[name]

    return tensors(change)


def mixed(found):
    for name in list(found)[::2]:
        found[name] = found[name].half()
    found[key(LAST, "A")][0, 0] = math.nan


def replaced(file, make):
    """Put something else in the place of a file."""

    def spoil(folder):
        (folder / file).unlink(missing_ok=True)
        try:
            make(folder / file)
        except PermissionError:
            pytest.skip("only root makes devices")

    return spoil


def linked(file):
    """Put a link to the good file in its place."""

    def spoil(folder):
        moved = folder.parent / f"elsewhere-{file}"
        shutil.move(folder / file, moved)
        (folder / file).symlink_to(moved)

    return spoil


def node(kind, device=0):
    return lambda path: os.mknod(path, kind | 0o600, device)


def sparse(size):
    def make(path):
        with path.open("wb") as file:
            file.truncate(size)

    return make


def pickled(file, plain=False):
    def spoil(folder):
        found = load((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).unlink()
        if plain:
            torch.save(found, folder / file)
        else:
            (folder / file).write_bytes(pickle.dumps(Touch(marker(folder))))

    return spoil


def manifest(text):
    return lambda folder: (folder / MANIFEST).write_bytes(text)


SLOW = "(a+)+" * 20 + "$"
"""A regular expression that takes for ever."""
NOT_NAMES = "plain module names"
UNREADABLE = f"{WEIGHTS} cannot be read: "
NO_FACTOR = f"{WEIGHTS} holds what is not a LoRA factor: "

FILES = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} not found"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} not found"),
    "01 a pickle that runs code": (pickled("adapter_model.bin"), ".bin weights are never opened"),
    "02 a pickle of tensors": (pickled("adapter_model.bin", plain=True), ".bin weights are never"),
    "a .pt file": (pickled("adapter_model.pt"), f"{WEIGHTS} not found"),
    "03 weights that are a pickle": (pickled(WEIGHTS), UNREADABLE),
    "weights that are a torch file": (pickled(WEIGHTS, plain=True), UNREADABLE),
    "config a folder": (replaced(CONFIG, Path.mkdir), "not a regular file"),
    "weights a folder": (replaced(WEIGHTS, Path.mkdir), "not a regular file"),
    "config a link": (linked(CONFIG), "it is a link"),
    "weights a link": (linked(WEIGHTS), "it is a link"),
    "config a link to a file of the machine": (
        replaced(CONFIG, lambda p: p.symlink_to("/etc/hostname")),
        "it is a link",
    ),
    "weights a link to nothing": (replaced(WEIGHTS, lambda p: p.symlink_to("none")), "is a link"),
    "weights a link to themselves": (
        replaced(WEIGHTS, lambda p: p.symlink_to(WEIGHTS)),
        "is a link",
    ),
    "weights a link to endless zeros": (
        replaced(WEIGHTS, lambda p: p.symlink_to("/dev/zero")),
        "it is a link",
    ),
    "config a FIFO": (replaced(CONFIG, os.mkfifo), "not a regular file"),
    "weights a FIFO": (replaced(WEIGHTS, os.mkfifo), "not a regular file"),
    "config a socket": (replaced(CONFIG, node(stat.S_IFSOCK)), "cannot be read"),
    "weights a device": (
        replaced(WEIGHTS, node(stat.S_IFCHR, os.makedev(1, 5))),
        "not a regular file",
    ),
    "config of 65 kB": (config(lambda t: t + b" " * 65 * 2**10), "at most 65,536"),
    "weights of 3 GiB": (replaced(WEIGHTS, sparse(3 * 2**30)), "at most 2,147,483,648"),
    "manifest a link": (replaced(MANIFEST, lambda p: p.symlink_to(CONFIG)), "it is a link"),
    "manifest a FIFO": (replaced(MANIFEST, os.mkfifo), "not a regular file"),
    "manifest of 2 MB": (manifest(b" " * 2**21), "at most 1,048,576"),
    "manifest empty": (manifest(b""), "is not valid JSON"),
    "manifest not UTF-8": (manifest(b'{"name": "\xff"}'), "is not valid JSON"),
    "manifest with a key twice": (manifest(b'{"name": "a", "name": "b"}'), "'name' stands there 2"),
    "manifest with NaN": (manifest(b'{"name": NaN}'), "NaN is no number"),
    "manifest with a number beyond all": (
        manifest(b'{"training": {"settings": {"a": 1e999}}}'),
        "'1e999' is too large",
    ),
    "manifest nested": (manifest(b"[" * 100_000), "nested too deeply"),
    "manifest nested less": (
        manifest(b'{"training": {"settings":' + b'{"a":' * 50 + b"1" + b"}" * 52),
        "nested too deeply",
    ),
    "manifest a list": (manifest(b"[]"), MANIFEST),
    "manifest with a number of 5000 digits": (
        manifest(b'{"schema_version": ' + b"9" * 5000 + b"}"),
        "is not valid JSON",
    ),
    "manifest with half a character": (manifest(b'{"name": "\\ud800"}'), MANIFEST),
}

HEADERS = {
    "16 weights empty": (weights(lambda d: b""), "it has 0 bytes"),
    "weights of 7 bytes": (weights(lambda d: d[:7]), "it has 7 bytes"),
    "04 half the bytes": (weights(lambda d: d[: len(d) // 2]), "cannot lie at"),
    "ends inside its header": (weights(lambda d: d[:100]), "ends inside its header"),
    "05 header of 2^62 bytes": (
        weights(lambda d: (2**62).to_bytes(8, "little") + d[8:]),
        "4,611,686,018,427,387,904 bytes; at most 4,194,304",
    ),
    "header of 2^64 - 1 bytes": (weights(lambda d: b"\xff" * 8 + d[8:]), "at most 4,194,304"),
    "07 header of 101 MB claimed": (
        weights(lambda d: (101 * 10**6).to_bytes(8, "little") + d[8:]),
        "101,000,000 bytes; at most 4,194,304",
    ),
    "header of a byte too many": (
        header(lambda t: t + b" " * (MAX_HEADER + 1 - len(t))),
        "4,194,305 bytes; at most",
    ),
    "header empty": (weights(lambda d: bytes(8)), "no JSON object"),
    "only zeros": (weights(lambda d: bytes(len(d))), "no JSON object"),
    "header no JSON": (header(lambda t: b"{" + b"x" * (len(t) - 1)), UNREADABLE),
    "header a list": (header(lambda t: b"[" + t + b"]"), "no JSON object"),
    "header null": (header(lambda t: b"null"), "no JSON object"),
    "header a text": (header(lambda t: b'"LORA"'), "no JSON object"),
    "header after a space": (header(lambda t: b" " + t), "no JSON object"),
    "header after a byte order mark": (header(lambda t: b"\xef\xbb\xbf" + t), "no JSON object"),
    "header in UTF-16": (header(lambda t: t.decode().encode("utf-16")), UNREADABLE),
    "header not UTF-8": (header(lambda t: t.replace(b"F32", b"F\xff2", 1)), UNREADABLE),
    "header with zeros behind": (header(lambda t: t + b"\0\0"), UNREADABLE),
    "two headers": (header(lambda t: t + t), UNREADABLE),
    "header nested": (header(lambda t: b'{"a":' * 500_000), "nested too deeply"),
    "header of nested lists": (header(lambda t: b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "header of 30,000 lists": (
        header(lambda t: b'{"a":[' + b"[]," * 32_000 + b"[]]}"),
        "'a' needs dtype, shape",
    ),
    "a header of 30,000 keys, one twice": (
        header(lambda t: b'{"a":1' + b"".join(b',"k%d":1' % n for n in range(30_000)) + b',"a":2}'),
        "the key 'a' stands there 2 times",
    ),
    "a shape of 30,000 numbers": (
        header(
            lambda t: re.sub(
                rb'"shape":\[4,32\]', b'"shape":[' + b"9," * 32_000 + b"1]", t, count=1
            )
        ),
        "cannot have the shape",
    ),
    "header of a million lists": (
        header(lambda t: b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        f"more than {MAX_TENSORS} tensors",
    ),
    "5000 tensors": (
        entries(lambda e: e.update({f"t{n}": e[key(FIRST, "A")] for n in range(5000)})),
        f"more than {MAX_TENSORS} tensors",
    ),
    "12 a tensor twice": (
        header(lambda t: t.replace(b"q_proj.lora_B", b"q_proj.lora_A", 1)),
        "stands there 2 times",
    ),
    "a tensor twice in other letters": (
        header(lambda t: t.replace(b"q_proj.lora_B", b"q_proj.lora\\u005fA", 1)),
        "stands there 2 times",
    ),
    "a dtype twice": (
        header(lambda t: t.replace(b'"dtype":', b'"dtype":"I8","dtype":', 1)),
        "'dtype' stands there 2 times",
    ),
    "NaN in the header": (entry(shape=math.nan), "NaN is no number"),
    "Infinity in the header": (entry(shape=[math.inf, 4]), "Infinity is no number"),
    "09 overlap": (entries(lambda e: e.update(twin=e[key(FIRST, "A")])), "begins at byte"),
    "10 hole": (weights(lambda d: shifted(d, 8)), "begins at byte 8"),
    "10 trailing bytes": (weights(lambda d: d + b"more"), "its tensors take"),
    "a byte missing": (weights(lambda d: d[:-1]), "cannot lie at"),
    "offsets behind the end": (entry(data_offsets=[10**9, 10**9 + 512]), "cannot lie at"),
    "offsets backwards": (entry(data_offsets=[512, 0]), "no F32 numbers"),
    "offsets negative": (entry(data_offsets=[-512, 0]), "cannot lie at"),
    "offsets minus zero": (
        header(lambda t: t.replace(b'"data_offsets":[0,', b'"data_offsets":[-0,')),
        "-0 is no whole number",
    ),
    "offsets fractions": (entry(data_offsets=[0.0, 512.0]), "cannot lie at"),
    "offsets true": (entry(data_offsets=[False, 512]), "cannot lie at"),
    "offsets texts": (entry(data_offsets=["0", "512"]), "cannot lie at"),
    "offsets an object": (entry(data_offsets={"0": 512}), "cannot lie at"),
    "three offsets": (entry(data_offsets=[0, 256, 512]), "cannot lie at"),
    "offsets of 5000 digits": (
        header(lambda t: t.replace(b"[0,", b"[" + b"9" * 5000 + b",", 1)),
        UNREADABLE,
    ),
    "11 shape that overflows": (entry(shape=[2**33, 2**33]), "cannot have the shape"),
    "shape that overflows to the right size": (entry(shape=[2**63, 2**63, 128]), "cannot have"),
    "shape of 4000 digits": (entry(shape=[10**4000] * 3), "cannot have the shape"),
    "shape negative": (entry(shape=[-4, -32]), "cannot have the shape"),
    "shape with nothing": (entry(shape=[0, 32]), "cannot have the shape"),
    "shape of fractions": (entry(shape=[4.0, 32.0]), "cannot have the shape"),
    "shape of truths": (entry(shape=[True, 128]), "cannot have the shape"),
    "shape a number": (entry(shape=128), "cannot have the shape"),
    "shape nested": (entry(shape=[[4, 32]]), "cannot have the shape"),
    "shape of nine": (entry(shape=[1] * 8 + [128]), "cannot have the shape"),
    "shape for other bytes": (entry(shape=[4, 33]), "512 bytes, which are no F32 numbers"),
    "dtype for other bytes": (entry(dtype="F16"), "512 bytes, which are no F16 numbers"),
    "13 unknown dtype": (entry(dtype="X9"), f"{FIRST}: numbers of type 'X9' are no LoRA factors"),
    "dtype of half bytes": (entry(dtype="F4"), "numbers of type 'F4' are no LoRA factors"),
    "dtype a list": (entry(dtype=["F32"]), "cannot lie at"),
    "dtype missing": (entries(lambda e: e[key(FIRST, "A")].pop("dtype")), "needs dtype, shape"),
    "a field too many": (entry(requires_grad=True), "needs dtype, shape and data_offsets"),
    "a tensor that is a number": (entries(lambda e: e.update({key(FIRST, "A"): 7})), "needs dtype"),
    "metadata a list": (entries(lambda e: e.update(__metadata__=["pt"])), "__metadata__"),
    "metadata null": (entries(lambda e: e.update(__metadata__=None)), "__metadata__"),
    "metadata of numbers": (entries(lambda e: e.update(__metadata__={"a": 1})), "__metadata__"),
    "metadata nested": (entries(lambda e: e.update(__metadata__={"a": {}})), "__metadata__"),
    "metadata long": (entries(lambda e: e.update(__metadata__={"a": "b" * 9999})), "__metadata__"),
    "metadata with an escape": (
        entries(lambda e: e.update(__metadata__={"a": "\x1b[2J"})),
        "__metadata__",
    ),
    "no tensor": (weights(lambda d: packed(b"{}", b"")), "not one LoRA factor"),
}


def shifted(data, by):
    """Move all tensors up by some bytes, which then belong to none."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = json.loads(data[8:end])
    for name, described in found.items():
        if name != "__metadata__":
            described["data_offsets"] = [offset + by for offset in described["data_offsets"]]
    return packed(json.dumps(found).encode(), bytes(by) + data[end:])


TENSORS = {
    **{
        f"17 {value} in {kind}": (numbers(kind, value), f"{LAST}: some numbers are not finite")
        for kind in DTYPES
        for value in (math.nan, math.inf, -math.inf)
    },
    **{
        f"a negative NaN in {kind}": (
            numbers(kind, math.copysign(math.nan, -1), 0),
            "some numbers are not finite",
        )
        for kind in DTYPES
    },
    **{
        f"19 {value:g} in {kind}": (
            numbers(kind, value),
            f"{LAST}: lora_B holds {abs(torch.tensor(value, dtype=DTYPES[kind]).item()):.3g}; at most",
        )
        for kind in ("BF16", "F32", "F64")
        for value in (1e30, -1e30, 70000.0)
    },
    "19 all 1e30": (each(1e30), "at most 65504 is allowed"),
    "1e300": (numbers("F64", 1e300), "lora_B holds 1e+300"),
    "1e150 times next to nothing": (
        tensors(
            lambda f: f.update(
                {
                    n: torch.full(t.shape, 1e-170 if "lora_A" in n else 1e150, dtype=torch.float64)
                    for n, t in f.items()
                }
            )
        ),
        "at most 65504",
    ),
    "1e30 times next to nothing": (
        tensors(lambda f: [t.fill_(1e-30 if "lora_A" in n else 1e30) for n, t in f.items()]),
        "at most 65504",
    ),
    "NaN in the second of mixed dtypes": (tensors(mixed), f"{LAST}: some numbers are not finite"),
    "all 1000": (each(1000.0), f"{FIRST}: its update may have a norm of"),
    "all as large as it goes": (each(-65504.0), "stays below"),
    "one large factor": (only_b(30000.0), "its update may have a norm of"),
    "small numbers scaled up": (setting(lora_alpha=999_999), "its update may have a norm of"),
    "one module scaled up": (
        setting(alpha_pattern={FIRST: 900_000}),
        f"{FIRST}: its update may have a norm of",
    ),
    "27 int8": (
        tensors(lambda f: f.update({n: t.to(torch.int8) for n, t in f.items()})),
        f"{FIRST}: numbers of type 'I8' are no LoRA factors: F16, BF16, F32, F64",
    ),
    "bool": (put(FIRST, "A", torch.ones(4, 32).bool()), "'BOOL'"),
    "float8": (put(FIRST, "B", torch.ones(32, 4).to(torch.float8_e5m2)), "'F8_E5M2'"),
    "complex": (put(FIRST, "B", torch.ones(32, 4).cfloat()), "'C64'"),
    "20 another rank": (
        tensors(
            lambda f: f.update(
                {n: t[:2] if "lora_A" in n else t[:, :2] for n, t in f.items()},
            )
        ),
        f"{FIRST}: the config says rank 4, the tensors are A (2, 32), B (32, 2)",
    ),
    "A and B of two ranks": (put(FIRST, "B", torch.zeros(32, 2)), "the config says rank 4"),
    "A the other way round": (put(FIRST, "A", torch.zeros(32, 4)), "the config says rank 4"),
    "21 another hidden size": (
        tensors(
            lambda f: f.update({n: t[:, :16] for n, t in f.items() if "lora_A" in n and "q_" in n})
        ),
        f"{FIRST}: the adapter maps 16 -> 32, the backbone 32 -> 32",
    ),
    "22 half of the layers missing": (
        drop("layers.1."),
        "target_modules mean model.layers.1.self_attn.q_proj, model.layers.1",
    ),
    "one module missing": (drop("layers.1.mlp.up_proj"), "which the weights do not hold"),
    "one factor missing": (drop(key(FIRST, "A")), f"{FIRST} has lora_B but not the other factor"),
    "all B missing": (drop("lora_B"), f"{FIRST} has lora_A but not the other factor"),
    "a module that is not meant": (
        setting(target_modules=TARGETS[:-1]),
        "the weights hold model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj, which",
    ),
    "a layer that is not there": (
        tensors(
            lambda f: f.update(
                {
                    n.replace("layers.1", "layers.2"): t.clone()
                    for n, t in f.items()
                    if "layers.1" in n
                }
            )
        ),
        "no linear layer 'model.layers.2.self_attn.q_proj'",
    ),
    "24 the backbone's head": (
        extra("base_model.model.lm_head.weight", torch.ones(300, 32)),
        f"{NO_FACTOR}'base_model.model.lm_head.weight'",
    ),
    "24 the backbone's embedding": (
        extra("base_model.model.model.embed_tokens.weight", torch.ones(300, 32)),
        NO_FACTOR,
    ),
    "26 the backbone's own layer": (
        extra(f"base_model.model.{FIRST}.base_layer.weight", torch.ones(32, 32)),
        f"{NO_FACTOR}'base_model.model.{FIRST}.base_layer.weight'",
    ),
    "a norm of the backbone": (extra("base_model.model.model.norm.weight"), NO_FACTOR),
    "a bias of B": (extra(f"base_model.model.{FIRST}.lora_B.bias", torch.ones(32)), NO_FACTOR),
    "a magnitude": (extra(f"base_model.model.{FIRST}.lora_magnitude_vector"), NO_FACTOR),
    "an embedding's factor": (extra("base_model.model.model.lora_embedding_A"), NO_FACTOR),
    "a named adapter": (extra(f"base_model.model.{FIRST}.lora_A.evil.weight"), NO_FACTOR),
    "a prompt": (extra("prompt_embeddings", torch.ones(3, 32)), NO_FACTOR),
    "a path": (extra("base_model.model.../../x.lora_A.weight"), NO_FACTOR),
    "a name with a line break": (extra(key(FIRST, "A") + "\n"), NO_FACTOR),
    "a name in other letters": (extra(key("mоdel.x", "A"), torch.ones(4, 4)), NO_FACTOR),
    "a name with empty parts": (extra(key("model..x", "A"), torch.ones(4, 4)), NO_FACTOR),
    "a name of a thousand parts": (extra(key("a." * 999 + "b", "A")), NO_FACTOR),
    "a name of 100,000 letters": (extra("a" * 100_000), NO_FACTOR),
    "no name": (extra(""), NO_FACTOR),
    "a head with factors": (
        tensors(lambda f: f.update({key("lm_head", x): torch.zeros(4, 4) for x in "AB"})),
        "the weights hold lm_head, which target_modules do not mean",
    ),
    "a vector": (put(FIRST, "A", torch.zeros(4)), f"{FIRST}: factors must be matrices"),
    "a single number": (put(FIRST, "A", torch.tensor(1.0)), f"{FIRST}: factors must be matrices"),
    "a cube": (put(FIRST, "B", torch.zeros(32, 4, 1)), f"{FIRST}: factors must be matrices"),
}

CONFIGS = {
    "config empty": (config(lambda t: b""), f"{CONFIG} is not valid JSON"),
    "config no JSON": (config(lambda t: b"r: 8\ntarget_modules: [q_proj]"), "is not valid JSON"),
    "config YAML that runs code": (
        config(lambda t: b"!!python/object/apply:os.system ['touch code-ran']"),
        "is not valid JSON",
    ),
    "50 config a list": (config(lambda t: b"[" + t + b"]"), "a JSON object, not a list"),
    "config null": (config(lambda t: b"null"), "a JSON object, not a NoneType"),
    "config a number": (config(lambda t: b"1"), "a JSON object, not a int"),
    "config half": (config(lambda t: t[: len(t) // 2]), "is not valid JSON"),
    "52 config not UTF-8": (config(lambda t: t.replace(b"pico", b"pic\xff")), "'utf-8' codec"),
    "config in UTF-16": (config(lambda t: t.decode().encode("utf-16")), "is not valid JSON"),
    "config after a byte order mark": (config(lambda t: b"\xef\xbb\xbf" + t), "is not valid JSON"),
    "config nested": (config(lambda t: b"[" * 60_000), "nested too deeply"),
    "config nested less": (
        config(lambda t: t[:-1] + b', "eva_config": {"a":' + b"[" * 40 + b"]" * 40 + b"}}"),
        "nested too deeply",
    ),
    "r twice": (config(lambda t: t[:-1] + b', "r": 50000000}'), "the key 'r' stands there 2 times"),
    "one of 7000 keys twice": (
        config(lambda t: b'{"a":1' + b"".join(b',"%d":1' % n for n in range(7000)) + b',"a":2}'),
        "the key 'a' stands there 2 times",
    ),
    "peft_type twice": (config(lambda t: t[:-1] + b', "peft_type": "IA3"}'), "'peft_type' stands"),
    "-Infinity": (setting(lora_alpha=-math.inf), "-Infinity is no number"),
    "29 rank bomb": (setting(r=50_000_000), "r = 50000000 is refused: it must be a whole number"),
    "rank bomb in a pattern": (
        setting(rank_pattern={"q_proj": 50_000_000}),
        "rank_pattern: q_proj = 50000000 is refused",
    ),
    "r of 1025": (setting(r=1025), "from 1 to 1024"),
    "r of 4000 digits": (setting(r=10**4000), "r = 1000000"),
    "31 r negative": (setting(r=-4), "r = -4 is refused"),
    "32 r a text": (setting(r="4"), "r = '4' is refused"),
    "33 r zero": (setting(r=0), "r = 0 is refused"),
    "r true": (setting(r=True), "r = True is refused"),
    "r a fraction": (setting(r=4.0), "r = 4.0 is refused"),
    "r a list": (setting(r=[4]), "r = [4] is refused"),
    "r null": (setting(r=None), "r = None is refused"),
    "r missing": (without("r"), "r = None is refused"),
    "35 alpha NaN": (setting(lora_alpha=math.nan), "NaN is no number"),
    "35 alpha Infinity": (setting(lora_alpha=math.inf), "Infinity is no number"),
    "alpha infinite by its exponent": (
        config(lambda t: t.replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999')),
        "'1e999' is too large for a number",
    ),
    "alpha zero": (setting(lora_alpha=0), "lora_alpha = 0 is refused"),
    "alpha negative": (setting(lora_alpha=-8), "lora_alpha = -8 is refused"),
    "alpha a text": (setting(lora_alpha="8"), "lora_alpha = '8' is refused"),
    "alpha true": (setting(lora_alpha=True), "lora_alpha = True is refused"),
    "alpha a million": (setting(lora_alpha=10**6), "between 0 and a million"),
    "alpha missing": (without("lora_alpha"), "lora_alpha = None is refused"),
    "36 targets that hang, in a list": (setting(target_modules=[SLOW]), NOT_NAMES),
    "37 ranks that hang": (setting(rank_pattern={SLOW: 4}), f"rank_pattern: '{SLOW[:40]}"),
    "37 alphas that hang": (setting(alpha_pattern={SLOW: 8}), NOT_NAMES),
    "exclusions that hang": (setting(exclude_modules=SLOW), "exclude_modules = "),
    "exclusions that hang, in a list": (setting(exclude_modules=["q_proj", SLOW]), NOT_NAMES),
    "layers that hang": (setting(layers_to_transform=[0], layers_pattern=SLOW), "layers_pattern"),
    "targets a text without end": (
        setting(target_modules="a" * 10_001),
        "the modules are taken from the weights",
    ),
    "targets missing": (without("target_modules"), "target_modules = None is refused"),
    "targets empty": (setting(target_modules=[]), "target_modules = [] is refused"),
    "targets an empty text": (setting(target_modules=""), "target_modules = '' is refused"),
    "targets numbers": (setting(target_modules=[1, 2]), "target_modules = [1, 2] is refused"),
    "targets with a line break": (setting(target_modules=["q_proj\n"]), NOT_NAMES),
    "targets with a dot at the end": (setting(target_modules=["q_proj."]), NOT_NAMES),
    "targets an object": (setting(target_modules={"q_proj": 1}), "target_modules = {"),
    "targets that are not there": (
        setting(target_modules=["c_attn"]),
        "which target_modules do not mean",
    ),
    "targets more than the weights": (
        lambda f: (drop("k_proj")(f), setting(target_modules="all-linear")(f)),
        "target_modules mean model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj",
    ),
    "what is held is excluded": (
        setting(exclude_modules=["layers.0.mlp.up_proj"]),
        "the weights hold model.layers.0.mlp.up_proj, which target_modules do not mean",
    ),
    "what is held is in another layer": (
        setting(layers_to_transform=[1]),
        "model.layers.0.mlp.up_proj and 4 more, which target_modules do not mean",
    ),
    "layers of another stack": (
        setting(layers_to_transform=[0, 1], layers_pattern=["blocks"]),
        "which target_modules do not mean",
    ),
    "layers with a text for targets": (
        setting(target_modules="all-linear", layers_to_transform=[0, 1]),
        "layers_to_transform: only a list of target_modules",
    ),
    "a pattern of no layers": (setting(layers_pattern="layers"), "layers_to_transform names none"),
    "layers negative": (setting(layers_to_transform=[-1]), "layers_to_transform = [-1] is refused"),
    "layers true": (setting(layers_to_transform=True), "layers_to_transform = True is refused"),
    "ranks a list": (setting(rank_pattern=[4]), "rank_pattern must be an object"),
    "ranks true": (setting(rank_pattern={"q_proj": True}), "rank_pattern: q_proj = True"),
    "ranks of other modules": (setting(rank_pattern={"q_proj": 2}), "the config says rank 2"),
    "alphas infinite": (
        config(lambda t: t.replace(b'"alpha_pattern": {', b'"alpha_pattern": {"q_proj": -1e999')),
        "'-1e999' is too large for a number",
    ),
    "41 layer bomb": (setting(layer_replication=[[0, 2]] * 3000), "layer_replication = [[0, 2]"),
    "42 head replaced": (setting(modules_to_save=["lm_head"]), "modules_to_save = ['lm_head']"),
    "46 megatron": (
        setting(megatron_core="os", megatron_config={"a": 1}),
        "megatron_core = 'os' is refused",
    ),
    "47 an unknown field": (setting(evil_field=1), "'evil_field' = 1 is unknown here"),
    "47 trust_remote_code": (setting(trust_remote_code=True), "'trust_remote_code' = True"),
    "an unknown field of zero": (setting(evil_field=0), "'evil_field' = 0 is unknown here"),
    "a field with an escape": (setting(**{"\x1b[2J": True}), r"'\x1b[2J' = True"),
    "48 prompt tuning": (setting(peft_type="PROMPT_TUNING"), "its peft_type is 'PROMPT_TUNING'"),
    "49 unknown type": (setting(peft_type="EVIL"), "its peft_type is 'EVIL'; only 'LORA'"),
    "type a list": (setting(peft_type=["LORA"]), "its peft_type is ['LORA']"),
    "type missing": (without("peft_type"), "its peft_type is None"),
    "type in small letters": (setting(peft_type="lora"), "its peft_type is 'lora'"),
    "56 a module to import": (
        setting(auto_mapping={"base_model_class": "X", "parent_library": "antigravity"}),
        "auto_mapping = ",
    ),
    "a class to run": (setting(auto_mapping={"base_model_class": "X()"}), "auto_mapping = "),
    "58 unknown task": (setting(task_type="EVIL"), "task_type = 'EVIL' is refused"),
    "another task": (setting(task_type="SEQ_CLS"), "go together"),
    "59 DoRA": (setting(use_dora=True), "use_dora = True is refused: DoRA"),
    "use_rslora a text": (setting(use_rslora="no"), "use_rslora = 'no' is refused"),
    "use_rslora a number": (setting(use_rslora=1), "use_rslora = 1 is refused"),
    "62 tokens": (
        setting(trainable_token_indices=[10**9]),
        "trainable_token_indices = [1000000000] is refused",
    ),
    "biases": (setting(bias="all"), "bias = 'all' is refused"),
    "a start that changes the backbone": (setting(init_lora_weights="pissa"), "init_lora_weights"),
    "KaSA": (setting(kasa_config={"beta": 1.0}), "'kasa_config' = {'beta': 1.0} is unknown"),
    "block-diagonal": (setting(use_bdlora={"nblocks": 2}), "'use_bdlora'"),
    "aLoRA": (setting(alora_invocation_tokens=[1]), "aLoRA switches on"),
    "parameters": (setting(target_parameters=["experts.gate_up_proj"]), "only linear layers"),
    "a backbone with an escape": (
        setting(base_model_name_or_path="\x1b]0;"),
        "base_model_name_or_path = ",
    ),
    "a backbone's name of 60,000 letters": (
        setting(base_model_name_or_path="a" * 60_000),
        "at most 1000",
    ),
    "half a character": (setting(base_model_name_or_path="\ud800"), r"'\ud800' is refused"),
    "dropout of 2": (setting(lora_dropout=2), "lora_dropout = 2 is refused"),
    "a config for training that is a text": (setting(eva_config="x"), "eva_config = 'x'"),
}

CASES = {**FILES, **HEADERS, **TENSORS, **CONFIGS}


def surroundings(*roots):
    """Return every path below the folders with its content, or its kind; a FIFO is never opened."""
    found = {}
    for path in (p for root in roots for p in root.rglob("*")):
        mode = path.lstat().st_mode
        content = stat.S_IFMT(mode)
        if stat.S_ISREG(mode) and path.stat().st_size < 2**30:
            content = path.read_bytes()
        found[path] = content, path.lstat().st_mtime_ns
    return found


def backbone_bytes(hub):
    tensors = hub.backbone.model.state_dict()
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES)
def test_a_bad_adapter_is_refused_with_the_reason_and_nothing_changes(
    case, folder, hub, pico_folder, tmp_path
):
    spoil, words = CASES[case]
    spoil(folder)
    around = (tmp_path, hub.pool.root, pico_folder)
    before = surroundings(*around), backbone_bytes(hub), hub.model.names
    logits = hub.next_token_logits(["film"] * 2, ["one", None])
    begun = time.process_time()
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    assert time.process_time() - begun < 1
    assert words in str(refused.value)
    assert str(folder) in str(refused.value)
    assert len(str(refused.value)) < 30_000
    assert all(c.isprintable() or c == "\n" for c in str(refused.value))
    verdict = hub.verify(folder)
    assert (verdict.ok, verdict.status) == (False, "refused")
    assert words in "; ".join(verdict.problems)
    assert (surroundings(*around), backbone_bytes(hub), hub.model.names) == before
    assert torch.equal(hub.next_token_logits(["film"] * 2, ["one", None]), logits)
    assert not marker(folder).exists()


def test_there_are_enough_bad_adapters():
    assert len(CASES) >= 200
    assert len(CASES) == sum(map(len, (FILES, HEADERS, TENSORS, CONFIGS)))


def test_all_problems_are_in_one_message(folder, hub):
    for spoil in (
        setting(r="4", lora_alpha=-1, use_dora=True, target_modules=[".*"], evil=1),
        numbers("F32", math.nan),
        put(FIRST, "A", torch.zeros(4)),
        extra("lm_head.weight"),
    ):
        spoil(folder)
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    message = str(refused.value)
    assert "8 problems" in message
    for words in ("r = '4'", "lora_alpha = -1", "use_dora", "target_modules", "'evil'"):
        assert words in message
    for words in (f"{LAST}: some numbers are not", f"{FIRST}: factors must be", "'lm_head.weight'"):
        assert words in message


@pytest.mark.parametrize(
    "case",
    [
        "22 half of the layers missing",
        "21 another hidden size",
        "a layer that is not there",
        "17 nan in BF16",
        "19 all 1e30",
        "36 targets that hang, in a list",
        "24 the backbone's head",
        "weights a FIFO",
    ],
)
def test_a_pool_member_is_checked_like_an_untrusted_folder(case, hub):
    spoil, words = CASES[case]
    folder = write_good(hub.pool.root / "bad", hub)
    spoil(folder)
    try:
        for source in ("bad", folder):
            with pytest.raises(AdapterError, match=re.escape(words)):
                hub.load(source)
            assert words in "; ".join(hub.verify(source).problems)
    finally:
        shutil.rmtree(folder)


def test_wrong_modules_sizes_and_numbers_are_in_one_message(folder, hub):
    for case in ("one module missing", "21 another hidden size", "17 nan in F32"):
        CASES[case][0](folder)
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    for case in ("one module missing", "21 another hidden size", "17 nan in F32"):
        assert CASES[case][1] in str(refused.value)


def test_refusals_leave_no_file_open(folder, hub):
    before = len(os.listdir("/proc/self/fd"))
    for spoil in (weights(lambda d: d[:-1]), replaced(WEIGHTS, os.mkfifo), linked(CONFIG)):
        shutil.rmtree(folder)
        spoil(write_good(folder, hub))
        for _ in range(20):
            with pytest.raises(AdapterError):
                hub.load(folder)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_long_list_of_misfits_ends():
    modules = [f"m{n}" for n in range(2000)]
    data = file_of({key(m, f): ("F32", (2, 2)) for m in modules for f in "AB"})
    with pytest.raises(AdapterError) as refused:
        check_files("it", config_text(r=3, target_modules=modules[:1500]), memoryview(data))
    assert "m98: the config says rank 3" in str(refused.value)
    assert str(refused.value).endswith("and 1901 more")


def test_one_large_rank_among_small_ones_is_no_memory_bomb():
    described = {key("m0", "A"): ("F32", (1024, 2)), key("m0", "B"): ("F32", (2, 1024))}
    for n in range(1, 9):
        described[key(f"m{n}", "A")] = "F32", (1, 4000)
        described[key(f"m{n}", "B")] = "F32", (4000, 1)
    data = file_of(described)
    with pytest.raises(
        AdapterError, match=r"largest rank, 1024, .* would take 962 times its numbers"
    ):
        check_files("it", config_text(r=1, rank_pattern={"m0": 1024}), memoryview(data))
    spread = {key(f"m{n}", f): ("F32", (4, 4)) for n in range(9) for f in "AB"}
    spread |= {key("m0", "A"): ("F32", (64, 4)), key("m0", "B"): ("F32", (4, 64))}
    check_files("it", config_text(r=4, rank_pattern={"m0": 64}), memoryview(file_of(spread)))


# ---- what is good stays good ---------------------------------------------------------------------


def test_other_files_in_the_folder_are_never_opened(folder, hub, tmp_path):
    for file in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / file).write_bytes(pickle.dumps(Touch(marker(folder))))
    (folder / "README.md").write_text(
        "---\na: &a [x]\nb: !!python/object/apply:os.system [ls]\n---"
    )
    (folder / "chat_template.jinja").write_text("{% for i in range(10**9) %}{% endfor %}")
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "tokenizer_config.json")
    (folder / "\x1b[2J.py").write_text("import os")
    name = loaded(hub, folder)
    assert name == "adapter"
    assert not marker(folder).exists()


def loaded(hub, folder):
    with pytest.warns(UserWarning, match="unverified"):
        name = hub.load(folder)
    hub.unload(name)
    return name


UNSLOTH = "".join(
    (
        r"(?:.*?(?:language|text).*?\.(?:q_proj))",
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|v_proj))",
    )
)
GOOD = {
    "36 targets that hang": setting(target_modules=SLOW),
    "38 targets no expression": setting(target_modules="(q_proj"),
    "39 targets anything": setting(target_modules=".*"),
    "what Unsloth writes": setting(
        target_modules=UNSLOTH,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
    ),
    "all linear": setting(target_modules="All-Linear"),
    "full names": setting(
        target_modules=[f"model.layers.{n}.{m}" for n in (0, 1) for m in TARGETS]
    ),
    "narrowed to what is held": lambda f: (
        drop("layers.0")(f),
        setting(layers_to_transform=1, layers_pattern="layers")(f),
    ),
    "excluded and not held": lambda f: (
        drop("mlp.up_proj")(f),
        setting(target_modules="all-linear", exclude_modules=["mlp.up_proj"])(f),
    ),
    "targets of other architectures": setting(target_modules=[*TARGETS, "c_attn", "dense"]),
    "what PEFT notes about the class": setting(
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
        task_type=None,
    ),
    "what older versions write": setting(
        megatron_core="megatron.core",
        loftq_config={},
        layers_pattern="",
        layers_to_transform=None,
        modules_to_save=[],
        lora_dropout=0,
        peft_version="0.5.0",
        revision=None,
        fan_in_fan_out=True,
        enable_lora=None,
        merge_weights=False,
    ),
    "a fraction for alpha": setting(lora_alpha=2.5, use_rslora=True),
    "a long header": header(lambda t: t + b" " * (MAX_HEADER - len(t))),
    "no metadata": entries(lambda e: e.pop("__metadata__", None)),
    "half precision": numbers("F16", 0.5),
    "double precision": numbers("F64", 0.5),
    "mixed precision": lambda f: (tensors(mixed)(f), put(LAST, "A", torch.ones(4, 48))(f)),
    "next to nothing": each(1e-40),
    "nothing": each(0.0),
    "larger than training makes them": each(3.0),
}


@pytest.mark.parametrize("case", GOOD)
def test_an_honest_adapter_is_accepted(case, folder, hub):
    if case == "full names":
        values = sorted(hub.model.shapes)
        setting(target_modules=values)(folder)
    else:
        GOOD[case](folder)
    before = json.loads((folder / CONFIG).read_text())
    assert loaded(hub, folder) == "adapter"
    _, config, _ = read_folder(folder)
    again = peft.LoraConfig.from_peft_type(**config)
    assert again.r == before["r"]
    assert again.lora_alpha == before["lora_alpha"]


def test_the_returned_config_is_rebuilt(folder):
    good = json.loads((folder / CONFIG).read_text())
    setting(
        eva_config={"rho": 2.0, "a": {"b": "c"}},
        lora_dropout=0.3,
        peft_version="9",
        init_lora_weights="eva",
        auto_mapping={"parent_library": "transformers"},
        revision="main",
        off=False,
        exclude_modules=[],
        layers_pattern=[],
    )(folder)
    _, config, _ = read_folder(folder)
    assert config == good


# ---- the header, by any means --------------------------------------------------------------------


def file_of(described, fill=0, spaces=0):
    """Return a weights file: name -> (dtype, shape), in this order."""
    found, place = {}, 0
    for name, (kind, shape) in described.items():
        end = place + math.prod(shape) * DTYPES[kind].itemsize
        found[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    return bytearray(packed(json.dumps(found).encode() + b" " * spaces, bytes([fill]) * place))


def config_text(**changes):
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    return json.dumps(plain | changes).encode()


def as_safetensors_has_it(data):
    """Return name -> (dtype, shape, bytes) by the library itself; raise what it raises."""
    found = safetensors.deserialize(bytes(data))
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def as_the_guard_has_it(data, config=None):
    checked = check_files("it", config or config_text(), memoryview(data))
    return {
        key(module, factor): (
            place.dtype,
            place.shape,
            bytes(data[checked.start + place.start : checked.start + place.end]),
        )
        for (module, factor), place in checked.layout.spans.items()
    }


PARTS = st.sampled_from(
    ["model", "layers", "0", "1", "31", "self_attn", "q_proj", "up_proj", "x_y"]
)
MODULES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)


@st.composite
def headers(draw):
    modules = draw(st.lists(MODULES, min_size=1, max_size=6, unique=True))
    kinds = st.sampled_from(sorted(DTYPES))
    sizes = st.integers(1, 5)
    described = {}
    for module in modules:
        described[key(module, "A")] = draw(kinds), (2, draw(sizes))
        described[key(module, "B")] = draw(kinds), (draw(sizes), 2)
    return {name: described[name] for name in draw(st.permutations(sorted(described)))}


@given(headers(), st.integers(0, 9))
def test_any_good_header_is_read_as_safetensors_reads_it(described, spaces):
    data = file_of(described, fill=7, spaces=spaces)
    assert as_the_guard_has_it(data) == as_safetensors_has_it(data)


def agree_or_refuse(data):
    """Whatever comes: an AdapterError, or what safetensors has too."""
    try:
        ours = as_the_guard_has_it(data)
    except AdapterError:
        return
    assert ours == as_safetensors_has_it(data)


@given(headers(), st.data())
def test_any_damage_to_a_file_is_refused_or_read_as_safetensors_reads_it(described, data):
    content = file_of(described, fill=7)
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end + 4))
        new = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"-", b"[", b'"', b" "])
        )
        content[place : place + data.draw(st.integers(0, 3))] = new
    content[:8] = data.draw(st.just(content[:8]) | st.just(end.to_bytes(8, "little")))
    agree_or_refuse(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(content):
    for data in (
        bytearray(content),
        bytearray(packed(content, b"")),
        bytearray(packed(b"{", content)),
    ):
        with pytest.raises(AdapterError):
            check_files("it", config_text(), memoryview(data))


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.0, True, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "X9", "", 4, None]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
    },
    optional={"more": NUMBERS},
)
NAMES = st.builds(key, MODULES, st.sampled_from("ABC")) | st.text(max_size=9)


@given(st.dictionaries(NAMES, ENTRIES | NUMBERS, max_size=4), st.integers(0, 64))
def test_any_header_in_json_is_refused_or_read_as_safetensors_reads_it(found, size):
    agree_or_refuse(bytearray(packed(json.dumps(found).encode(), bytes(size))))


# ---- the numbers, by any means -------------------------------------------------------------------


@given(
    st.sampled_from(sorted(DTYPES)),
    st.binary(min_size=32, max_size=32),
    st.sampled_from([0, 1, 2, 3, 5]),
)
def test_numbers_of_any_bits_are_judged_as_torch_judges_them(kind, bits, spaces):
    width = DTYPES[kind].itemsize
    described = {key("m", "A"): (kind, (2, 8 // width)), key("m", "B"): (kind, (8 // width, 2))}
    data = file_of(described, spaces=spaces)
    data[-32:] = bits
    a, b = torch.frombuffer(bytearray(bits), dtype=DTYPES[kind]).double().split(16 // width)
    limit = MAX_GAIN * math.sqrt(8 // width)
    try:
        check_files("it", config_text(), memoryview(data))
    except AdapterError as error:
        found = str(error)
    else:
        found = ""
    bound = 4 / 2 * float(a.norm() * b.norm())
    both = torch.cat((a, b))
    if not both.isfinite().all():
        assert "not finite" in found
    elif both.abs().max() > MAX_VALUE:
        assert "at most 65504" in found
    elif not math.isclose(bound, limit, rel_tol=1e-9):
        assert ("may have a norm" in found) == (bound > limit)
        assert bool(found) == (bound > limit)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 2**20, 3 * 2**20 - 1])
def test_one_bad_number_among_millions_is_found(kind, place):
    width = DTYPES[kind].itemsize
    described = {key("m", "A"): (kind, (2, 2**20)), key("m", "B"): (kind, (2**19, 2))}
    data = file_of(described)
    check_files("it", config_text(), memoryview(data))
    start = len(data) - (3 * 2**20 - place) * width
    data[start : start + width] = b"\xff" * width
    with pytest.raises(AdapterError, match="m: some numbers are not finite"):
        check_files("it", config_text(), memoryview(data))


@pytest.mark.parametrize("kind", DTYPES)
def test_the_norm_is_that_of_all_pieces_of_a_factor(kind):
    described = {key("m", "A"): (kind, (2, 2**20)), key("m", "B"): (kind, (2, 2))}
    start = 2 * 2**20
    values = torch.zeros(start + 4, dtype=DTYPES[kind])
    values[start - 1], values[start:] = 1000.0, 512.0  # 4 / 2 * 1000 * 1024 is twice the limit
    for alpha, fits in ((1.9, True), (2.1, False)):
        data = file_of(described)
        data[-values.nbytes :] = values.view(torch.uint8).numpy().tobytes()
        config = config_text(lora_alpha=alpha)
        if fits:
            check_files("it", config, memoryview(data))
        else:
            with pytest.raises(AdapterError, match=r"m: its update may have a norm of 1\.08e\+06"):
                check_files("it", config, memoryview(data))


# ---- the config, by any means --------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
TYPICAL = (
    JSON
    | st.sampled_from(
        ["q_proj", "all-linear", "CAUSAL_LM", "gaussian", 1, 2, [0], {}, [], "", None]
    )
    | st.lists(MODULES | st.integers(0, 3), max_size=3)
    | st.dictionaries(MODULES, st.integers(1, 4) | st.floats(0.5, 9), max_size=3)
)
FIELDS = sorted({*PEFT_SETTINGS, "rank_pattern", "alpha_pattern", "peft_type"})
PLAIN = plain_config(base_model="", rank=1, alpha=1, rslora=False, targets=[]).keys()
NARROWING = {"exclude_modules", "layers_to_transform", "layers_pattern"}


def is_plain(value):
    if isinstance(value, list):
        return all(type(v) in (str, int) for v in value)
    if isinstance(value, dict):
        return all(type(v) in (int, float) and 0 < v < 1e6 for v in value.values())
    return type(value) in (str, int, float, bool, type(None))


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), TYPICAL, max_size=3))
def test_any_value_in_any_field_is_refused_or_a_plain_config(changes):
    text = config_text(**{"target_modules": ["q_proj"], **changes})
    data = file_of({key("model.layers.0.q_proj", f): ("F32", (2, 2)) for f in "AB"})
    try:
        config = dict(check_files("it", text, memoryview(data)).config)
    except AdapterError:
        return
    assert config.keys() - NARROWING == PLAIN
    assert all(map(is_plain, config.values()))
    again = peft.LoraConfig.from_peft_type(**config)
    assert again.task_type == "CAUSAL_LM"
    assert check_files("it", json.dumps(config).encode(), memoryview(data)).config == config


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_config_are_refused(text):
    data = file_of({key("m", f): ("F32", (2, 2)) for f in "AB"})
    with pytest.raises(AdapterError):
        check_files("it", text, memoryview(data))


KNOWN = [
    "q_proj",
    "layers.0.q_proj",
    "model.q_proj",
    "model.0.q_proj",
    "model.layers.0.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.blocks.2.layers.1.q_proj",
    "blocks.2.layers.0.mlp.up_proj",
    "model.layers.10.up_proj",
]
TAILS = sorted({".".join(m.split(".")[n:]) for m in KNOWN for n in range(m.count(".") + 1)})
NAMED = st.lists(st.sampled_from(TAILS), max_size=3)


@given(
    NAMED.filter(bool),
    NAMED,
    st.lists(st.integers(0, 2), max_size=2),
    st.lists(st.sampled_from(["layers", "blocks", "model", "experts"]), max_size=2),
)
def test_targets_match_as_in_peft(targets, excluded, layers, patterns):
    config = {"target_modules": targets}
    config |= {"exclude_modules": excluded} if excluded else {}
    config |= {"layers_to_transform": layers} if layers else {}
    config |= {"layers_pattern": patterns} if layers and patterns else {}
    theirs = peft.LoraConfig(**config)
    meant = {m for m in KNOWN if check_target_module_exists(theirs, m) is True}
    assert (
        missing_module_misfits(config, meant, KNOWN) == surplus_module_misfits(config, meant) == []
    )
    for module in KNOWN:
        held = meant ^ {module}
        assert bool(missing_module_misfits(config, held, KNOWN)) == (module in meant)
        assert bool(surplus_module_misfits(config, held)) == (module not in meant)


@given(st.dictionaries(st.sampled_from(TAILS), st.integers(1, 99), max_size=6))
def test_patterns_match_as_in_peft(pattern):
    theirs = {m: pattern.get(get_pattern_key(pattern, m), 0) for m in KNOWN}
    assert values_by_module(pattern, KNOWN, 0) == theirs


# ---- time and memory -----------------------------------------------------------------------------


def worst(bits, first=0):
    """A header as long and as full as is allowed, 20 MB of numbers, and a config as long as is allowed.

    The numbers are given as the bits of bfloat16, and those of the first one apart.
    """
    modules = [f"model.layers.{n}.self_attn.a.b.c.d.e.f.q_proj" for n in range(MAX_TENSORS // 2)]
    described = {
        key(m, f): ("BF16", (2, 1224) if f == "A" else (1224, 2)) for m in modules for f in "AB"
    }
    data = file_of(described)
    end = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - end > 19 * 2**20
    numbers = np.frombuffer(data, np.uint8)[end:]
    numbers.view(np.uint16)[:] = bits
    numbers.view(np.uint16)[0] = first
    head = bytes(data[8:end])
    patterns = {f"layers.{n}.q_proj": 2 for n in range(900)}
    config = config_text(
        target_modules=["q_proj", *(f"m{n}" for n in range(1000))],
        exclude_modules=[f"x{n}" for n in range(800)],
        rank_pattern=patterns,
        alpha_pattern=patterns,
    )
    assert 48 * 2**10 < len(config) <= 64 * 2**10
    return config, bytearray(packed(head + b" " * (MAX_HEADER - len(head)), bytes(numbers)))


def garbage(text):
    return config_text(), bytearray(packed(text, bytes(20 * 2**20)))


WORST = {
    "honest": lambda: worst(0x3C00),
    "norms to be measured": lambda: worst(0x3F80, first=0x4180),
    "norms too large": lambda: worst(0x4480),
    "not finite": lambda: worst(0x7FC0),
    "one long name": lambda: garbage(b'{"' + b"a" * (MAX_HEADER - 10) + b'":1}'),
    "many lists": lambda: garbage(b'{"a":[' + b"[]," * 32_000 + b"[]]}"),
    "many numbers": lambda: garbage(b'{"a":[' + b"1," * 32_000 + b"1]}"),
    "many digits": lambda: garbage(b'{"a":0.' + b"1" * (MAX_HEADER - 10) + b"}"),
    "deep": lambda: garbage(b'{"a":' * (MAX_HEADER // 5)),
    "many objects": lambda: garbage(b'{"a":[' + b'{"b":1},' * 32_000 + b"1]}"),
    "other bytes than letters": lambda: garbage(b'{"' + "\U0001f600".encode() * 10**6 + b'":1}'),
    "wide letters": lambda: garbage(b'{"' + b"\\u00e9" * 600_000 + b'":1}'),
}


@pytest.mark.parametrize("case", WORST)
def test_the_worst_case_takes_little_time_and_memory(case):
    config, data = WORST[case]()

    def once():
        try:
            check_files("it", config, memoryview(data))
        except AdapterError as error:
            return str(error)
        return ""

    times = []
    for _ in range(3):
        begun = time.process_time()
        message = once()
        times.append(time.process_time() - begun)
    tracemalloc.start()
    try:
        assert once() == message
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (message == "") == (case in ("honest", "norms to be measured"))
    assert min(times) < 0.1 * BUSY
    assert peak < 100 * 2**20
