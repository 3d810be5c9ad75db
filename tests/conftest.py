"""Fixtures of all tests: pico models saved once a session, and hubs over them."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there: tests name their Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
from hypothesis import settings
from pico import (
    encoder_tokenizer,
    pico_encoder,
    pico_model,
    pico_tokenizer,
    random_weights,
)

from adapterhub_chat import AdapterHub, api
from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.cli.app import main
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone

settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory):
    """A model folder that plain transformers loads."""
    folder = tmp_path_factory.mktemp("pico")
    pico_model().save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    """The same shapes and tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("other")
    pico_model(seed=1).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["first", "mean"])
def encoder_folder(request, tmp_path_factory):
    """A BERT folder that plain transformers loads, with a pooling layer and without."""
    folder = tmp_path_factory.mktemp(f"encoder-{request.param}")
    tokenizer = encoder_tokenizer()
    pico_encoder(tokenizer, request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """The product's cache folder is the session's own; downloaded assets are those of the user's cache."""
    users, folder = cache_dir(), tmp_path_factory.mktemp("cache")
    for name in ("assets", "downloads", "dequantized", "native"):
        (users / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(users / name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPTERHUB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def loaded_once():
    """A small folder is read once a session, for as long as its files stay; every hub has a copy of its own.

    Modules that import `load_backbone` themselves have the real one.
    """
    kept = {}

    def load(name, *, dtype=None, device=None, quantize=None):
        folder = Path(name)
        if quantize is not None or not folder.is_dir():
            return load_backbone(name, dtype=dtype, device=device, quantize=quantize)
        files = ((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir())
        key = (name, str(dtype), str(device), *sorted(files))
        if key not in kept:
            kept[key] = load_backbone(name, dtype=dtype, device=device)
        found = kept[key]
        return replace(
            found,
            model=copy.deepcopy(found.model),
            tokenizer=copy.deepcopy(found.tokenizer),
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(api, "load_backbone", load)
        yield load


@pytest.fixture
def encoder_hub(encoder_folder, tmp_path):
    return AdapterHub(str(encoder_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.fixture
def backbone(pico_folder, loaded_once):
    return loaded_once(str(pico_folder), dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def pico_shapes(pico_folder):
    """The shapes of the pico model's linear layers, by name."""
    return AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cpu")).shapes


@pytest.fixture
def model(backbone):
    return AdapterModel(backbone)


@pytest.fixture
def hub(pico_folder, tmp_path):
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.fixture
def online(monkeypatch):
    """The Hub's client may make requests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub_server(online, tmp_path):
    """A real Hub on the loopback address, for the real client; alice and bob have tokens."""
    from hub_server import HubServer  # here, since most tests need no web server

    with HubServer(tmp_path / "hub", {"alice": "hf_alice", "bob": "hf_bob"}) as server:
        yield server


@dataclass
class Result:
    """What a verb of the command line has done."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run_verb(monkeypatch, capsys, pico_folder):
    """run_verb("verb", "--flag", ..., stdin="...") -> Result, in this process, on the pico backbone."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "200")

    def run(verb, *args, stdin=b"", backbone=True):
        words = [verb, *map(str, args)]
        if backbone:
            words += ["--backbone", str(pico_folder), "--dtype", "fp32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["adapterhub-chat", *words])
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def make_weights(pico_shapes):
    """make_weights(rank=4, seed=1, alpha=8, only=("q_proj",)) -> random AdapterWeights that matter."""

    def make(**changed):
        return random_weights(pico_shapes, **changed)

    return make
