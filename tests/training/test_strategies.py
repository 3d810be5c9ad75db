"""Sweeps and shared adapters, from the call to the saved adapters."""

import json
import math
from dataclasses import replace

import pytest
import torch
from pico import toy_answers, toy_task, write_task

from adapterhub_chat import AdapterHub
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import mixture
from adapterhub_chat.errors import ConfigError
from adapterhub_chat.events import Listeners
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.strategies import _sort_key

QUICK = {"max_steps": 8, "rows_per_step": 1, "row_length": 64, "patience": 0, "test_examples": 0}


def test_a_sweep_keeps_the_best_on_validation(hub, tmp_path):
    tables = []
    manifests = hub.train(
        [toy_task(), toy_answers()],
        sweep={"answers": {"learning_rate": [1e-6, 1e-2], "rank": [2, 4]}},
        run_dir=tmp_path / "run",
        listeners=Listeners(on_sweep=tables.append),
        **QUICK,
    )
    assert list(manifests) == ["toy", "answers"]
    (table,) = tables
    assert [row.settings for row in table] == [
        {"learning_rate": rate, "rank": rank} for rate in (1e-6, 1e-2) for rank in (2, 4)
    ]
    best = min(table, key=lambda row: row.validation_loss)
    assert [row for row in table if row.kept] == [best]
    assert best.settings["learning_rate"] == 1e-2
    manifest = manifests["answers"]
    assert manifest.training.settings["rank"] == best.settings["rank"]
    assert manifest.training.validation_loss == best.validation_loss
    assert hub.pool.names() == ["answers", "toy"]
    saved = json.loads((tmp_path / "run" / "sweep.json").read_text())["candidates"]
    assert [row["kept"] for row in saved] == [row.kept for row in table]


def test_a_sweep_candidate_is_trained_as_if_alone(hub):
    hub.train([toy_answers()], sweep={"answers": {"learning_rate": [1e-6, 1e-2]}}, **QUICK)
    hub.train([toy_answers()], names=["alone"], learning_rate=1e-2, **QUICK)
    swept, alone = (hub.model.weights(name) for name in ("answers", "alone"))
    for module, pair in alone.factors.items():
        for factor, expected in zip(swept.factors[module], pair, strict=True):
            torch.testing.assert_close(factor, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "misfit"),
    [
        ({"sweep": {"nobody": {"rank": [2]}}}, "sweep of 'nobody', but this run trains toy"),
        ({"sweep": {"toy": {"row_length": [64, 96]}}}, "row_length must be the same for all"),
        ({"sweep": {"toy": {"rank": [2]}}, "how": "sequence"}, "a sweep trains jointly"),
        ({"sweep": {"toy": {"rank": [2]}}, "eval_examples": 0}, "leaves nothing to choose by"),
        ({"how": "shared", "shared_name": "toy"}, "'toy' is the name of a task's adapter"),
        ({"resume": True}, "resume needs the run's folder"),
        ({"sweep": {"toy": {"rnak": [2]}}}, "rnak: no such key"),
        ({"sweep": {"toy": {"rank": 2}}}, "needs a list of values"),
        ({"sweep": {"toy": {"rank": [4, 4]}}}, "a value is given twice"),
        ({"layers": "9:"}, "toy: layers='9:' names no block"),
        ({"targets": ","}, "toy: targets=',': the backbone needs a name"),
        ({"grow": True}, "grow needs how='sequence'"),
        ({"replay": 0.5}, "replay needs"),
        ({"orthogonal": 1.0}, "orthogonal needs"),
        ({"temperature": 2.0}, "temperature needs how='shared'"),
        ({"shard": True}, "start several with torchrun"),
    ],
)
def test_an_invalid_run_is_refused_before_it_starts(hub, options, misfit):
    with pytest.raises(ConfigError, match=misfit):
        hub.train([toy_task()], **{**QUICK, **options})
    assert hub.pool.names() == []


def test_shared_and_task_adapters_are_saved_as_plain_adapters(hub):
    manifests = hub.train(
        [toy_task(), toy_answers()], how="shared", **{**QUICK, "test_examples": 4, "max_steps": 20}
    )
    assert list(manifests) == ["shared", "toy", "answers"]
    shared = manifests["shared"]
    assert shared.training.tasks == ("toy", "answers")
    assert set(shared.training.conflict) == {"toy|answers"}
    assert {s.task for s in shared.scores} == {"toy", "answers"}
    assert manifests["toy"].training.beside == ("answers", "shared")
    assert hub.model.weights("toy").max_rank == 16
    for name in manifests:
        assert hub.verify(name).status == "exact"
        assert manifests[name].training.how == "shared"


def test_settings_of_the_schedule_must_be_equal_with_how_shared(hub):
    settings = {"answers": {"max_steps": 3}}
    with pytest.raises(ConfigError, match=r"max_steps must be the same for all that share"):
        hub.train([toy_task(), toy_answers()], how="shared", settings=settings, **QUICK)
    assert hub.pool.names() == []


def test_small_temperatures_and_large_seeds_work(hub):
    settings = {**QUICK, "temperature": 0.01, "seed": 2**62, "max_steps": 2}
    assert len(hub.train([toy_task(), toy_answers()], how="shared", **settings)) == 3


def test_a_task_without_test_examples_is_refused_before_training(hub):
    task = toy_task()
    untested = replace(task, load=lambda: Splits({**task.load().parts, "test": ()}))
    with pytest.raises(ConfigError, match="toy: its task has no test examples"):
        hub.train([untested], **{**QUICK, "test_examples": 5})
    assert hub.pool.names() == []


def test_the_folder_of_an_unfinished_run_is_refused(hub, tmp_path):
    state = tmp_path / "state" / "run"
    state.mkdir(parents=True)
    (state / "state-000001.safetensors").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match="a run that has not finished: resume it, or name another"
    ):
        hub.train([toy_task()], run_dir=tmp_path, **QUICK)
    assert (state / "state-000001.safetensors").exists()


def test_a_candidate_without_a_finite_loss_is_not_chosen():
    weights = AdapterWeights({}, {})
    unknown = Trained(weights, 3, 3, math.nan, 9, 1.0, "interrupted")
    known = Trained(weights, 3, 3, 2.0, 9, 1.0, "interrupted")
    nothing = Trained(weights, 0, 0, math.inf, 0, 1.0, "diverged")
    assert min((nothing, unknown, known), key=_sort_key) is known


def test_a_stage_that_learnt_nothing_has_empty_cells_in_the_ledger(hub):
    ledgers = []
    with pytest.warns(UserWarning, match="'answers' is not saved"):
        hub.train(
            [toy_task(), toy_answers(), toy_task("third")],
            how="sequence",
            settings={"answers": {"learning_rate": 1e30, "clip": 1e30, "warmup": 0.0}},
            listeners=Listeners(on_ledger=ledgers.append),
            **{**QUICK, "test_examples": 4},
        )
    matrix = ledgers[-1].matrix
    assert len(matrix) == 3
    assert [value is None for value in matrix[2]] == [False, True, False]


def test_the_adapter_of_a_mixture_is_measured_on_each_task(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    tasks = [toy_task("films"), toy_task("plays", size=50)]
    for task in tasks:
        write_task(tmp_path / "tasks", task.name, task)
    manifests = hub.train([mixture("both", tasks)], **QUICK)
    assert manifests["both"].training.tasks == ("films", "plays")
    assert {s.task for s in hub.evaluate(["both"], limit=4)} == {"films", "plays"}


def test_a_4_bit_adapter_is_also_measured_on_the_unquantized_backbone(pico_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = AdapterHub(
        str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu", quantize="nf4"
    )
    options = {**QUICK, "max_steps": 20, "learning_rate": 1e-2, "test_examples": 8}
    manifest = quantized.train([toy_task()], **options)["toy"]
    assert manifest.fingerprint.quantization == "nf4"
    assert [(s.precision, s.n) for s in manifest.scores] == [("nf4", 8), ("float32", 8)]
    record = manifest.training
    assert 0 < record.backbone_bytes < AdapterHub(str(pico_folder), dtype="fp32").backbone.nbytes
    assert record.peak_bytes > record.backbone_bytes
    plain = AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")
    with pytest.warns(UserWarning, match="'toy' is compatible"):
        (score,) = plain.evaluate(["toy"], [toy_task()], limit=8)
    assert score == manifest.scores[1]
    assert "float32" in (tmp_path / "pool" / "toy" / "README.md").read_text()
