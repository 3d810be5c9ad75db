"""Transfer on a pico model: each method, the verdicts, and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from pico import toy_answers, toy_task

from adapterhub_chat import AdapterHub
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded, unknown_token_share
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task, table_task
from adapterhub_chat.errors import AdapterError, DataError, UsageError
from adapterhub_chat.events import Listeners
from adapterhub_chat.inference.likelihood import sequence_losses
from adapterhub_chat.lora.weights import concatenate
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.report.transfer import write_report
from adapterhub_chat.training.family import StepRows
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.loop import TrainingRun, train
from adapterhub_chat.transfer.candidates import _finite as finite_results
from adapterhub_chat.transfer.candidates import transfer
from adapterhub_chat.transfer.gate import MIN_ITEMS
from adapterhub_chat.transfer.methods import (
    METHODS,
    few_shot_jobs,
    label_log_likelihoods,
    language_job,
    maxent_job,
)
from adapterhub_chat.transfer.setting import (
    make_problem,
    proxy_validation,
    shots_of,
    warn_of_language,
)
from adapterhub_chat.transfer.spec import TransferSpec, target_and_texts
from adapterhub_chat.types import Example, as_mix

QUICK = TrainConfig(max_steps=12, rows_per_step=1, learning_rate=0.02, eval_examples=12, patience=0)


def parts_of(task, **changes):
    """The same task with other splits."""
    parts = {split: task.split(split) for split in ("train", "validation", "test")} | changes
    return Task(task.name, task.contract, task.metric, lambda: Splits(parts))


@pytest.fixture(scope="module")
def source(pico_folder):
    """A source adapter, trained on the toy task."""
    model = AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cpu"))
    job = make_job(model.backbone.tokenizer, "source", toy_task(), QUICK)
    return train(model, [job])["source"].weights


@pytest.fixture
def problem(source):
    return make_problem(source, toy_task(), toy_task("target"), 4, QUICK)


def test_shots_are_stratified_and_depend_on_the_seed(problem):
    assert sorted(e.answer for e in problem.shots) == ["bad", "bad", "good", "good"]
    other = shots_of(toy_task(), 4, seed=5)
    assert other != list(problem.shots)
    assert shots_of(toy_task(), 4, seed=5) == other


def test_training_a_stack_does_not_change_the_source(model, problem):
    (job,) = (
        j for j in few_shot_jobs(model.backbone.tokenizer, problem, ["stack"]) if j.name == "stack"
    )
    before = {m: (a.clone(), b.clone()) for m, (a, b) in problem.source.factors.items()}
    weights = train(model, [job])["stack"].weights
    for module, (a, b) in problem.source.factors.items():
        assert torch.equal(a, before[module][0])
        assert torch.equal(b, before[module][1])
    model.load("s", problem.source)
    model.load("t", weights)
    model.load("flat", concatenate([problem.source, weights]))
    ids = torch.tensor([model.backbone.tokenizer("good film").input_ids])
    with torch.inference_mode():
        logits = []
        for mix in ({"s": 1.0, "t": 1.0}, "flat"):
            with model.mixing([as_mix(mix)]):
                logits.append(model.backbone.model(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_stack_layers_restrict_the_stacked_adapter_only(model, problem):
    """T is in the blocks that are asked for, in the stack and in the language's, and nobody else's is."""
    early = replace(problem, stack_layers="0:1")
    jobs = few_shot_jobs(model.backbone.tokenizer, early, ["stack", "finetune"])
    made = train(model, [*jobs, language_job(model, early)])
    blocks = {name: {m.split(".")[2] for m in done.weights.factors} for name, done in made.items()}
    both = {"0", "1"}
    assert blocks == {"target": both, "finetune": both, "stack": {"0"}, "language": {"0"}}
    narrow = replace(problem, config=problem.config.model_copy(update={"layers": "1:"}))
    (stack,) = (j for j in few_shot_jobs(model.backbone.tokenizer, narrow, ["stack"]) if j.frozen)
    assert stack.config.layers == "1:"  # what holds for all holds for it
    combined = concatenate([early.source, made["stack"].weights])
    ranks = {m.split(".")[2]: combined.rank(m) for m in combined.factors}
    assert ranks["0"] > ranks["1"] == early.source.max_rank


def test_finetune_starts_from_the_sources_weights(model, problem):
    (job,) = (
        j
        for j in few_shot_jobs(model.backbone.tokenizer, problem, ["finetune"])
        if j.name == "finetune"
    )
    unchanged = replace(
        job, config=job.config.model_copy(update={"learning_rate": 1e-12, "max_steps": 1})
    )
    weights = train(model, [unchanged])["finetune"].weights
    for module, (a, b) in problem.source.factors.items():
        factors = weights.factors[module]
        scale = weights.scale(module)
        torch.testing.assert_close(scale * factors[1] @ factors[0], b @ a, atol=1e-4, rtol=1e-4)


def test_maxent_weights_are_the_targets_likelihoods(model, problem):
    model.load("teacher", problem.source)
    job, weighting = maxent_job(model, problem, as_mix("teacher"), 0.0)
    shares = label_log_likelihoods(model, problem, as_mix("teacher")).double().exp()
    expected = shares / shares.mean()
    torch.testing.assert_close(weighting.weights, expected.clamp(max=20), atol=1e-6, rtol=1e-6)
    example_weights = [e.weight for e in job.train[: len(problem.source_examples)]]
    assert example_weights == pytest.approx(weighting.weights.tolist())
    repeated = len(job.train) - len(problem.source_examples)
    assert repeated / len(job.train) == pytest.approx(0.2, abs=0.07)


def test_an_example_of_weight_two_counts_twice(model):
    """An example of weight 2 gives the loss and the gradient of the example twice."""
    ids = tuple(range(5, 12))
    one, other = Encoded(ids, ((20, 2),)), Encoded(ids[::-1], ((30, 2),))
    found = []
    for row in ([one, one, other], [replace(one, weight=2.0), other]):
        run = TrainingRun(model, [Job("a", row, (), QUICK)])
        learner = run.families[0].learners[0]
        loss = run._backward([StepRows(learner, [row], 1.0)])
        found.append((loss, learner.gradient(0, run.bank.scratch).clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_the_weight_of_a_step_scales_the_update(model, clip):
    """Over the steps, too, a weight counts: neither the mean over a step nor its clipping undoes it."""
    ids = tuple(range(5, 12))
    one, other = Encoded(ids, ((20, 2),)), Encoded(ids[::-1], ((30, 2),), weight=0.0)
    moved = []
    for weight in (1.0, 3.0):
        run = TrainingRun(model, [Job("a", [one], (), QUICK.model_copy(update={"clip": clip}))])
        family = run.families[0]
        (learner,) = family.learners
        learner.optimizer.step = lambda own=learner: moved.append(own.vector.grad.clone())
        part = StepRows(learner, [[replace(one, weight=weight), other]], 1.0)
        family.update([part], run._backward([part]), run._all_reduce, 0.0, 0.0)
    assert float(moved[0].norm()) > 0
    torch.testing.assert_close(moved[1], 3 * moved[0])


def test_language_learns_from_unlabelled_text(model, source):
    """No label is looked at; the texts get likelier; without shots the stack is source and T as they are."""
    config = QUICK.model_copy(update={"max_steps": 30})
    problem = make_problem(source, toy_task(), toy_task("target"), 0, config)
    unlabelled = [replace(e, answer="never seen") for e in problem.unlabelled]
    problem = replace(problem, unlabelled=unlabelled)
    job = language_job(model, problem)
    learnt = train(model, [job])["language"].weights
    model.load("learnt", learnt)
    losses = [sequence_losses(model, job.train, as_mix(name)).sum() for name in (None, "learnt")]
    assert losses[1] < 0.8 * losses[0]
    candidate = transfer(model, problem, "language").candidates["language"]
    sums = concatenate([problem.source, candidate.stacked])
    for module, (a, b) in candidate.weights.factors.items():
        torch.testing.assert_close(b @ a, sums.factors[module][1] @ sums.factors[module][0])


@pytest.mark.parametrize("shots", [0, 4])
def test_auto_tries_language_if_the_languages_differ(model, source, shots):
    foreign = replace(toy_task("target"), language="zh")
    config = QUICK.model_copy(update={"epochs": 1000.0})
    outcome = transfer(model, make_problem(source, toy_task(), foreign, shots, config))
    assert outcome.candidates["language"].steps == -(-QUICK.max_steps // (2 if shots else 1))


def test_auto_chooses_a_candidate_that_helps(model, source):
    few = parts_of(toy_task("target"))
    outcome = transfer(model, make_problem(source, toy_task(), few, 2, QUICK))
    assert set(outcome.candidates) == {
        "backbone",
        "source",
        "target",
        "finetune",
        "stack",
        "maxent",
        "adversarial",
    }
    assert outcome.baseline == "target"
    chosen = outcome.candidates[outcome.chosen]
    assert chosen.verdict.word in ("helps", "neutral")
    assert chosen.value >= outcome.candidates["target"].value
    assert outcome.weighting is not None
    assert outcome.weighting.effective >= 0.3 - 1e-6


def test_a_source_that_hurts_is_not_chosen(model):
    """Labels turned round: the source as it is hurts, and nothing worse than the baseline is chosen."""
    config = QUICK.model_copy(update={"max_steps": 60, "eval_examples": 60})
    flipped = toy_task(size=300, flip=True)
    job = make_job(model.backbone.tokenizer, "source", flipped, config)
    weights = train(model, [job])["source"].weights
    outcome = transfer(
        model, make_problem(weights, flipped, toy_task("target", size=300), 16, config)
    )
    assert outcome.candidates["source"].verdict.word == "hurts"
    assert outcome.chosen != "source"
    assert outcome.candidates[outcome.chosen].verdict.word != "hurts"


def test_without_shots_the_backbone_is_the_baseline(model, source):
    outcome = transfer(model, make_problem(source, toy_task(), toy_task("target"), 0, QUICK))
    assert outcome.baseline == "backbone"
    assert set(outcome.candidates) == {"backbone", "source", "maxent", "adversarial"}


def shorter(task, split, keep):
    return parts_of(task, **{split: tuple(e for e in task.split(split) if keep(e))})


@pytest.mark.parametrize(
    ("target", "shots", "words"),
    [
        (toy_answers, 4, "labels are bad, good, the target's none"),
        (
            lambda: shorter(toy_task(), "train", lambda e: False),
            4,
            "has 0 training examples, 4 shots",
        ),
        (
            lambda: shorter(toy_task(), "train", lambda e: e.answer == "bad"),
            4,
            "have the label 'bad'",
        ),
        (lambda: shorter(toy_task(), "validation", lambda e: False), 4, "no validation examples"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(source, target, shots, words):
    with pytest.raises(DataError, match=words):
        make_problem(source, toy_task(), target(), shots, QUICK)


def test_a_source_with_non_finite_weights_is_refused(source):
    (module, (a, b)), *_ = source.factors.items()
    broken = source.with_factors({**source.factors, module: (a, b * torch.nan)})
    with pytest.raises(DataError, match="numbers that are not finite"):
        make_problem(broken, toy_task(), toy_task("t"), 4, QUICK)


def test_validation_examples_of_one_label_give_a_warning(source):
    target = shorter(toy_task(), "validation", lambda e: e.answer == "bad")
    with pytest.warns(UserWarning, match="all 6 validation examples of toy have the label 'bad'"):
        make_problem(source, toy_task(), target, 4, QUICK)


def test_too_few_validation_examples_give_a_warning(source):
    few = toy_task().split("validation")[: MIN_ITEMS - 1]
    with pytest.warns(UserWarning, match="4 validation examples, which prove nothing"):
        make_problem(source, toy_task(), parts_of(toy_task(), validation=few), 4, QUICK)


def test_a_language_unknown_to_the_tokenizer_gives_a_warning(model, problem, recwarn):
    tokenizer = model.backbone.tokenizer
    warn_of_language(tokenizer, problem)
    assert not recwarn
    chinese = [Example({"text": "这部电影很好看"}, "good")] * 4
    with pytest.warns(
        UserWarning, match=r"100% of the tokens of target \(en\) are bytes or unknown"
    ):
        warn_of_language(tokenizer, replace(problem, validation=chinese))
    assert unknown_token_share(tokenizer, ["good film"]) == 0
    assert 0.3 < unknown_token_share(tokenizer, ["good film 好"]) < 1


def test_maxent_balances_features_without_shots(model, source):
    problem = make_problem(source, toy_task(), toy_task("t"), 0, QUICK)
    job, weighting = maxent_job(model, problem, as_mix(None), 0.3)
    assert len(job.train) == len(problem.source_examples)
    assert weighting.effective >= 0.3
    plain = replace(problem, unlabelled=())
    _, by_likelihood = maxent_job(model, plain, as_mix(None), 0.3)
    assert not torch.allclose(weighting.weights, by_likelihood.weights)


def test_all_misfits_are_reported_together(source):
    empty = parts_of(toy_answers(), train=(), validation=())
    with pytest.raises(DataError) as refused:
        make_problem(source, toy_task(), empty, 4, QUICK)
    for words in ("labels are", "0 training examples", "no validation examples"):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("method", "shots", "words"),
    [
        ("magic", 4, "allowed are auto"),
        ("stack", 0, "give shots"),
        ("language", 0, "too few or too short"),
    ],
)
def test_a_method_without_its_data_is_refused(model, source, method, shots, words):
    problem = make_problem(source, toy_task(), toy_task("t"), shots, QUICK)
    with pytest.raises(UsageError, match=words):
        transfer(model, replace(problem, unlabelled=[Example({"text": ""}, "")]), method)
    if method == "language":
        with pytest.raises(UsageError, match="give unlabelled"):
            transfer(model, replace(problem, unlabelled=[]), method)


def test_source_examples_with_their_own_contract_are_kept(source):
    odd = Example({"text": "x"}, "good", contract=toy_answers().contract)
    kept = make_problem(source, parts_of(toy_task(), train=(odd,)), toy_task("t"), 0, QUICK)
    assert kept.source_examples == [odd]


# ---- from names to an adapter in the pool --------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(pico_folder, tmp_path_factory):
    """A pool that has a source adapter."""
    root = tmp_path_factory.mktemp("taught") / "pool"
    hub = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
    hub.train([toy_task()], names=["source"], max_steps=12, rows_per_step=1, learning_rate=0.02)
    return root


@pytest.fixture
def taught(prepared, pico_folder, tmp_path):
    """A hub over a pool of its own with the source adapter, which is loaded."""
    shutil.copytree(prepared, tmp_path / "pool")
    hub = AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")
    hub.load("source")
    return hub


FEW = {"max_steps": 8, "rows_per_step": 1, "learning_rate": 0.02, "eval_examples": 12}


def test_a_transfer_saves_an_adapter_with_its_verdict(taught):
    done = taught.transfer("source", toy_task("target"), shots=4, source_task=toy_task(), **FEW)
    report = done.manifest.transfer
    assert done.manifest.name == "target-from-source"
    assert report.method == done.outcome.chosen
    assert report.verdict == done.outcome.candidates[report.method].verdict.word
    assert set(report.values) == set(done.outcome.candidates)
    assert done.manifest.training.how == "transfer"
    source = taught.pool.manifest("source").sha256
    assert done.manifest.training.parents in ((source,), ())
    assert [s.task for s in done.manifest.scores] == ["target"]
    assert taught.verify("target-from-source").ok
    assert "## Transfer" in (taught.pool.root / "target-from-source" / "README.md").read_text()
    assert taught.predict("target-from-source", ["good good film"])[0].label in ("good", "bad")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_can_be_requested(taught, method):
    target = toy_task("target")
    done = taught.transfer(
        "source", target, method, name="made", shots=4, source_task=toy_task(), **FEW
    )
    assert done.outcome.chosen == method
    assert taught.pool.manifest("made").transfer.method == method
    if method in ("stack", "language"):
        assert taught.pool.load("made").weights.max_rank == 8  # T alone
        assert taught.pool.manifest("made").stack[0].name == "source"


def test_an_adapter_that_hurts_is_not_published_unless_forced(taught, hub_server):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    taught.transfer(
        "source", toy_task("target"), "finetune", shots=4, source_task=toy_task(), **FEW
    )
    manifest = taught.pool.manifest("target-from-source")
    worse = manifest.transfer.model_copy(update={"verdict": "hurts", "gain": -0.2})
    taught.pool.describe(manifest.name, manifest.model_copy(update={"transfer": worse}))
    with pytest.raises(AdapterError, match=r"judged to hurt beside target \(gain -0.200\)"):
        taught.push("target-from-source", "alice/x", **access)
    taught.push("target-from-source", "alice/x", force=True, **access)
    assert "made it hurt" in (taught.pool.root / manifest.name / "README.md").read_text()


def test_ctrl_c_ends_a_transfer_and_saves_nothing(taught):
    """A baseline that has half learnt would make everything beside it look good."""

    def stop(event):
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    for turn in ("target", "maxent"):  # in the first training run, and in the second
        told = Listeners(on_event=lambda e, turn=turn: stop(e) if e.adapter == turn else None)
        with pytest.raises(KeyboardInterrupt):
            taught.transfer(
                "source", toy_task("target"), shots=4, source_task=toy_task(), listeners=told, **FEW
            )
        assert taught.pool.names() == ["source"]
        assert taught.model.names == ("source",)


def test_a_non_finite_candidate_does_not_affect_the_others(source):
    done = Trained(source, 4, 4, 0.5, 10, 1.0, "finished")
    (module, (a, b)), *_ = source.factors.items()
    lost = replace(done, weights=source.with_factors({module: (a, b * torch.nan)}))
    made = {"target": done, "maxent": lost}
    with pytest.warns(UserWarning, match="maxent: the training left numbers that are not finite"):
        assert finite_results(made, "auto") == {"target": done}
    for method, own in (("maxent", made), ("auto", {"target": lost, "maxent": done})):
        with pytest.raises(DataError, match="not finite; lower learning_rate"):
            finite_results(own, method)


def test_the_new_adapter_cannot_replace_its_source(taught):
    how = {"shots": 4, "source_task": toy_task(), **FEW}
    with pytest.raises(UsageError, match="'source' is what the new adapter learns from"):
        taught.transfer("source", toy_task("target"), "stack", name="source", **how)
    taught.transfer("source", toy_task("target"), "stack", name="made", **how)
    with pytest.raises(UsageError, match="'source' is what the new adapter learns from"):
        taught.transfer("made", toy_task("other"), "finetune", name="source", **how)
    assert taught.verify("made").ok


def test_the_manifest_names_all_training_data(taught):
    own = replace(toy_task(), sources=("reviews 1.0",), licence="MIT")
    target = replace(toy_task("target"), sources=("tweets 2.0",), licence="CC0-1.0")
    how = {"shots": 4, "source_task": own, **FEW}
    made = taught.transfer("source", target, "maxent", **how).manifest
    assert made.training.sources == ("tweets 2.0", "reviews 1.0")
    assert made.licence == "CC0-1.0, MIT"
    assert len(made.training.data_sha256) == 2
    assert made.training.tasks == ("target",)
    assert 0 < made.training.best_step <= made.training.steps
    assert made.transfer.clipped == 0
    assert made.transfer.residual is None  # by likelihoods
    alone = taught.transfer("source", target, "finetune", **how).manifest
    assert (alone.training.sources, alone.licence) == (("tweets 2.0",), "CC0-1.0")
    bare = taught.transfer("source", target, "maxent", **(how | {"shots": 0})).manifest
    assert bare.transfer.residual >= 0
    assert "means within" in (taught.pool.root / bare.name / "README.md").read_text()


def test_level_sets_the_mean_log_likelihood_of_the_weighted_source(taught):
    how = {"shots": 4, "source_task": toy_task(), "name": "made", **FEW}
    done = taught.transfer("source", toy_task("target"), "maxent", **how)
    ends = []
    for level in (-50.0, 0.1):
        with pytest.raises(DataError, match="no multiplier gives") as caught:
            taught.transfer("source", toy_task("target"), "maxent", level=level, **how)
        ends.append(float(re.search(r"the nearest is (-0\.\d+)", str(caught.value))[1]))
    assert taught.pool.manifest("made") == done.manifest
    level = sum(ends) / 2
    made = taught.transfer("source", toy_task("target"), "maxent", level=level, **how)
    assert made.outcome.weighting.lam > 0
    assert made.outcome.weighting.lam != done.outcome.weighting.lam


def test_a_source_without_a_known_task_is_refused(taught):
    with pytest.raises(UsageError, match=r"unknown task 'toy'|source_task"):
        taught.transfer("source", toy_task("target"), shots=4, **FEW)


# ---- a table of one's own ------------------------------------------------------------------------


def write_table(path, labelled=60, bare=12):
    """A CSV of tweets: some with a label, some without."""
    rows = ["text,label"]
    for i in range(labelled):
        word = "good" if i % 2 else "bad"
        rows.append(f"{word} flight {word} {i},{word}")
    path.write_text("\n".join([*rows, *(f"flight {i}," for i in range(bare))]) + "\n")
    return path


def test_a_table_is_a_target(taught, tmp_path):
    table = write_table(tmp_path / "tweets.csv")
    done = taught.transfer("source", table, "adversarial", shots=4, source_task=toy_task(), **FEW)
    assert done.manifest.name == "tweets-from-source"
    assert done.manifest.training.tasks == ("tweets",)
    assert 0 <= done.manifest.transfer.discriminator <= 1
    folder = tmp_path / "report"
    text = write_report(done, folder).read_text()
    for name in done.outcome.candidates:
        assert f"| {name} |" in text
    assert "Chosen: **adversarial**" in text
    for picture in re.findall(r"!\[(.*?)\]", text):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert {"scores.png", "discriminator.png"} <= {p.name for p in folder.iterdir()}


def test_labels_and_fields_of_a_table_keep_their_values(tmp_path):
    """Labels 0 and False are labels, a field of 0 is a text, and an empty line is no row."""
    numbers = replace(toy_task().contract, labels={"0": "negative", "1": "positive"})
    like = Task("numbers", numbers, "accuracy", lambda: Splits({}))
    rows = [{"text": 0, "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": None}]
    path = tmp_path / "tweets.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "", "label": ""}]))
    task, bare = table_task(path, like)
    known = [e for split in ("train", "validation", "test") for e in task.split(split)]
    assert sorted((e.fields["text"], e.answer) for e in known) == [("0", "0"), ("b", "1")]
    assert [e.fields["text"] for e in bare] == ["c"]


def test_rows_without_a_label_are_unlabelled_texts(tmp_path):
    table = write_table(tmp_path / "tweets.csv", bare=1)
    spec = TransferSpec("source", table)
    _, texts = target_and_texts(spec, toy_task())
    assert len(texts) > 20
    with_texts = replace(spec, unlabelled=["only this"])
    assert [e.fields["text"] for e in target_and_texts(with_texts, toy_task())[1]] == [
        "flight 0",
        "only this",
    ]


def test_further_numbers_of_shots_are_only_in_the_report(taught, tmp_path):
    how = {"source_task": toy_task(), "name": "made", **FEW}
    with pytest.raises(UsageError, match="give shots"):  # before anything is trained
        taught.transfer("source", toy_task("target"), "finetune", shots=[4, 0, 2], **how)
    for wrong in ([], -1, [4, -2]):
        with pytest.raises(UsageError, match="at least 0"):
            taught.transfer("source", toy_task("target"), shots=wrong, **how)
    done = taught.transfer("source", toy_task("target"), "maxent", shots=[4, 2, 0, 4], **how)
    assert list(done.by_shots) == [0, 2, 4]
    assert done.by_shots[4] is done.outcome
    assert taught.pool.names() == ["made", "source"]
    text = write_report(done, tmp_path / "report").read_text()
    assert "| candidate | 0 shots | 2 shots | 4 shots |" in text
    assert re.search(r"\| target \|  \| 0\.\d+ \(", text)  # there is none without shots
    assert (tmp_path / "report" / "shots.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_without_its_columns_is_refused(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("review,stars\nfine,5\n")
    with pytest.raises(
        DataError, match=r"no column text, label \(or answer\); it has review, stars"
    ):
        table_task(bad, toy_task())
    with pytest.raises(DataError, match="no file"):
        table_task(tmp_path / "none.csv", toy_task())


def test_without_labels_the_verdict_rests_on_a_proxy(taught, tmp_path):
    table = write_table(tmp_path / "tweets.csv", labelled=0, bare=20)
    how = {"source_task": toy_task(), **FEW}
    with pytest.raises(DataError, match=r"0 training examples, 4 shots .* with 0 shots its texts"):
        taught.transfer("source", table, shots=4, **how)
    unjudged = parts_of(toy_task(), validation=())
    with pytest.raises(DataError, match="nothing says whether a transfer helps"):
        taught.transfer("source", table, shots=0, **{**how, "source_task": unjudged})
    assert taught.pool.names() == ["source"]
    done = taught.transfer("source", table, "maxent", shots=0, **how)
    report = done.manifest.transfer
    assert re.search(r"no example of tweets has a label, .* proxy: \d+ validation", report.proxy)
    assert done.outcome.baseline == "backbone"
    assert done.manifest.scores == ()  # nobody knows
    card = (taught.pool.root / "tweets-from-source" / "README.md").read_text()
    assert "judged by a proxy" in card
    assert "rest on a proxy" in card
    assert f"**{report.proxy}**" in write_report(done, tmp_path / "report").read_text()


def test_the_proxy_is_drawn_from_source_examples_like_the_target(model, source):
    """A target that speaks of good alone, without a label: what stands in for it does, too."""
    kind = [e for e in toy_task().split("train") if e.answer == "good"]
    bare = parts_of(toy_task("target"), train=(), validation=(), test=())
    config = QUICK.model_copy(update={"eval_examples": 40})
    problem = make_problem(source, toy_task(), bare, 0, config, unlabelled=kind)
    seen = proxy_validation(model, problem)

    def good(examples):
        return sum(e.answer == "good" for e in examples) / len(examples)

    assert good(seen.validation) > good(problem.proxies) + 0.1
    assert set(map(str, seen.validation)) <= set(map(str, problem.proxies))
    assert str(len(seen.validation)) in seen.proxy
    labelled = make_problem(source, toy_task(), toy_task("target"), 0, config)
    assert not labelled.proxies


def test_unlabelled_texts_of_the_target_can_be_passed(taught):
    target = parts_of(toy_task("target"), train=toy_task().split("train")[:4])
    how = {"shots": 4, "source_task": toy_task(), "name": "made", **FEW}
    with pytest.raises(UsageError, match="texts of the target"):
        taught.transfer("source", target, "adversarial", **how)
    texts = [f"a film {i}" for i in range(9)]
    done = taught.transfer("source", target, "adversarial", unlabelled=texts, **how)
    assert len(done.outcome.discriminator.accuracy) == done.outcome.candidates["adversarial"].steps
    with pytest.raises(DataError, match="input 2"):
        taught.transfer("source", target, "maxent", unlabelled=["x", 7], **how)
