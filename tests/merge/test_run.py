"""hub.merge end to end: what is saved, checked, measured and reported; PEFT reads the result."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from pico import toy_answers, toy_talk, toy_task
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.card import render_card
from adapterhub_chat.artifact.folder import read_folder
from adapterhub_chat.artifact.manifest import Manifest, MergeReport, Training
from adapterhub_chat.data.metrics import METRICS, answer_rows, label_rows, likelihood_rows
from adapterhub_chat.data.splits import Splits, sample
from adapterhub_chat.errors import AdapterError, ConfigError, UnknownNameError, UsageError
from adapterhub_chat.evaluation.retention import kept_fraction
from adapterhub_chat.evaluation.scoring import judge
from adapterhub_chat.events import Listeners
from adapterhub_chat.files import file_sha256
from adapterhub_chat.merge.combine import merge
from adapterhub_chat.merge.methods import METHODS, weighted_sum
from adapterhub_chat.types import SPLITS, as_mix

TASKS = {"films": toy_task, "answers": toy_answers, "talk": toy_talk}
PROMPTS = ["Hello film", "bad bad plot"]


@pytest.fixture(scope="module")
def trained(pico_folder, tmp_path_factory):
    """A pool with three adapters of unlike ranks and modules, each trained a little on its toy task."""
    pool = tmp_path_factory.mktemp("merge") / "pool"
    hub = AdapterHub(str(pico_folder), pool, dtype="fp32", device="cpu")
    own = {"films": {"rank": 4}, "answers": {"rank": 8, "targets": "q_proj,v_proj,down_proj"}}
    hub.train(
        [replace(make(), name=name) for name, make in TASKS.items()],
        settings={**own, "talk": {"rank": 2, "rslora": True}},
        max_steps=12,
        rows_per_step=1,
        learning_rate=0.02,
        test_examples=0,
    )
    return pool


@pytest.fixture
def pool(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "pool")
    return tmp_path / "pool"


@pytest.fixture
def hub(pool, pico_folder):
    return AdapterHub(str(pico_folder), pool, dtype="fp32", device="cpu")


def tasks(*names):
    return {name: replace(TASKS[name](), name=name) for name in names}


def merged_by(hub, *names, **options):
    """Merge, measured on four items of each source's task; a verdict must be a warning, too."""
    options = {"tasks": tasks(*names), "limit": 4, "name": "both", **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = hub.merge(list(names), **options)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    verdicts = [m for m in messages if m.startswith(f"{made.name}: ")]
    assert verdicts == ([f"{made.name}: {made.merge.verdict}"] if made.merge.verdict else [])
    for message in messages:
        if message not in verdicts:
            warnings.warn(message, stacklevel=2)
    return made


def test_merge_is_saved_measured_and_described(hub, pool):
    made = merged_by(hub, "films", "answers", method="svd", weights=[0.75, 0.25])
    report = made.merge
    assert (report.method, report.rank, report.seed) == ("svd", 8, 0)
    assert report.weights == {"films": 0.75, "answers": 0.25}
    assert 0 < report.energy <= 1
    assert made.training.how == "merge"
    assert made.training.tasks == ("films", "answers")
    assert made.training.parents == tuple(
        file_sha256(pool / name / "adapter_model.safetensors") for name in ("films", "answers")
    )
    assert made.contract == toy_task().contract  # the heaviest source's
    assert "films x 0.75, answers x 0.25" in made.training.note
    assert made.probe is not None
    assert set(report.drift) == {"films", "answers"}
    assert all(value >= 0 for value in report.drift.values())
    assert {s.task for s in made.scores} == {"films", "answers"}
    assert hub.pool.manifest("both") == made
    assert hub.verify("both").status == "exact"
    card = (pool / "both" / "README.md").read_text()
    assert card == render_card(made)
    assert "Made of films x 0.75, answers x 0.25 by svd, rank 8" in card
    assert "| films | films | accuracy |" in card


def test_retention_is_measured_on_the_same_items(hub):
    made = merged_by(hub, "films", "talk", method="ties", density=0.6, limit=6)
    assert made.merge.density == 0.6
    films, talk = made.merge.retention
    assert (films.adapter, films.task, films.metric, films.n) == ("films", "films", "accuracy", 6)
    for actual in (films, talk):
        task = tasks(actual.adapter)[actual.adapter]
        items = sample_of(task, 6)
        alone, both = (
            METRICS[task.metric].aggregate(judge(hub.model, task, items, as_mix(name)).rows)
            for name in (actual.adapter, "both")
        )
        assert (actual.single, actual.merged) == (pytest.approx(alone), pytest.approx(both))
        better = both / alone if actual is films else alone / both
        assert actual.value == pytest.approx(better)
        assert actual.low <= actual.value <= actual.high
    assert [one.task for one in made.merge.mix] == ["films", "talk"]


def sample_of(task, limit):
    return sample(task.split("test"), limit)


def test_saved_weights_equal_the_method_on_stored_sources(hub, pool):
    """Sources are read from the disk, not out of their slots, and saved as they were merged."""
    merged_by(hub, "films", "talk", method="dare_ties", seed=5, rank=6)
    own = [read_folder(pool / name)[0] for name in ("films", "talk")]
    expected = merge(own, method="dare_ties", seed=5, rank=6).weights
    actual = read_folder(pool / "both")[0]
    for module, pair in expected.factors.items():
        assert all(map(torch.equal, pair, actual.factors[module]))


def test_exact_merge_equals_the_run_time_mix(hub):
    weights = {"films": 0.5, "answers": -0.25, "talk": 1.5}
    merged_by(hub, *weights, method="cat", weights=list(weights.values()))
    mixed, merged = (hub.next_token_logits(PROMPTS, [a, a]) for a in (weights, "both"))
    torch.testing.assert_close(merged, mixed, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["cat", "ties", "knots", "regmean"])
def test_peft_loads_the_folder_and_agrees(hub, pool, pico_folder, method):
    merged_by(hub, "films", "answers", "talk", method=method, limit=1)
    base = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, pool / "both").eval()
    ours = hub.next_token_logits(PROMPTS, ["both"] * len(PROMPTS))
    for prompt, row in zip(PROMPTS, ours, strict=True):
        ids = hub.backbone.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = theirs(ids).logits[0, -1]
        torch.testing.assert_close(row, logits, atol=1e-3, rtol=1e-4)


def test_auto_chooses_the_method_with_the_highest_retention(hub):
    made = merged_by(hub, "films", "talk", method="auto", rank=4, floor=0.0, density=0.5)
    tried = {one.method: one for one in made.merge.tried}
    assert list(tried) == ["mix", *(name for name in METHODS if name not in ("cat", "linear"))]
    best = max((one for name, one in tried.items() if name != "mix"), key=lambda one: one.mean)
    assert made.merge.method == best.method
    assert made.merge.rank == 4
    assert all(one.lowest <= one.mean for one in tried.values())


def test_auto_skips_methods_that_do_not_support_the_weights(hub):
    options = {"method": "auto", "rank": 4, "floor": 0.0, "density": 0.5}
    made = merged_by(hub, "films", "talk", weights=[1, -0.1], **options)
    assert "regmean" not in {one.method for one in made.merge.tried}


def test_auto_saves_nothing_when_all_methods_are_below_the_floor(hub):
    with pytest.raises(AdapterError, match=r"no method keeps 900% of every source's score: \w+"):
        merged_by(hub, "films", "talk", method="auto", floor=9.0)
    assert "both" not in hub.pool
    assert hub.model.names == ("films", "talk")


def test_verdict_names_a_better_run_time_mix(hub):
    good = merged_by(hub, "films", "talk", method="svd", weights=[1, 1], rank=8)
    assert "run-time mix" not in good.merge.verdict  # rank 8 holds all of it
    made = merged_by(hub, "films", "talk", method="dare_linear", density=0.01, weights=[1, 1])
    assert "the run-time mix films=1 talk=1 keeps more than this merge" in made.merge.verdict
    assert "run-time mix" in render_card(made)


def test_weights_are_learnt_on_validation_items(hub):
    events = []
    progress = Listeners(on_event=events.append)
    made = merged_by(hub, "films", "talk", weights="learn", budget=6, listeners=progress)
    assert set(made.merge.weights) == {"films", "talk"}
    assert [(event.step, event.total) for event in events] == [(n, 6) for n in range(1, 7)]
    assert len({event.values["loss"] for event in events}) > 1
    again = merged_by(hub, "films", "talk", weights="learn", budget=6, name="again")
    assert again.merge.weights == made.merge.weights
    assert again.sha256 == made.sha256


def test_merge_of_one_source_keeps_everything(hub):
    made = merged_by(hub, "films", method="svd")
    (actual,) = made.merge.retention
    assert (actual.value, actual.low, actual.high) == (1, 1, 1)
    assert made.merge.drift["films"] < 1e-6
    one, same = (hub.next_token_logits(PROMPTS, [a, a]) for a in ("films", "both"))
    torch.testing.assert_close(one, same, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (8, r"svd is not trusted here: 'films' alone, with weight 1"),  # as PEFT's with rsLoRA
        (0.99, r"'films' alone.* its update is off by 1\.0%"),  # too little for a probe to show
    ],
)
def test_wrong_method_is_detected(hub, monkeypatch, factor, expected):
    def wrong(pairs, settings):
        b, a = weighted_sum(pairs, settings)
        return factor * b, a

    monkeypatch.setitem(METHODS, "svd", replace(METHODS["svd"], function=wrong))
    with pytest.raises(AdapterError, match=expected):
        merged_by(hub, "films", "talk", method="svd")
    assert "both" not in hub.pool


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_the_identity_check(hub, method):
    """Also by the tight check of `merge_adapters`, which would say so."""
    assert merged_by(hub, "films", "talk", method=method, rank=None).merge.method == method


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_pulled_source_is_known_by_its_pool_name(hub, pool):
    """Its manifest may call it otherwise."""
    shutil.copytree(pool / "films", pool / "cinema")
    made = hub.merge(
        ["talk", "cinema"],
        weights=[0.1, 0.9],
        name="both",
        tasks={"talk": toy_talk(), "cinema": toy_task()},
        limit=4,
    )
    assert made.contract == toy_task().contract
    assert made.metric == "accuracy"
    assert made.training.note.endswith("prompted as cinema")


@pytest.mark.parametrize("before", [False, True])
def test_merge_interrupted_while_measuring_saves_nothing(hub, before):
    if before:
        merged_by(hub, "films", "answers")
    kept = hub.pool.manifest("both") if before else None
    loaded = hub.model.names

    def stop(what, _count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged_by(hub, "films", "talk", listeners=Listeners(on_judged=stop))
    assert ("both" in hub.pool) == before
    assert not before or hub.pool.manifest("both") == kept
    assert set(hub.model.names) - {"talk", "films"} == set(loaded) - {"talk", "films"}


@pytest.mark.parametrize("before", [False, True])
def test_corrupted_save_is_undone(hub, before, monkeypatch):
    if before:
        merged_by(hub, "films", "answers")
    kept = hub.pool.manifest("both") if before else None
    kept_loaded = "both" in hub.model.names

    def other_numbers(tensors, metadata):
        return save({name: 1.001 * t for name, t in tensors.items()}, metadata)

    monkeypatch.setattr("adapterhub_chat.artifact.folder.save", other_numbers)  # safetensors'
    with pytest.raises(AdapterError, match="was not saved as it was merged"):
        merged_by(hub, "films", "talk")
    monkeypatch.undo()
    assert ("both" in hub.pool) == before
    assert not before or hub.pool.manifest("both") == kept
    assert ("both" in hub.model.names) == kept_loaded == before


def without(task, split):
    return replace(
        task, load=lambda: Splits({s: task.split(s) for s in SPLITS if s != split} | {split: ()})
    )


def test_auto_without_validation_items_raises(hub):
    given = {**tasks("films"), "talk": without(toy_talk(), "validation")}
    with pytest.raises(UsageError, match="talk has no validation items, so no method can be chos"):
        merged_by(hub, "films", "talk", method="auto", floor=0.0, tasks=given)
    assert "both" not in hub.pool


def test_missing_test_items_are_a_warning(hub):
    given = {**tasks("films"), "talk": without(toy_talk(), "test")}
    with pytest.warns(UserWarning, match="talk has no test items: what the merge keeps of it is"):
        made = merged_by(hub, "films", "talk", tasks=given)
    assert [one.adapter for one in made.merge.retention] == ["films"]


@pytest.fixture
def single_method():
    """The table with one method, the sum of the deltas; `auto` needs one of this name."""
    table = dict(METHODS)
    METHODS.clear()
    METHODS["ties"] = replace(table["task_arithmetic"], name="ties")
    yield
    METHODS.clear()
    METHODS.update(table)  # in its order


@pytest.mark.parametrize("keeps", [True, False])
def test_learnt_weights_must_keep_the_floor(hub, keeps, single_method):
    """`auto` chooses with the default weights, which are taken if the learnt ones fall below the floor.

    One evaluation learns the mean, (0.5, 0.5); the only method's default is the sum, (1, 1).
    """
    options = {"method": "auto", "rank": 12, "limit": 0}
    lowest = [
        merged_by(hub, "films", "talk", weights=weights, floor=0.0, **options).merge.tried[1].lowest
        for weights in ([0.5, 0.5], None)
    ]
    assert lowest[0] < lowest[1]
    floor = 0.0 if keeps else sum(lowest) / 2
    made = merged_by(hub, "films", "talk", weights="learn", budget=1, floor=floor, **options)
    assert set(made.merge.weights.values()) == ({0.5} if keeps else {1.0})


def test_merge_of_a_merge_names_all_tasks(hub):
    first = merged_by(hub, "films", "talk")
    with pytest.warns(UserWarning, match="the task 'films'|no task is known for both"):
        second = hub.merge(["both", "answers"], name="all", tasks=tasks("answers"), limit=2)
    assert second.training.tasks == ("films", "talk", "answers")
    assert second.training.parents[0] == first.sha256
    assert [one.adapter for one in second.merge.retention] == ["answers"]


def test_sources_with_unknown_tasks_are_merged_unmeasured(hub):
    with pytest.warns(UserWarning, match="no task is known for films, talk"):
        made = hub.merge(["films", "talk"], name="both")
    assert made.merge.retention == made.merge.mix == ()
    assert made.scores == ()
    assert set(made.merge.drift) == {"films", "talk"}
    for options in ({"method": "auto"}, {"method": "regmean"}, {"weights": "learn"}):
        with pytest.raises(UsageError, match="was trained on the task 'films'"):
            hub.merge(["films", "talk"], name="both", **options)


def test_merge_replaces_the_earlier_version_and_can_be_rolled_back(hub):
    first = merged_by(hub, "films", "talk", limit=1)
    second = merged_by(hub, "films", "talk", method="ties", limit=1)
    assert first.sha256 != second.sha256
    assert hub.rollback("both").sha256 == first.sha256


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ([], {}, "there are no adapters to merge"),
        (["films", "films"], {}, "an adapter is named twice"),
        (["films", "backbone"], {}, "'backbone' is no adapter"),
        (["films", "both"], {}, "'both' is one of the sources"),
        (["films", "talk"], {"method": "magic"}, "unknown method 'magic'; known: linear, cat"),
        (["films", "talk"], {"weights": [1]}, "2 adapters but 1 weights"),
        (["films", "talk"], {"weights": [0, 0]}, "all weights are zero"),
        (["films", "talk"], {"weights": "best"}, "weights must be numbers, or 'learn' alone"),
        (["films", "talk"], {"weights": ["a", 1]}, "weights must be numbers, or 'learn' alone"),
        (["films", "talk"], {"weights": 1.0}, "weights must be numbers, or 'learn' alone"),
        (["films", "talk"], {"rank": 0}, "rank must be from 1 to 32"),
        (["films", "talk"], {"method": "ties", "density": 0}, "density must be above 0"),
        (["films", "talk"], {"method": "auto", "density": 2}, "density must be above 0"),
        (["films", "talk"], {"method": "regmean", "weights": [1, -1]}, "weights are at least 0"),
        (
            ["films", "talk"],
            {"method": "regmean", "weights": "learn"},
            "no weights are learnt for it",
        ),
        (["films", "talk"], {"limit": -1}, "limit"),
        (["films", "talk"], {"rnak": 8}, "did you mean 'rank'"),
    ],
)
def test_misfits_raise_and_change_nothing(hub, names, options, expected):
    before = hub.pool.names()
    with pytest.raises(ConfigError) as caught:
        hub.merge(names, **{"name": "both", **options})
    assert expected in str(caught.value)
    assert hub.pool.names() == before


def test_unknown_sources_and_names_raise(hub):
    with pytest.raises(UnknownNameError, match="unknown adapter 'nobody'; known: answers, films"):
        hub.merge(["films", "nobody"], name="both")
    with pytest.raises(UsageError, match="reserved word"):
        hub.merge(["films"], name="auto")
    with pytest.raises(UsageError, match="tasks for qa, but the sources are films, talk"):
        hub.merge(["films", "talk"], name="both", tasks={"qa": toy_task()})
    with pytest.raises(UsageError, match="names must be a list"):
        hub.merge("films", name="both")


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_sources_without_manifests_raise(hub, pool):
    for name in ("films", "talk"):
        (pool / name / "adapterhub.json").unlink()
    with pytest.raises(AdapterError, match="none of films, talk has a manifest"):
        hub.merge(["films", "talk"], name="both")


# ---- shares --------------------------------------------------------------------------------------


def test_kept_fraction_follows_the_direction_of_the_metric():
    golds = ["a", "b", "a", "b"]
    right, half = label_rows(golds, golds), label_rows(golds, ["a", "a", "a", "a"])
    value, low, high = kept_fraction(METRICS["accuracy"], right, half)
    assert (value, high) == (0.5, 1.0)
    assert 0 <= low < 0.5
    assert kept_fraction(METRICS["accuracy"], half, right)[0] == 2
    near, far = likelihood_rows([2.0, 3.0], [2, 3]), likelihood_rows([4.0, 6.0], [2, 3])
    value, low, high = kept_fraction(METRICS["perplexity"], near, far)  # perplexities e and e^2
    assert value == pytest.approx(torch.tensor(-1.0).exp().item())
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)


def test_source_with_score_zero_keeps_everything():
    nothing = answer_rows(METRICS["token_f1"].judge, ["x", "y"], [["a"], ["b"]])
    assert kept_fraction(METRICS["token_f1"], nothing, nothing) == (1, 1, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_results_keep_nothing(bad):
    near, off = likelihood_rows([2.0, 3.0], [2, 3]), likelihood_rows([bad, 6.0], [2, 3])
    assert kept_fraction(METRICS["perplexity"], near, off) == (0, 0, 0)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_kept_fraction_lies_in_its_interval(items):
    single, merged = (np.array([(pair[side],) for pair in items]) for side in (0, 1))
    value, low, high = kept_fraction(METRICS["token_f1"], single, merged)
    assert value == pytest.approx(merged.mean() / single.mean())
    assert (
        low - 0.2 <= value <= high + 0.2
    )  # a percentile interval of few items may miss its centre


def test_merge_report_round_trip_through_json():
    report = MergeReport(method="ties", weights={"a": 1.0}, rank=4, energy=0.5)
    assert MergeReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValueError, match="finite"):
        MergeReport(method="ties", weights={"a": float("nan")}, rank=4, energy=0.5)
    assert Manifest.model_fields["merge"].default is None
    assert Training(how="merge").how == "merge"


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def run(pool, run_verb):
    """run("--flag", ...) -> (exit code, standard output, standard error) of `merge` on the pool."""

    def merge_verb(*args):
        done = run_verb("merge", *args, "--pool", pool)
        return done.code, done.out, done.err

    return merge_verb


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_merge_command(run, pool):
    code, out, _ = run(
        "films", "talk", "--name", "both", "--weights", "0.5,1", "--rank", 4, "--json"
    )
    assert code == 0
    actual = json.loads(out)
    assert actual["adapter"] == "both"
    assert actual["weights"] == {"films": 0.5, "talk": 1.0}
    assert (actual["method"], actual["rank"]) == ("svd", 4)
    assert len(actual["parents"]) == 2
    assert actual["sha256"] == file_sha256(pool / "both" / "adapter_model.safetensors")
    assert {"retention", "mix", "drift", "energy", "tried", "verdict"} <= set(actual)


def test_merge_command_prints_retention(run, tmp_path):
    (tmp_path / "films.csv").write_text(
        "\n".join(
            ["text,answer", *(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(99))]
        )
    )
    (tmp_path / "films.toml").write_text(
        'metric = "accuracy"\n[data]\npath = "films.csv"\n[columns]\ntext = "text"\nanswer = "answer"\n'
        '[labels]\n0 = "negative"\n1 = "positive"\n'
    )
    judged = f"films={tmp_path / 'films.toml'}"
    code, out, err = run(
        "films", "--name", "copy", "--method", "auto", "--task", judged, "--limit", 3
    )
    assert code == 0, err
    assert "Retention on validation items" in out
    assert "copy: what it keeps of its sources" in out
    assert "drift on the probe prompts" in out
    assert "films x 1" in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--weights", "a,b"), "--weights 'a,b': give numbers with commas"),
        (("--task", "films"), "--task 'films': say which adapter"),
        (("--method", "magic"), "unknown method 'magic'"),
        (("--density", "7", "--method", "ties"), "density must be above 0"),
        (("--budget", "0"), "budget"),
    ],
)
def test_merge_command_reports_misfits(run, args, expected):
    code, _, err = run("films", "talk", "--name", "both", *args)
    assert code == 2
    assert expected in err
