"""Encoders on a pico BERT: heads in the bank, packed rows, PEFT's files, the guard, and the same faces."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from pico import WORDS, keep_adapter, toy_answers, toy_task
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.folder import read_folder
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.packing import pack
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, ConfigError, DataError, UsageError
from adapterhub_chat.export.gguf_adapter import write_gguf
from adapterhub_chat.lora.weights import Head, concatenate, initial_weights
from adapterhub_chat.model.features import capture_blocks, mean_pooled
from adapterhub_chat.training.job import HiddenStates, make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.transfer.language import text_job
from adapterhub_chat.types import Example, PromptContract, as_mix

QUICK = {
    "max_steps": 25,
    "rows_per_step": 2,
    "learning_rate": 0.02,
    "eval_examples": 12,
    "patience": 0,
    "epochs": 1000,
}
SETTINGS = QUICK | {"row_length": 64, "rank": 4}


def topics(name="topics", size=60):
    """Which word is it? Ten labels, so that heads of two sizes share a bank."""
    contract = PromptContract(labels={word: f"It is the {word}." for word in WORDS})
    rows = tuple(Example({"text": f"{WORDS[i % 10]} {i}"}, WORDS[i % 10]) for i in range(size))
    parts = {"train": rows[:40], "validation": rows[40:50], "test": rows[50:]}
    return Task(name, contract, "accuracy", lambda: Splits(parts))


def pooled_of(model, example, name):
    """The features (1, H) of one text under an adapter."""
    batch = pack([[example]], 64)
    with capture_blocks(model, [-1]) as outputs, model.mixing([as_mix(name)]):
        model.answer_logits(batch)
        return mean_pooled(outputs[-1], batch)


def random_weights(model, labels=2, seed=1):
    """An adapter that matters, with a head."""
    start = initial_weights(
        model.shapes, rank=4, alpha=8, seed=seed, head=(labels, model.backbone.width)
    )
    draw = torch.Generator().manual_seed(seed)
    factors = {
        m: (a, torch.randn(b.shape, generator=draw) * 0.3) for m, (a, b) in start.factors.items()
    }
    head = Head(
        *(torch.randn(t.shape, generator=draw) for t in (start.head.weight, start.head.bias))
    )
    return replace(start.with_factors(factors), head=head)


@pytest.fixture
def trained(encoder_hub):
    encoder_hub.train([toy_task(), topics()], **SETTINGS)
    return encoder_hub


def test_two_adapters_with_heads_of_two_sizes_learn_together_and_answer(trained):
    scores = {name: trained.pool.manifest(name).score(name) for name in ("toy", "topics")}
    assert scores["toy"].value > 0.9 > scores["toy"].backbone_value
    assert scores["topics"].value > 0.6 > scores["topics"].backbone_value
    good, bad = trained.predict("toy", ["good good film", "bad bad film"])
    assert (good.label, good.output, bad.label) == ("good", "positive", "bad")
    assert sum(good.scores.values()) == pytest.approx(1)
    (topic,) = trained.predict("topics", ["song 3"])
    assert set(topic.scores) == set(WORDS)


def test_chat_answers_in_one_batch_with_the_words_of_the_chosen_label(trained):
    rows = ["good good film", "bad bad film", "joke 4"]
    talk = [[{"role": "user", "content": text}] for text in rows]
    pieces = []
    texts = trained.chat(
        talk, ["toy", "toy", "topics"], on_text=lambda *piece: pieces.append(piece)
    )
    assert texts[:2] == ["positive", "negative"]
    assert texts[2] in topics().contract.labels.values()
    assert pieces == list(enumerate(texts))
    with pytest.raises(UsageError, match=r"row 1 \(backbone\) has none"):
        trained.chat(talk[:2], ["toy", None])


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_what_an_encoder_cannot_do_is_refused(trained):
    for asked in (trained.generate, trained.next_token_logits):
        with pytest.raises(UsageError, match="is an encoder: it writes no text"):
            asked(["good"], ["toy"])
    with pytest.raises(UsageError, match="is an encoder"):
        _ = trained.engine
    with pytest.raises(UsageError, match="chooses among labels and writes no text"):
        trained.train([toy_answers()])
    with pytest.raises(UsageError, match="knows the labels bad, good, in this order"):
        trained.predict("toy", ["x"], task=topics())
    with pytest.raises(UsageError, match="knows the labels bad, good, in this order"):
        trained.evaluate(["toy"], [topics()])
    with pytest.raises(ConfigError, match="have heads, which no method merges"):
        trained.merge(["toy", "topics"], name="both")
    with pytest.raises(ConfigError, match=r"row_length 512, and the encoder reads 256 tokens"):
        trained.train([toy_task("long")], row_length=512)
    with pytest.raises(ConfigError, match="heads of several tasks do not add up"):
        trained.train([toy_task("grown")], how="sequence", grow=True)


# ---- the equation --------------------------------------------------------------------------------


def texts_of(hub, rows, adapters):
    """Label logits of raw texts, row i under adapter i."""
    from adapterhub_chat.inference.likelihood import next_token_logits
    from adapterhub_chat.inference.requests import Request
    from adapterhub_chat.types import as_mix

    ids = hub.backbone.tokenizer(rows).input_ids
    requests = [Request(tuple(i), as_mix(a)) for i, a in zip(ids, adapters, strict=True)]
    return next_token_logits(hub.model, requests)


def test_a_row_of_a_mixed_batch_equals_that_row_alone(encoder_hub):
    model = encoder_hub.model
    model.load("two", random_weights(model))
    model.load("five", random_weights(model, labels=5, seed=2))
    rows, who = ["good film", "bad plot 7 7 7", "tale", "song"], ["two", "five", None, "two"]
    together = texts_of(encoder_hub, rows, who)
    for i, (text, name) in enumerate(zip(rows, who, strict=True)):
        (alone,) = texts_of(encoder_hub, [text], [name])
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    assert together[0, 2:].isinf().all()  # labels that its head does not know
    assert together[2].eq(0).all()  # no head: all labels are alike


def test_features_of_a_row_without_adapter_equal_the_backbones_bit_for_bit(encoder_hub):
    from adapterhub_chat.data.encoding import Encoded
    from adapterhub_chat.data.packing import pack
    from adapterhub_chat.types import Mix, as_mix

    model, tokenizer = encoder_hub.model, encoder_hub.backbone.tokenizer
    model.load("two", random_weights(model))
    packed = [[Encoded(tuple(tokenizer(t).input_ids), ((0,),))] for t in ("good film", "bad song")]
    batch = pack(packed, 16)
    with torch.no_grad():
        plain = model.features(batch)
        with model.mixing([Mix(), as_mix("two")]):
            mixed = model.features(batch)
    assert torch.equal(mixed[0], plain[0])
    assert not torch.allclose(mixed[1], plain[1])


def test_packed_features_equal_those_of_transformers(encoder_hub, encoder_folder):
    """Several texts in one row do not see each other; features are the pooled or the mean ones."""
    from adapterhub_chat.data.encoding import Encoded
    from adapterhub_chat.data.packing import pack

    tokenizer, rows = encoder_hub.backbone.tokenizer, ["good film", "bad plot 3", "song"]
    ids = [tuple(tokenizer(text).input_ids) for text in rows]
    batch = pack([[Encoded(i, ((0,), (1,))) for i in ids]], 40)
    with torch.no_grad():
        found = encoder_hub.model.features(batch)[::2]
        theirs = (
            AutoModelForSequenceClassification.from_pretrained(encoder_folder).eval().base_model
        )
        for feature, one in zip(found, ids, strict=True):
            out = theirs(torch.tensor([one]))
            first = encoder_hub.backbone.pooling == "first"
            wanted = out.pooler_output[0] if first else out.last_hidden_state[0].mean(0)
            torch.testing.assert_close(feature, wanted, atol=1e-5, rtol=1e-5)


def test_joint_training_equals_training_each_alone(encoder_hub):
    model, tokenizer = encoder_hub.model, encoder_hub.backbone.tokenizer
    config = TrainConfig(**SETTINGS | {"max_steps": 6})
    jobs = [make_job(tokenizer, t.name, t, config) for t in (toy_task(), topics())]
    together = train(model, jobs)
    for job in jobs:
        (alone,) = train(model, [job]).values()
        mine = together[job.name]
        assert mine.best_loss == pytest.approx(alone.best_loss, rel=1e-4)
        for a, b in zip(mine.weights.tensors(), alone.weights.tensors(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    assert together["toy"].weights.head.shape == (2, 32)
    assert together["topics"].weights.head.shape == (10, 32)


def test_concatenated_adapters_add_their_updates_and_heads(encoder_hub):
    model = encoder_hub.model
    one, two = random_weights(model), random_weights(model, seed=2)
    model.load("one", one)
    model.load("two", two)
    model.load("sum", concatenate([one, two]))
    mixed = texts_of(encoder_hub, ["good film"], [{"one": 1, "two": 1}])
    summed = texts_of(encoder_hub, ["good film"], ["sum"])
    torch.testing.assert_close(mixed, summed, atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterError, match="heads of 2, 3 labels"):
        concatenate([one, random_weights(model, labels=3)])


# ---- files ---------------------------------------------------------------------------------------


class Mean(nn.Module):
    """What stands for BERT's pooling layer where features are means."""

    def forward(self, hidden):
        return hidden.mean(1)


def test_peft_loads_the_folder_with_equal_logits(trained, encoder_folder):
    folder = trained.pool.path("topics")
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=10)
    if trained.backbone.pooling == "mean":
        base.bert.pooler = Mean()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    text = "tale 5"
    with torch.no_grad():
        wanted = theirs(**trained.backbone.tokenizer(text, return_tensors="pt")).logits
    torch.testing.assert_close(texts_of(trained, [text], ["topics"]), wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_saved_by_peft_is_loaded_with_its_head(encoder_hub, encoder_folder, tmp_path):
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3)
    if encoder_hub.backbone.pooling == "mean":
        base.bert.pooler = Mean()
    wanted = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, wanted).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="unverified"):
        encoder_hub.load(tmp_path / "theirs", "theirs")
    with torch.no_grad():
        logits = theirs(**encoder_hub.backbone.tokenizer("good", return_tensors="pt")).logits
    mine = texts_of(encoder_hub, ["good"], ["theirs"])
    torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_the_same_after_saving_and_loading(trained, encoder_folder):
    again = AdapterHub(str(encoder_folder), trained.pool.root, dtype="fp32", device="cpu")
    assert again.verify("toy").status == "exact"
    assert again.predict("toy", ["good song"]) == trained.predict("toy", ["good song"])
    stored, config, _ = read_folder(trained.pool.path("topics"))
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    kept = trained.model.weights("topics")
    assert torch.equal(kept.head.weight, stored.head.weight)
    assert torch.equal(kept.head.bias, stored.head.bias)


def changed(folder, tmp_path, tensors=None, config=None):
    """A copy of an adapter folder, without manifest, some tensors and settings changed (None: away)."""
    found = load_file(folder / WEIGHTS) | (tensors or {})
    copy = tmp_path / "changed"
    copy.mkdir()
    save_file({k: v for k, v in found.items() if v is not None}, copy / WEIGHTS)
    settings = json.loads((folder / CONFIG).read_text()) | (config or {})
    (copy / CONFIG).write_text(json.dumps(settings))
    return copy


WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"
MISFITS = {
    "a bias of another size": ({BIAS: torch.zeros(3)}, {}, "a weight"),
    "no bias": ({BIAS: None}, {}, "has no bias"),
    "no head at all": ({WEIGHT: None, BIAS: None}, {}, "lacks a head"),
    "another width": ({WEIGHT: torch.zeros(2, 31)}, {}, "features have width 32"),
    "not a number": ({BIAS: torch.tensor([0.0, float("nan")])}, {}, "not finite"),
    "too large": ({BIAS: torch.tensor([0.0, 1e9])}, {}, "bias holds 1e"),
    "whole numbers": ({BIAS: torch.zeros(2, dtype=torch.int64)}, {}, "make no head"),
    "too many labels": (
        {WEIGHT: torch.zeros(5000, 32), BIAS: torch.zeros(5000)}, {}, "at most 4096 labels"
    ),
    "another module": ({"base_model.model.score.weight": torch.zeros(2, 32)}, {}, "not a LoRA factor"),
    "no word of it": ({}, {"modules_to_save": None}, "go together"),
    "another word": ({}, {"modules_to_save": ["classifier", "embeddings"]}, "replaced modules"),
    "another kind": ({}, {"task_type": "CAUSAL_LM"}, "go together"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_the_guard_refuses_an_invalid_head(case, encoder_hub, tmp_path):
    tensors, config, why = MISFITS[case]
    model = encoder_hub.model
    model.load("two", random_weights(model))
    keep_adapter(encoder_hub, random_weights(model))
    folder = changed(encoder_hub.pool.path("toy"), tmp_path, tensors, config)
    with pytest.raises(AdapterError, match=why):
        encoder_hub.load(folder, "changed")
    assert not encoder_hub.verify(folder).ok
    assert encoder_hub.model.names == ("two", "toy")


def test_encoders_need_a_head_and_others_refuse_it(encoder_hub, hub, make_weights, tmp_path):
    lacking = initial_weights(encoder_hub.model.shapes, rank=4, alpha=8, seed=1)
    with pytest.raises(AdapterError, match="no head"):
        encoder_hub.model.load("lacking", lacking)
    with pytest.raises(AdapterError, match="have no head"):
        write_gguf(tmp_path / "a.gguf", random_weights(encoder_hub.model), {"model_type": "bert"})
    head = Head(torch.zeros(2, 32), torch.zeros(2))
    with pytest.raises(AdapterError, match="a language model does not use"):
        hub.model.load("heady", replace(make_weights(), head=head))


# ---- transfer and the Hub ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["finetune", "stack", "language", "maxent", "adversarial"])
def test_a_transfer_keeps_the_head(trained, method):
    target = toy_task("target")
    backwards = dict(reversed(target.contract.labels.items()))
    target = replace(target, contract=replace(target.contract, labels=backwards))
    settings = QUICK | {"row_length": 64, "max_steps": 4, "learning_rate": 1e-3}
    done = trained.transfer("toy", target, method, shots=4, source_task=toy_task(), **settings)
    candidates = done.outcome.candidates
    held_out = target.split("validation")
    asked = trained.predict("toy", [example.fields for example in held_out])
    right = [one.label == e.answer for one, e in zip(asked, held_out, strict=True)]
    as_it_is = candidates["source"].value  # its labels in the target's order
    assert as_it_is == pytest.approx(sum(right) / len(right))
    assert as_it_is > 0.7
    assert list(done.manifest.contract.labels) == ["good", "bad"]
    if method in ("finetune", "stack"):
        assert candidates[method].value >= as_it_is - 0.1


def test_the_head_is_in_the_order_of_the_adapters_labels(trained):
    """A source task may have the same labels in another order than those that the adapter learnt."""
    turned = toy_task()
    labels = dict(reversed(turned.contract.labels.items()))
    turned = replace(turned, contract=replace(turned.contract, labels=labels))
    how = QUICK | {"row_length": 64, "max_steps": 2, "learning_rate": 1e-3}
    values = [
        trained.transfer("toy", toy_task("target"), "finetune", shots=4, source_task=task, **how)
        .outcome.candidates["source"]
        .value
        for task in (toy_task(), turned)
    ]
    assert values[0] == values[1] > 0.7
    three = replace(turned, contract=replace(turned.contract, labels={**labels, "so": "so"}))
    with pytest.raises(DataError, match="they must be the same"):
        trained.transfer("toy", three, "finetune", shots=4, source_task=three, **how)


def test_an_encoder_learns_a_language_by_restoring_masked_texts(encoder_hub):
    model, task = encoder_hub.model, toy_task()
    cover = model.backbone.tokenizer.mask_token_id
    config = TrainConfig(**SETTINGS)
    job = text_job(model, task.contract, task.split("train"), config)
    again = text_job(model, task.contract, task.split("train"), config)
    assert job.train == again.train
    for example in job.train:
        assert example.weight == 0  # no label is learnt
        assert 0 < example.prompt.count(cover) < len(example.prompt)
    learnt = train(model, [job])["language"].weights
    assert not learnt.head.weight.any()
    model.load("learnt", learnt)
    losses = []
    for name in (None, "learnt"):
        with torch.inference_mode():
            vectors = torch.cat([pooled_of(model, example, name) for example in job.train])
        losses.append(float(job.auxiliary.loss(HiddenStates(job.train, vectors, vectors))))
    assert losses[1] < 0.8 * losses[0]
    empty = [Example({"text": ""}, "good")]
    assert not text_job(model, PromptContract(), empty, config).train


def test_a_transfer_to_other_labels_is_refused(trained):
    with pytest.raises(DataError, match="they must be the same"):
        trained.transfer("toy", topics(), source_task=toy_task(), shots=4)


def test_push_and_pull(trained, hub_server, monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    speak = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    trained.push("toy", "alice/toy", **speak)
    trained.pull("alice/toy", name="pulled", **speak)
    for row, pulled in zip(
        *(trained.predict(n, ["good song"]) for n in ("toy", "pulled")), strict=True
    ):
        assert pulled == replace(row, adapter="pulled")
    assert (
        "pipeline_tag: text-classification" in (trained.pool.path("toy") / "README.md").read_text()
    )
