"""Learning is as good as the reference, in miniature: joint training here against `peft` alone."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import toy_answers, toy_talk, toy_task

from adapterhub_chat.artifact.folder import read_folder
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.training.job import make_job
from adapterhub_chat.training.loop import train

TOLERANCE = 1e-4
"""Of the adapter's norm, in fp32: packed and padded rows add up in another order, and Adam's first steps
blow up the rounding of gradients near zero."""


def load_script():
    path = Path(__file__).parents[2] / "scripts" / "compare_peft.py"
    spec = importlib.util.spec_from_file_location("compare_peft", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_peft"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def settings(**changes):
    values = {
        "rank": 4,
        "learning_rate": 1e-2,
        "rows_per_step": 2,
        "row_length": 96,
        "max_steps": 6,
        "epochs": 1e6,
        "eval_examples": 0,
        "seed": 3,
        "clip": 5.7,  # some of the steps are above it
    }
    return TrainConfig.model_validate({**values, **changes})


def toys():
    return [toy_answers(), toy_talk(), toy_task()]


@pytest.fixture(scope="module")
def comparison(pico_folder):
    return script.compare(str(pico_folder), toys(), settings(), test_examples=8, dtype="fp32")


def test_three_adapters_trained_jointly_here_equal_three_trained_by_peft(comparison):
    assert [row.task for row in comparison.rows] == ["answers", "talk", "toy"]
    for row in comparison.rows:
        assert row.weights_difference < TOLERANCE, row.task
        assert row.largest_difference < 20 * TOLERANCE, row.task


def test_equal_adapters_get_equal_scores(comparison):
    for row in comparison.rows:
        assert row.here.value == pytest.approx(row.peft.value, rel=1e-3), row.task
        assert row.difference.low <= row.difference.value <= row.difference.high
        assert row.verdict == "within 1 point"
    assert comparison.ok


def test_training_moved_the_adapters(comparison):
    talk = next(row for row in comparison.rows if row.task == "talk")
    assert talk.here.value < 0.95 * talk.backbone  # a perplexity


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 9e-3},
        {"clip": 0.01},
        {"schedule": "constant"},
        {"seed": 4},
        {"alpha": 8.0},
    ],
    ids=str,
)
def test_the_comparison_sees_a_loop_that_differs_in_one_setting(hub, backbone, tmp_path, change):
    task = toy_talk()
    job = make_job(backbone.tokenizer, "talk", task, settings())
    here = train(hub.model, [job])["talk"].weights
    other = replace(job, config=settings(**change))
    script.train_with_peft(
        backbone, other, script.first_weights(hub, settings()), tmp_path / "peft"
    )
    theirs, *_ = read_folder(tmp_path / "peft")
    assert script.differences(here, theirs)[0] > 10 * TOLERANCE


def test_differences_over_all_numbers_and_of_the_worst_factor(make_weights):
    one = make_weights(rank=2, only=("q_proj",))
    (name, (a, b)), *others = one.factors.items()
    other = one.with_factors({**dict(others), name: (a, b * 1.5)})
    whole, worst = script.differences(other, one)
    assert script.differences(one, one) == (0, 0)
    assert worst == pytest.approx(0.5)
    assert 0 < whole < worst


def test_peft_gives_the_plain_model_back(hub, backbone, tmp_path):
    job = make_job(backbone.tokenizer, "talk", toy_talk(), settings(max_steps=1))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    script.train_with_peft(backbone, job, script.first_weights(hub, settings()), tmp_path / "peft")
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_answer_tokens_are_labelled():
    batch = script.padded([Encoded((5, 6, 7), ((8, 2),)), Encoded((5,), ((9,),))], pad=0)
    spare = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    assert all(not (batch[name][:, 5:] != value).any() for name, value in spare.items())
    assert {tensor.shape[1] for tensor in batch.values()} == {16}  # few widths, few shapes
    assert batch["input_ids"][:, :5].tolist() == [[5, 6, 7, 8, 2], [5, 9, 0, 0, 0]]
    assert batch["attention_mask"][:, :5].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    labels = batch["labels"][:, :5].tolist()
    assert labels == [[-100, -100, -100, 8, 2], [-100, 9, -100, -100, -100]]


def test_the_last_label_is_the_end_of_the_turn(backbone):
    job = make_job(backbone.tokenizer, "toy", toy_task(), settings())
    for labels in script.padded(job.train, pad=0)["labels"]:
        assert labels[labels != -100][-1] == backbone.tokenizer.eos_token_id


def rows_of(hits):
    return np.array([[1.0, float(hit)] for hit in hits])


@pytest.mark.parametrize(
    ("here", "peft", "verdict"),
    [
        ([1] * 90 + [0] * 10, [1] * 90 + [0] * 10, "within 1 point"),
        ([1] * 90 + [0] * 10, [0] * 3 + [1] * 88 + [0] * 9, "inside the interval"),
        ([1] * 50 + [0] * 50, [1] * 90 + [0] * 10, "apart"),
        ([1] * 97 + [0] * 3, [1] * 90 + [0] * 10, "apart"),
    ],
)
def test_verdict(here, peft, verdict):
    bare = rows_of([0] * 100)
    row = script.row_of(toy_task(), bare, rows_of(here), rows_of(peft), (0.0, 0.0), 0.0)
    assert row.verdict == verdict
    assert row.backbone == 0
    assert row.difference.value == pytest.approx(np.mean(here) - np.mean(peft))


def test_the_interval_of_the_difference_is_paired():
    hits = [1, 0] * 50
    row = script.row_of(toy_task(), rows_of(hits), rows_of(hits), rows_of(hits), (0.0, 0.0), 0.0)
    assert (row.difference.low, row.difference.high) == (0, 0)
    assert row.here.low < row.here.value < row.here.high


def test_a_point_of_perplexity_is_a_hundredth_of_it():
    def losses(value):
        return np.array([[value, 1.0]] * 50)

    bare = losses(4.0)
    near = script.row_of(toy_talk(), bare, losses(3.0), losses(3.009), (0.0, 0.0), 0.0)
    far = script.row_of(toy_talk(), bare, losses(3.0), losses(3.02), (0.0, 0.0), 0.0)
    assert (near.verdict, far.verdict) == ("within 1 point", "apart")


@pytest.fixture
def ticket_task(tmp_path):
    rows = "\n".join(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(80))
    (tmp_path / "films.csv").write_text(f"text,label\n{rows}\n")
    path = tmp_path / "films.toml"
    path.write_text(
        'metric = "accuracy"\n[data]\npath = "films.csv"\n[columns]\ntext = "text"\n'
        'answer = "label"\n[labels]\n0 = "negative"\n1 = "positive"\n'
    )
    return path


def test_the_command_prints_json(pico_folder, ticket_task, capsys):
    arguments = ["--tasks", str(ticket_task), "--backbone", str(pico_folder), "--steps", "2"]
    code = script.main([*arguments, "--dtype", "fp32", "--rows", "1", "--rank", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["ok"] is True
    assert found["dtype"] == "float32"
    assert found["settings"]["max_steps"] == 2
    assert found["settings"]["rank"] == 2
    (row,) = found["rows"]
    assert row["task"] == "films"
    assert row["weights_difference"] < TOLERANCE
    assert set(row["here"]) == {"value", "low", "high"}


def test_the_command_prints_a_table(pico_folder, ticket_task, capsys):
    arguments = ["--tasks", str(ticket_task), "--backbone", str(pico_folder), "--steps", "1"]
    script.main([*arguments, "--dtype", "fp32"])
    printed = capsys.readouterr().out
    assert "films" in printed
    assert "with PEFT" in printed
