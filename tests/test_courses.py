"""Sweeps and shared adapters, from the call to what lies in the pool."""

import json

import pytest
import torch
from conftest import toy_answers, toy_task

from adapterhub_chat.errors import ConfigError
from adapterhub_chat.workshop import Listeners

QUICK = {"max_steps": 8, "rows_per_step": 1, "row_length": 64, "patience": 0, "test_examples": 0}


def test_a_sweep_keeps_the_best_on_validation(hub, tmp_path):
    tables = []
    found = hub.train(
        [toy_task(), toy_answers()],
        sweep={"answers": {"learning_rate": [1e-6, 1e-2], "rank": [2, 4]}},
        run_dir=tmp_path / "run",
        listeners=Listeners(on_sweep=tables.append),
        **QUICK,
    )
    assert list(found) == ["toy", "answers"]
    (table,) = tables
    assert [row.settings for row in table] == [
        {"learning_rate": rate, "rank": rank} for rate in (1e-6, 1e-2) for rank in (2, 4)
    ]
    best = min(table, key=lambda row: row.validation_loss)
    assert [row for row in table if row.kept] == [best]
    assert best.settings["learning_rate"] == 1e-2
    manifest = found["answers"]
    assert manifest.training.settings["rank"] == best.settings["rank"]
    assert manifest.training.validation_loss == best.validation_loss
    assert hub.pool.names() == ["answers", "toy"]
    kept = json.loads((tmp_path / "run" / "sweep.json").read_text())["candidates"]
    assert [row["kept"] for row in kept] == [row.kept for row in table]


def test_a_candidate_is_trained_as_if_it_were_alone(hub):
    hub.train([toy_answers()], sweep={"answers": {"learning_rate": [1e-6, 1e-2]}}, **QUICK)
    hub.train([toy_answers()], names=["alone"], learning_rate=1e-2, **QUICK)
    swept, alone = (hub.model.weights(name) for name in ("answers", "alone"))
    for module, pair in alone.factors.items():
        for mine, its in zip(swept.factors[module], pair, strict=True):
            torch.testing.assert_close(mine, its, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "misfit"),
    [
        ({"sweep": {"nobody": {"rank": [2]}}}, "sweep of 'nobody', but this run trains toy"),
        ({"sweep": {"toy": {"row_length": [64, 96]}}}, "row_length must be the same for all"),
        ({"sweep": {"toy": {"rank": [2]}}, "how": "sequence"}, "a sweep trains jointly"),
        ({"sweep": {"toy": {"rank": [2]}}, "eval_examples": 0}, "leaves nothing to choose by"),
        ({"how": "shared", "shared_name": "toy"}, "'toy' is the name of a task's adapter"),
        ({"resume": True}, "resume needs the run's folder"),
    ],
)
def test_what_cannot_be_a_run_is_said_before_it_starts(hub, options, misfit):
    with pytest.raises(ConfigError, match=misfit):
        hub.train([toy_task()], **{**QUICK, **options})
    assert hub.pool.names() == []


def test_shared_and_task_adapters_end_as_plain_adapters(hub):
    found = hub.train(
        [toy_task(), toy_answers()], how="shared", **{**QUICK, "test_examples": 4, "max_steps": 20}
    )
    assert list(found) == ["shared", "toy", "answers"]
    common = found["shared"]
    assert common.training.tasks == ("toy", "answers")
    assert set(common.training.conflict) == {"toy|answers"}
    assert {s.task for s in common.scores} == {"toy", "answers"}
    assert found["toy"].training.beside == ("answers", "shared")
    assert hub.model.weights("toy").max_rank == 16
    for name in found:
        assert hub.verify(name).status == "exact"
        assert found[name].training.how == "shared"
