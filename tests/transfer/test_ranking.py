"""Ranking sources before training: the estimates by their definitions, a good source above a bad one."""

import json
import math
import random
import shutil

import pytest
import torch
from pico import toy_answers, toy_task

from adapterhub_chat import AdapterHub
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, DataError, UsageError
from adapterhub_chat.transfer.ranking import _evidence, a_distance, leep, logme, rank
from adapterhub_chat.types import Example, as_mix

TASK = """
metric = "accuracy"
[data]
path = "good.csv"
[columns]
text = "text"
answer = "label"
[labels]
good = "good"
bad = "bad"
"""


def normal(wanted, states, alpha, beta):
    """The log density of `wanted`, per number, with weights of precision alpha and noise of beta."""
    covariance = states @ states.T / alpha + torch.eye(len(wanted)).double() / beta
    at = torch.distributions.MultivariateNormal(torch.zeros(len(wanted)).double(), covariance)
    return float(at.log_prob(wanted)) / len(wanted)


def test_the_evidence_matches_the_linear_model_at_its_maximum():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(30, 5, generator=generator).double()
    wanted = (states[:, 0] + 0.5 * torch.randn(30, generator=generator) > 0).double()
    left, spread, _ = torch.linalg.svd(states, full_matrices=False)
    evidence, alpha, beta = _evidence(left, spread.square(), wanted)
    assert evidence == pytest.approx(normal(wanted, states, alpha, beta), abs=1e-6)
    for factor in (0.5, 2.0):
        assert normal(wanted, states, alpha * factor, beta) < evidence + 1e-6
        assert normal(wanted, states, alpha, beta * factor) < evidence + 1e-6


def test_informative_features_have_a_higher_logme():
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(2, (80,), generator=generator)
    noise = torch.randn(80, 100, generator=generator)  # more features than examples
    telling = noise.clone()
    telling[:, 0] = answers * 4.0
    assert logme(telling, answers) > logme(noise, answers)
    with pytest.raises(DataError, match="not finite"):
        logme(noise * torch.nan, answers)


def test_leep_of_a_perfect_and_of_an_uninformative_source():
    answers = torch.tensor([0, 1] * 10)
    sure = torch.nn.functional.one_hot(answers).float()
    assert leep(sure, answers) == pytest.approx(0, abs=1e-6)
    assert leep(sure.flip(1), answers) == pytest.approx(0, abs=1e-6)  # wrong, but always so
    assert leep(torch.full((20, 2), 0.5), answers) == pytest.approx(-math.log(2))


def test_the_a_distance_is_zero_for_one_domain_and_two_for_separate_ones():
    generator = torch.Generator().manual_seed(2)
    one, same, other = (torch.randn(80, 200, generator=generator) for _ in range(3))
    other[:, 3] += 8
    assert a_distance(one, same) < 0.5
    assert a_distance(one, other) > 1.7
    nearer = other.clone()
    nearer[:, 3] -= 6.5
    assert a_distance(one, same) <= a_distance(one, nearer) <= a_distance(one, other)
    shifted = one[:40] * 1e-3 + 5, other[:60] * 1e-3 + 5  # neither place nor size matters
    assert a_distance(*shifted) == pytest.approx(a_distance(one[:40], other[:60]), abs=0.1)
    assert a_distance(one, one[:0]) == 2  # one kind alone is always told rightly


def shuffled(task, seed=0):
    """The task with its labels drawn anew: nothing can be learnt from it."""
    draw = random.Random(seed)
    parts = {
        split: tuple(Example(e.fields, draw.choice(["good", "bad"])) for e in task.split(split))
        for split in ("train", "validation", "test")
    }
    return Task(task.name, task.contract, task.metric, lambda: Splits(parts))


@pytest.fixture(scope="module")
def prepared(pico_folder, tmp_path_factory):
    """A pool with an adapter that learnt, and one whose labels were shuffled."""
    root = tmp_path_factory.mktemp("ranked") / "pool"
    hub = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
    how = {"max_steps": 40, "epochs": 99, "rows_per_step": 1, "learning_rate": 0.02, "patience": 0}
    tasks = [toy_task("good"), shuffled(toy_task("lost"))]
    hub.train(tasks, names=["good", "lost"], **how)
    return root


@pytest.fixture
def taught(prepared, pico_folder, tmp_path):
    """A hub over a pool of its own with the two."""
    shutil.copytree(prepared, tmp_path / "pool")
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


def test_a_good_source_ranks_above_one_that_learnt_shuffled_labels(taught):
    ranked = taught.rank_sources(toy_task("target"))
    assert [one.adapter for one in ranked] == ["good", "lost"]
    assert ranked[0].leep > ranked[1].leep
    only = taught.rank_sources(toy_task("target"), ["lost"], limit=20)
    assert [one.adapter for one in only] == ["lost"]
    assert json.dumps(only[0].logme) != "NaN"
    assert only[0].distance is None  # its task is none that has a name here


def test_a_source_whose_task_can_be_loaded_has_a_distance(taught, tmp_path, monkeypatch):
    """A manifest names its task; the task's file is looked for by that name."""
    (tmp_path / "tasks").mkdir()
    rows = [f"{e.fields['text']},{e.answer}" for e in toy_task("good").split("train")]
    (tmp_path / "tasks" / "good.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "tasks" / "good.toml").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    found = {one.adapter: one.distance for one in taught.rank_sources(toy_task("target"))}
    assert found["lost"] is None
    assert found["good"] < 0.7  # the target's texts are of the same kind


def test_an_adapter_that_cannot_be_loaded_is_not_ranked(taught):
    (taught.pool.root / "lost" / "adapter_model.safetensors").write_bytes(b"?")
    with pytest.warns(UserWarning, match="lost is left out: "):
        assert [one.adapter for one in taught.rank_sources(toy_task("target"))] == ["good"]
    with pytest.raises(AdapterError):
        taught.rank_sources(toy_task("target"), ["lost"])


def test_a_table_is_refused_as_a_target(taught, tmp_path):
    with pytest.raises(UsageError, match=r"a \.toml file beside it makes it one"):
        taught.rank_sources(tmp_path / "tweets.csv")


def test_targets_without_two_labels_are_refused(model):
    task = toy_task()
    for target, examples in (
        (task, [e for e in task.split("train") if e.answer == "bad"]),
        (task, []),
    ):
        with pytest.raises(DataError, match="two labels or more"):
            rank(model, target, examples, [("backbone", as_mix(None))])
    answers = toy_answers()
    with pytest.raises(DataError, match="answers has free answers"):
        rank(model, answers, answers.split("train"), [("backbone", as_mix(None))])
