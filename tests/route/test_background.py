"""Background texts: sampled once a backbone, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.route.background import (
    background_texts,
    cache_file,
    sample_background,
)

COUNT = 12


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))


def test_background_samples_are_deterministic(model, make_weights):
    texts = sample_background(model, 12)
    assert len(set(texts)) > 6
    assert sample_background(model, 12) == texts
    model.load("a", make_weights())
    assert sample_background(model, 12) == texts  # no adapter takes part


def test_second_call_reads_the_cache(model):
    texts = background_texts(model, COUNT)
    assert texts == sample_background(model, COUNT)
    (file,) = (cache_dir() / "background").iterdir()
    assert file == cache_file(model.backbone, COUNT)
    before = file.stat()
    assert background_texts(model, COUNT) == texts
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_intact_file_is_not_sampled_again(model):
    texts = ["one", "two"]
    file = cache_file(model.backbone, COUNT)
    file.parent.mkdir(parents=True)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": digest, "texts": texts}))
    assert background_texts(model, COUNT) == texts


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: "",
        lambda stored: "{",
        lambda stored: "[" * 100_000,
        lambda stored: "[]",
        lambda stored: json.dumps({"texts": stored["texts"]}),
        lambda stored: json.dumps({**stored, "texts": []}),
        lambda stored: json.dumps({**stored, "texts": 3}),
        lambda stored: json.dumps({**stored, "texts": stored["texts"][1:]}),
        lambda stored: json.dumps({**stored, "texts": ["x", *stored["texts"][1:]]}),
    ],
)
def test_damaged_file_is_made_anew(model, damage):
    texts = background_texts(model, COUNT)
    file = cache_file(model.backbone, COUNT)
    intact = file.read_bytes()
    file.write_text(damage(json.loads(intact)))
    assert background_texts(model, COUNT) == texts
    assert file.read_bytes() == intact


def test_file_that_is_not_text_is_made_anew(model):
    file = cache_file(model.backbone, COUNT)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\x00")
    assert len(background_texts(model, COUNT)) > COUNT // 2
    assert json.loads(file.read_text())["texts"]


def test_backbones_and_precisions_do_not_share_a_file(model, other_folder, loaded_once):
    other = AdapterModel(loaded_once(str(other_folder), dtype="fp32", device="cpu"))
    assert background_texts(model, COUNT) != background_texts(other, COUNT)
    backbones = (model.backbone, other.backbone, replace(model.backbone, quantize="nf4"))
    assert len({cache_file(backbone, COUNT) for backbone in backbones}) == 3
    assert cache_file(model.backbone, COUNT + 1) != cache_file(model.backbone, COUNT)


def test_unwritable_cache_is_a_warning(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert background_texts(model, COUNT)
