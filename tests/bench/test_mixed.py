"""`bench mixed` on a pico model: every way decodes every case, and the ratios are there."""

import json
from shutil import which

import pytest

from adapterhub_chat.bench import mixed as mixed_bench
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone


@pytest.mark.slow
def test_the_table_has_every_way_and_ratio(pico_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ADAPTERHUB_PEERS", raising=False)
    cases = ((1, 0), (16, 0), (16, 8))
    found = mixed_bench.bench_mixed(
        backbone=str(pico_folder), rank=4, tokens=3, repeats=1, cases=cases
    )
    assert {(row["kind"], row["rows"], row["adapters"]) for row in found["rows"]} == {
        *(("here", rows, adapters) for rows, adapters in cases),
        *((kind, 16, adapters) for kind in mixed_bench.VARIANT_RANKS for adapters in (0, 8)),
        ("generate", 1, 0),
        ("generate", 16, 0),
        ("peft", 16, 8),
    }
    ratios = found["ratios"]
    assert ratios["mixed8_over_vllm"] is None
    assert ratios["mixed32_over_backbone"] is None
    assert ratios["mixed8_over_peft"] > 0
    assert ratios["single_over_generate"] > 0
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.skipif(not which("c++"), reason="needs a C++ compiler")
def test_recorded_steps_are_a_kind_of_their_own(pico_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ADAPTERHUB_PEERS", raising=False)
    monkeypatch.setattr(mixed_bench, "VARIANT_RANKS", {})
    monkeypatch.setattr(mixed_bench.importlib.util, "find_spec", lambda _name: None)
    found = mixed_bench.bench_mixed(
        backbone=str(pico_folder), rank=4, tokens=3, repeats=1, cases=((16, 8),), graphs=True
    )
    assert {row["kind"] for row in found["rows"]} == {"here", "graphs"}
    assert found["ratios"]["graphs8_over_mixed8"] > 0


def test_a_random_adapter_has_a_nonzero_update(pico_folder):
    backbone = load_backbone(str(pico_folder), dtype="fp32", device="cpu")
    model = AdapterModel(backbone)
    weights = mixed_bench.random_adapter(model, 4, 0)
    assert all(b.abs().sum() > 0 for _, b in weights.factors.values())
    assert mixed_bench.prompts_of(backbone, 3).equal(mixed_bench.prompts_of(backbone, 3))
