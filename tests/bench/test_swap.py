"""`bench swap` on a pico model: loads and switches are timed, the pool is asked for what it holds."""

import json

import pytest

from adapterhub_chat.bench import swap as swap_bench
from adapterhub_chat.errors import AdapterHubError
from adapterhub_chat.pool.pool import Pool


@pytest.fixture
def settings(pico_folder, tmp_path):
    given = {"backbone": str(pico_folder), "rank": 4, "adapters": 3, "switches": 7}
    return {**given, "pool": str(tmp_path / "pool")}


@pytest.mark.slow
def test_the_table_has_every_number(pico_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = swap_bench.bench_swap(
        backbone=str(pico_folder), rank=4, adapters=6, switches=9, peft_every=2, repeats=2
    )
    assert found["bench"] == "swap"
    rows = {row["kind"]: row for row in found["rows"]}
    assert {kind: row["times"] for kind, row in rows.items()} == {
        "cached": 6,
        "disk": 6,
        "disk, read only": 6,
        "peft, cached": 6,
        "peft, disk": 6,
        "resident": 18,
    }
    assert rows["cached"]["parameters"] > 0
    assert set(found["ratios"]) == {
        "resident_ms",
        "cold_ms",
        "cold_read_ms",
        "cold_peft_ms",
        "cached_ms",
        "cached_peft_ms",
        "cached_last_over_first",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values())
    assert all(row["ms"] <= row["worst_ms"] for row in rows.values())
    json.dumps(found)


@pytest.mark.slow
def test_without_peft_its_number_is_null(pico_folder, monkeypatch):
    monkeypatch.setattr(swap_bench.importlib.util, "find_spec", lambda _name: None)
    found = swap_bench.bench_swap(backbone=str(pico_folder), rank=4, adapters=2, switches=1)
    assert found["ratios"]["cold_peft_ms"] is found["ratios"]["cached_peft_ms"] is None


def test_adapters_differ_and_their_probes_are_answered(settings):
    told = swap_bench.save_adapters(settings)
    pool = Pool(settings["pool"])
    manifests = [pool.manifest(name) for name in pool.names()]
    assert len({m.sha256 for m in manifests}) == len(pool.answered_probes()) == 3
    assert all(m.probe.shift > 0 for m in manifests)
    assert told["parameters"] == pool.load("a0").weights.num_parameters


@pytest.mark.slow
def test_the_bytes_are_those_of_the_dtype(pico_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"backbone": str(pico_folder), "rank": 4, "adapters": 2, "switches": 1}
    sizes = {}
    for dtype in ("bf16", "fp32"):
        (row, *_) = swap_bench.bench_swap(**settings, dtype=dtype)["rows"]
        sizes[dtype] = row["itemsize"]
    assert sizes == {"bf16": 2, "fp32": 4}
    with pytest.raises(AdapterHubError, match="int3"):
        swap_bench.bench_swap(**settings, dtype="int3")


def test_both_kinds_load_the_named_adapter(settings):
    swap_bench.save_adapters(settings)
    for make in swap_bench.SWAP_WORKERS.values():
        assert make(settings)("a1")["seconds"] > 0


def test_a_switch_is_timed_so_many_times(settings):
    swap_bench.save_adapters(settings)
    told = swap_bench.hub_loader(settings)
    told("a0")
    assert len(told("switch")["seconds"]) == 7


def test_ends_are_the_first_and_the_last_loads():
    assert swap_bench._first_and_last([1.0] * 10 + [9.0] * 30 + [2.0] * 10) == (1.0, 2.0)
    assert swap_bench._first_and_last([1.0, 3.0]) == (2.0, 2.0)
