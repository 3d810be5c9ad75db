"""`bench pool` on a pico model: both ways answer alike, the small one within its budget."""

import json
from collections import Counter

import pytest

from adapterhub_chat.bench import pool as pool_bench


@pytest.mark.slow
def test_the_table_has_every_ratio(pico_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = pool_bench.bench_pool(
        backbone=str(pico_folder),
        rank=8,
        adapters=12,
        budget=3,
        requests=12,
        rows=2,
        tokens=4,
        repeats=1,
    )
    assert set(found["ratios"]) == {
        "uniform_over_resident",
        "zipf_over_resident",
        "memory_over_budget",
    }
    loads = {(row["kind"], row["traffic"]): row["loads"] for row in found["rows"]}
    assert loads["resident", "uniform"] == loads["resident", "zipf"] == 0
    assert loads["budget", "uniform"] > 3
    json.dumps(found)


@pytest.mark.parametrize(("traffic", "share"), [("uniform", 1 / 50), ("zipf", 1 / 4.5)])
def test_traffic(traffic, share):
    names = pool_bench.draw(traffic, 50, 4000, seed=1)
    assert Counter(names)["a0"] / 4000 == pytest.approx(share, rel=0.3)
    assert names == pool_bench.draw(traffic, 50, 4000, seed=1)
