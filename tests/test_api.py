"""AdapterHub: rows, scopes and threads never see each other's adapters; wrong input changes nothing."""

from __future__ import annotations

import re
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from pico import VOCABULARY, toy_answers, toy_talk, toy_task
from transformers import AutoModelForCausalLM

from adapterhub_chat import AdapterHub, EngineOptions, Message, Mix, Score
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.errors import (
    AdapterError,
    AdapterHubError,
    ConfigError,
    DataError,
    UnknownNameError,
    UsageError,
)
from adapterhub_chat.events import Listeners
from adapterhub_chat.types import Example, PromptContract

QUICK = {"max_steps": 3, "rows_per_step": 1, "row_length": 128, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def trained(pico_folder, tmp_path_factory):
    """A pool of three adapters that were trained for a moment."""
    folder = tmp_path_factory.mktemp("trained") / "pool"
    hub = AdapterHub(str(pico_folder), folder, dtype="fp32", device="cpu")
    hub.train([toy_task(), toy_answers(), toy_talk()], test_examples=4, **QUICK)
    return folder


@pytest.fixture
def hub(pico_folder, trained, tmp_path):
    """A hub of its own with the trained pool; nothing is loaded."""
    shutil.copytree(trained, tmp_path / "pool")
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def reference(pico_folder):
    return AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32).eval()


def asked(text):
    return [{"role": "user", "content": text}]


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- one mixed batch -----------------------------------------------------------------------------

ROWS = (
    ("toy", "good film"),
    ({"toy": 0.5, "talk": 0.5}, "Hello there"),
    (None, "good film"),
    ("backbone", "Which song?"),
    ("answers", "Which song?"),
    ({"talk": 1.0, "answers": -0.5}, "Hello there"),
    (Mix((("talk", 1.0),)), "Hello there"),
    ({"toy": 0.0, "backbone": 1.0}, "good film"),
)


def test_each_row_of_a_chat_batch_equals_a_single_request(hub):
    choices = [choice for choice, _ in ROWS]
    conversations = [asked(text) for _, text in ROWS]
    together = hub.chat(conversations, adapters=choices, max_new_tokens=12)
    alone = [hub.chat([asked(t)], adapters=[c], max_new_tokens=12)[0] for c, t in ROWS]
    assert together == alone
    assert together[2] == together[7]  # no weight at all is the backbone
    assert len(set(together)) == len(ROWS) - 1


def test_raw_rows_and_logits_equal_single_requests(hub):
    choices, prompts = [c for c, _ in ROWS], [t for _, t in ROWS]
    texts = hub.generate(prompts, adapters=choices, max_new_tokens=9, ignore_eos=True)
    logits = hub.next_token_logits(prompts, adapters=choices)
    assert (logits.shape, logits.dtype) == ((len(ROWS), VOCABULARY), torch.float32)
    for i, (choice, prompt) in enumerate(ROWS):
        (text,) = hub.generate([prompt], adapters=[choice], max_new_tokens=9, ignore_eos=True)
        assert text == texts[i]
        (row,) = hub.next_token_logits([prompt], adapters=[choice])
        torch.testing.assert_close(row, logits[i], atol=2e-5, rtol=1e-5)
    assert len({tuple(row.tolist()) for row in logits}) >= 6


def test_rows_without_an_adapter_equal_transformers(hub, reference):
    prompts = ["good film", "a", "Which song is it then?"]
    found = hub.next_token_logits([*prompts, "good"], adapters=[None, "backbone", None, "toy"])
    tokenizer = hub.backbone.tokenizer
    for prompt, row in zip(prompts, found, strict=False):
        with torch.no_grad():
            wanted = reference(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        torch.testing.assert_close(row, wanted, atol=2e-5, rtol=1e-5)


def test_each_row_is_prompted_and_stopped_by_its_contract(hub):
    """What chat sends is the adapter's own template, system turn and stops: as raw prompts, the same."""
    render = hub.backbone.tokenizer.apply_chat_template
    system = {"toy": "Judge.", "answers": "Answer."}
    turns = {
        "toy": [{"role": "system", "content": "Judge."}, *asked("Review: good")],
        "answers": [{"role": "system", "content": "Answer."}, *asked("Which?")],
        "backbone": asked("Which?"),
    }
    said = {"toy": "good", "answers": "Which?", "backbone": "Which?"}
    raw = [render(t, tokenize=False, add_generation_prompt=True) for t in turns.values()]
    wanted = hub.generate(raw, adapters=list(turns), max_new_tokens=6, stop="\n")
    found = hub.chat([asked(t) for t in said.values()], adapters=list(said), max_new_tokens=6)
    assert [w.strip() for w in wanted][1] == found[1]
    plain = hub.generate(raw, adapters=list(turns), max_new_tokens=6)
    assert [plain[0].strip(), plain[2].strip()] == [found[0], found[2]]
    own = [{"role": "system", "content": system["toy"]}, *asked("good")]  # not templated again
    assert hub.chat([own], adapters=["toy"]) == [
        text.strip()
        for text in hub.generate(
            [render(own, tokenize=False, add_generation_prompt=True)], ["toy"], max_new_tokens=4
        )
    ]


def test_streaming_tells_each_rows_text_piece_by_piece(hub):
    heard = {}
    texts = hub.chat(
        [asked(text) for _, text in ROWS],
        adapters=[choice for choice, _ in ROWS],
        max_new_tokens=20,
        on_text=lambda row, piece: heard.setdefault(row, []).append(piece),
    )
    assert {row: "".join(pieces) for row, pieces in heard.items()} == {
        i: text for i, text in enumerate(texts) if text
    }


def test_chat_samples_by_seed_and_greedily_at_zero(hub):
    def say(**options):
        return hub.chat([asked("Hello")] * 2, ["talk", None], max_new_tokens=10, **options)

    assert say(temperature=1.0, seed=3) == say(temperature=1.0, seed=3)
    assert say(temperature=1.0, seed=3) != say(temperature=1.0, seed=4)
    assert say(temperature=0) == say() == say(seed=3)


# ---- hub.use -------------------------------------------------------------------------------------


def test_use_is_the_default_inside_its_block_only(hub):
    plain, toy, talk = (
        hub.generate(["good film"], adapters=[n], max_new_tokens=8) for n in (None, "toy", "talk")
    )
    assert len({*plain, *toy, *talk}) == 3

    def now():
        return hub.generate(["good film"], max_new_tokens=8)

    assert now() == plain
    with hub.use("toy") as same:
        assert same is hub
        assert now() == toy
        with hub.use("talk"):
            assert now() == talk
            with hub.use(None):
                assert now() == plain
            assert hub.generate(["good film"], adapters=["toy"], max_new_tokens=8) == toy
            assert now() == talk
        assert now() == toy
        assert hub.chat([asked("x")]) == hub.chat([asked("x")], adapters=["toy"])
    assert now() == plain


def test_use_ends_when_an_error_leaves_the_block(hub):
    plain = hub.generate(["good film"], max_new_tokens=8)
    ids = torch.tensor([[5, 6, 7]])
    bare = hub.backbone.model(ids).logits
    with hub.use("talk"):
        before = hub.generate(["good film"], max_new_tokens=8)
        with pytest.raises(KeyError), hub.use("toy"):
            raise KeyError("boom")
        with pytest.raises(UnknownNameError), hub.use("nobody"):
            pass
        assert hub.generate(["good film"], max_new_tokens=8) == before
    with pytest.raises(KeyboardInterrupt), hub.use("toy"):
        raise KeyboardInterrupt
    assert hub.generate(["good film"], max_new_tokens=8) == plain
    assert torch.equal(hub.backbone.model(ids).logits, bare)


def test_use_acts_on_the_transformers_model(hub):
    tokenizer, model = hub.backbone.tokenizer, hub.backbone.model
    ids = torch.tensor([tokenizer("good film").input_ids] * 3)
    bare = model(ids).logits
    for choice in ("toy", {"toy": 0.5, "talk": -1.0}):
        wanted = hub.next_token_logits(["good film"], adapters=[choice])
        with hub.use(choice):
            inside = model(ids).logits[:, -1]
            spoken = model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        torch.testing.assert_close(inside, wanted.expand(3, -1), atol=2e-5, rtol=1e-5)
        (text,) = hub.generate(["good film"], [choice], max_new_tokens=6)
        new = spoken[0, ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text
    assert torch.equal(model(ids).logits, bare)


def test_an_adapter_unloaded_meanwhile_comes_back_from_the_pool(hub):
    with hub.use("toy"):
        before = hub.generate(["good film"], max_new_tokens=8)
        hub.unload("toy")
        assert hub.generate(["good film"], max_new_tokens=8) == before


# ---- threads -------------------------------------------------------------------------------------


def test_threads_with_two_adapters_never_see_each_others(hub):
    """In step, by a barrier, so that forwards overlap: every answer is the thread's own adapter's."""
    names = ("toy", "talk", "answers", None)
    prompt = "good film"
    wanted = {n: hub.generate([prompt], [n], max_new_tokens=6) for n in names}
    assert len({text for (text,) in wanted.values()}) == len(names)
    logits = {n: hub.next_token_logits([prompt], [n]) for n in names}
    ids = torch.tensor([hub.backbone.tokenizer(prompt).input_ids])
    barrier = threading.Barrier(len(names), timeout=60)

    def work(name):
        for turn in range(30):
            barrier.wait()
            if turn % 2:
                assert hub.generate([prompt], [name], max_new_tokens=6) == wanted[name]
                continue
            with hub.use(name):
                barrier.wait()  # everybody is inside a scope of their own
                found = hub.backbone.model(ids).logits[:, -1].detach()
                assert hub.generate([prompt], max_new_tokens=6) == wanted[name]
                torch.testing.assert_close(found, logits[name], atol=2e-5, rtol=1e-5)

    with ThreadPoolExecutor(len(names)) as pool:
        for done in [pool.submit(work, name) for name in names]:
            done.result()


def test_the_usual_sampling_options(hub):
    greedy = hub.generate(["good film"], max_new_tokens=16, ignore_eos=True)
    options = {"max_new_tokens": 16, "ignore_eos": True, "seed": 3}
    assert hub.generate(["good film"], temperature=5.0, top_k=1, **options) == greedy
    assert hub.generate(["good film"], temperature=5.0, top_k=50, **options) != greedy
    assert hub.generate(["good film"], repetition_penalty=1e4, **options) != greedy


def test_adapters_load_and_unload_during_generation(hub):
    """Load, unload and replace in one thread; the rows of another stay what they are."""
    wanted = hub.generate(["good film"] * 2, ["toy", None], max_new_tokens=16, ignore_eos=True)
    stop = threading.Event()

    def churn():
        turns = 0
        while not stop.is_set():
            hub.load("talk", f"extra-{turns % 6}")
            hub.load("answers")
            hub.unload(f"extra-{turns % 6}")
            if turns % 2:
                hub.unload("answers")
            hub.adapters()
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            for _ in range(60):
                assert (
                    hub.generate(
                        ["good film"] * 2, ["toy", None], max_new_tokens=16, ignore_eos=True
                    )
                    == wanted
                )
        finally:
            stop.set()
        assert churning.result() > 3


def test_unloading_an_adapter_lets_running_requests_finish(hub):
    """The rows of `toy` end first (4 tokens, by its contract); the other one's slot is then another's."""
    conversations = [asked(p) for p in ("good film", "a", "Hello")]
    names = ["toy", "toy", "talk"]
    wanted = hub.chat(conversations, names)

    others = iter(range(100))

    def replace_all(row, piece):
        for name in {"toy", "talk"} & {*hub.model.names}:
            hub.unload(name)
        if len(hub.model.names) < 2:
            hub.load("answers", f"other-{next(others)}")

    assert hub.chat(conversations, names, on_text=replace_all) == wanted
    assert hub.model.names == ("other-0", "other-1")


# ---- predict -------------------------------------------------------------------------------------


def label_shares(hub, name, prompt, words):
    """Likelihoods of the words after a prompt, by plain forwards of transformers' own object."""
    tokenizer = hub.backbone.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    likely = []
    for word in words:
        answer = tokenizer(word, add_special_tokens=False).input_ids
        with hub.use(name), torch.no_grad():
            logits = hub.backbone.model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
        at = range(len(ids) - 1, len(ids) + len(answer) - 1)
        likely.append(sum(logits[i, t] for i, t in zip(at, answer, strict=True)))
    return torch.stack(likely).softmax(-1).tolist()


def test_predict_scores_labels_by_their_likelihood(hub):
    texts = ["good film", "bad plot and a bad cast", "a"]
    found = hub.predict("toy", texts)
    render = hub.backbone.tokenizer.apply_chat_template
    for text, prediction in zip(texts, found, strict=True):
        turns = [{"role": "system", "content": "Judge."}, *asked(f"Review: {text}")]
        prompt = render(turns, tokenize=False, add_generation_prompt=True)
        shares = label_shares(hub, "toy", prompt, ["negative", "positive"])
        assert list(prediction.scores) == ["bad", "good"]
        assert list(prediction.scores.values()) == pytest.approx(shares, abs=1e-5)
        assert sum(prediction.scores.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.label == max(prediction.scores, key=prediction.scores.get)
        assert prediction.output == {"bad": "negative", "good": "positive"}[prediction.label]
        assert prediction.adapter == "toy"


def test_predict_takes_texts_and_fields_and_answers_in_order(hub):
    questions = ["Which song?", "What then, in many more words than before?", "Who?"]
    found = hub.predict("answers", questions)
    by_field = hub.predict("answers", [{"question": q} for q in questions])
    by_text = hub.predict("answers", [{"text": q, "more": "unused"} for q in questions])
    assert found == by_field == by_text
    assert found == [hub.predict("answers", [q])[0] for q in questions]
    assert [p.output for p in found] == hub.chat([asked(q) for q in questions], ["answers"] * 3)
    assert all((p.label, p.scores) == (None, {}) for p in found)
    assert hub.predict("toy", []) == hub.predict("answers", []) == []


def test_predict_by_another_task_than_the_adapters_own(hub):
    task = toy_task()
    by_task = hub.predict("talk", ["good film"], task=task)
    assert by_task[0].adapter == "talk"
    assert list(by_task[0].scores) == ["bad", "good"]
    assert by_task != hub.predict("toy", ["good film"])
    (bare,) = hub.predict(None, ["good film"], task=task)
    assert bare.adapter == "backbone"
    (mixed,) = hub.predict({"toy": 0.5, "talk": 0.5}, ["good film"])
    assert mixed.adapter == "toy=0.5 talk=0.5"
    assert mixed.label in ("bad", "good")


def test_predict_names_every_input_that_does_not_fit(hub):
    with pytest.raises(DataError) as caught:
        hub.predict("answers", ["fine", {"wrong": "x"}, 3, {"question": "\ud800"}, {}])
    message = str(caught.value)
    assert "input 2 has wrong; the task needs 'question' (or 'text')" in message
    assert "input 3 is neither a text nor fields by name: 3" in message
    assert "input 4: " in message
    assert "input 5 has no field" in message
    two = replace(toy_answers(), contract=PromptContract(template="{context} {question}"))
    with pytest.raises(DataError, match=r"input 1: the prompt needs the field context"):
        hub.predict("answers", ["Which?"], task=two)
    with pytest.raises(DataError, match="and 5 more"):
        hub.predict("answers", [{}] * 15)
    with pytest.raises(UsageError, match="has no prompt contract; name a task"):
        hub.predict(None, ["x"])


def test_predict_reports_progress(hub):
    for name in ("toy", "answers"):
        told = []
        hub.predict(name, ["x"] * 40, listeners=Listeners(on_judged=lambda *w, t=told: t.append(w)))
        assert {what for what, _ in told} == {name}
        assert sum(n for _, n in told) == 40


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda h: h.chat(["hello"]), "a conversation must be a list, not one str"),
        (lambda h: h.chat("hello"), "conversations must be a list"),
        (lambda h: h.chat(asked("hello")), "a conversation must be a list, not one dict"),
        (lambda h: h.chat([[]]), "must end with a message whose role is 'user'"),
        (lambda h: h.chat([["hello"]]), "must be a Message or a mapping, not 'hello'"),
        (lambda h: h.chat([[{"role": "bot", "content": "x"}]]), "system, user or assistant"),
        (lambda h: h.chat([[{"role": "user"}]]), "and a text content"),
        (lambda h: h.chat([[{"role": "user", "content": 3}]]), "and a text content"),
        (lambda h: h.chat([[Message("assistant", "x")]]), "must end with a message whose role"),
        (lambda h: h.chat([asked("x")], adapters=["toy", None]), "1 rows but 2 adapters"),
        (lambda h: h.chat([asked("x")], adapters="toy"), "adapters must be a list"),
        (lambda h: h.chat([asked("x")] * 2, adapters={"toy": 1, "talk": 1}), "adapters must be a"),
        (lambda h: h.chat([asked("x")], max_new_tokens=0), "max_new_tokens=0 must be"),
        (lambda h: h.generate("hello"), "prompts must be a list, not one str: 'hello'"),
        (lambda h: h.generate(["a", ""]), "prompt 1 is empty"),
        (lambda h: h.generate(["a", 3]), "prompt 1 must be a text, not 3"),
        (lambda h: h.generate(["\ud800"]), "prompt 0 is not valid Unicode"),
        (lambda h: h.chat([asked("\ud800")]), "a message is not valid Unicode"),
        (lambda h: h.generate(["a"], stop=["\n", ""]), "empty text"),
        (lambda h: h.generate(["a"], top_p=0), r"top_p=0 must lie in \(0, 1\]"),
        (lambda h: h.next_token_logits("hello"), "prompts must be a list"),
        (lambda h: h.predict("toy", "a film"), "inputs must be a list"),
        (lambda h: h.predict("toy", {"text": "a film"}), "inputs must be a list"),
        (lambda h: h.predict("nobody", ["x"]), "unknown adapter 'nobody'; known: answers, talk, t"),
        (lambda h: h.predict("toy", ["x"], task="nothing"), "unknown task 'nothing'; known: "),
        (lambda h: h.chat([asked("x")], adapters=["nobody"]), "unknown adapter 'nobody'"),
        (lambda h: h.chat([asked("x")], adapters=[{"nobody": 0.5}]), "unknown adapter 'nobody'"),
        (lambda h: h.unload("nobody"), "unknown adapter 'nobody'"),
        (lambda h: h.load("nobody"), "unknown adapter 'nobody'; known: answers, talk, toy"),
        (lambda h: h.load("toy", "backbone"), "'backbone' is a reserved word"),
        (lambda h: h.evaluate(["nobody"]), "unknown adapter 'nobody'"),
        (lambda h: h.evaluate("toy"), "adapters must be a list"),
        (lambda h: h.evaluate(["toy"], "toy"), "tasks must be a list"),
        (lambda h: h.evaluate(["toy"], ["nothing"]), "unknown task 'nothing'"),
        (lambda h: h.evaluate(["backbone"]), "does not say what it was trained on; name tasks"),
        (lambda h: h.train("toy"), "tasks must be a list"),
        (lambda h: h.train([]), "nothing to train"),
        (lambda h: h.train(["nothing"]), "unknown task 'nothing'; known: .*sentiment"),
        (
            lambda h: h.train([toy_task()], how="both"),
            "how: input should be .*; got 'both'",
        ),
        (lambda h: h.train([toy_task(), toy_task()]), "adapter names must differ: toy, toy"),
        (lambda h: h.train([toy_task()], names=["a", "b"]), "1 tasks but 2 names"),
        (lambda h: h.train([toy_task()], names=["backbone"]), "'backbone' is a reserved word"),
        (lambda h: h.train([toy_task()], names=["../toy"]), "adapter name '../toy': allowed are"),
        (
            lambda h: h.train([toy_task()], settings={"x": {}}),
            "settings for x, but this run trains",
        ),
        (lambda h: h.train([toy_task()], targets="q_prj"), "no linear layer named q_prj; allowed"),
    ],
)
def test_invalid_input_is_an_error_without_effect(hub, call, wanted):
    before = snapshot(hub.pool.root)
    with pytest.raises(UsageError, match=wanted):
        call(hub)
    assert snapshot(hub.pool.root) == before
    assert hub.model.names == () or all(n in hub.pool for n in hub.model.names)


def test_misfits_of_settings_are_listed_together(hub):
    with pytest.raises(ConfigError) as caught:
        hub.train([toy_task()], rank=0, lr=3, schedule="square")
    assert len(caught.value.misfits) == 3
    assert "lr: no such key; allowed: alpha" in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_without_data_is_named(hub, split):
    task = toy_task("bare")
    parts = {k: v for k, v in task.splits.parts.items() if k != split}
    bare = replace(task, load=lambda: Splits(parts))
    with pytest.raises(DataError, match=f"task 'bare' has no {split}(ing)? examples"):
        (hub.train if split == "train" else lambda t, **_: hub.evaluate(["toy"], t))(
            [bare], **QUICK
        )
    assert "bare" not in hub.pool


def test_a_pool_that_is_a_file_is_refused(pico_folder, tmp_path):
    (tmp_path / "pool").write_text("")
    with pytest.raises(AdapterHubError, match="is a file, not a folder"):
        AdapterHub(str(pico_folder), tmp_path / "pool", device="cpu")


# ---- what is there -------------------------------------------------------------------------------


def test_adapters_tell_what_is_stored_and_what_is_loaded(hub, tmp_path):
    assert [i.name for i in hub.adapters()] == ["answers", "talk", "toy"]
    assert not any(i.loaded for i in hub.adapters())
    assert {i.status for i in hub.adapters()} == {"exact"}
    hub.load("toy")
    plain = tmp_path / "plain"
    shutil.copytree(hub.pool.root / "talk", plain)
    (plain / "adapterhub.json").unlink()
    with pytest.warns(UserWarning, match="unverified"):
        assert hub.load(plain, "mine") == "mine"
    found = {i.name: i for i in hub.adapters()}
    assert list(found) == ["answers", "mine", "talk", "toy"]
    assert [found[n].loaded for n in found] == [False, True, False, True]
    assert (found["mine"].status, found["mine"].task) == ("unverified", "")
    toy = found["toy"]
    assert (toy.task, toy.status, toy.rank) == ("toy", "exact", 8)
    assert toy.parameters == hub.model.weights("toy").num_parameters > 1000
    assert [type(s) for s in toy.scores] == [Score]
    assert found["answers"].scores[0].metric == "token_f1"
    hub.model.load("on trial", hub.model.weights("toy"))  # a slot that is nobody's adapter
    assert [i.name for i in hub.adapters()] == list(found)


def test_a_damaged_adapter_does_not_hide_the_others(hub):
    (hub.pool.root / "talk" / "adapterhub.json").write_text("{")
    found = {i.name: (i.status, i.loaded) for i in hub.adapters()}
    assert found == {
        "answers": ("exact", False),
        "talk": ("refused", False),
        "toy": ("exact", False),
    }
    with pytest.raises(AdapterError):
        hub.load("talk")


def test_evaluate_measures_what_it_is_asked_to(hub):
    task, other = toy_task(), toy_talk()
    found = hub.evaluate(["toy", None, {"toy": 0.5, "talk": 0.5}], [task, other], limit=6)
    assert [(s.adapter, s.task, s.n) for s in found] == [
        (a, t, 6) for t in ("toy", "talk") for a in ("toy", "backbone", "toy=0.5 talk=0.5")
    ]
    assert all(s.backbone_value == found[3 * (i // 3) + 1].value for i, s in enumerate(found))


def test_scores_are_stored_in_the_manifests_of_their_adapters(hub, tmp_path):
    shutil.copytree(hub.pool.root / "talk", tmp_path / "mine")
    hub.load(tmp_path / "mine")
    before = {name: hub.pool.manifest(name) for name in hub.pool.names()}
    other = toy_task("other", flip=True)
    found = hub.evaluate(["toy", "mine", None, {"toy": 0.5}], [other], limit=6, save=True)
    assert hub.pool.manifest("toy").scores == (*before["toy"].scores, found[0])
    assert hub.pool.names() == list(before)
    assert all(hub.pool.manifest(name) == before[name] for name in ("talk", "answers"))
    assert hub.verify("toy").ok
    again = hub.evaluate(["toy"], [other], limit=6, save=True)
    assert hub.pool.manifest("toy").scores == (*before["toy"].scores, *again)


def test_a_task_file_that_is_elsewhere_must_be_named(hub):
    with pytest.raises(
        UsageError, match=r"'toy' was trained on the task 'toy'.*--task path/to/toy"
    ):
        hub.evaluate(["toy"])


def test_evaluating_an_empty_pool_is_an_error(pico_folder, tmp_path):
    hub = AdapterHub(str(pico_folder), tmp_path / "new", dtype="fp32", device="cpu")
    with pytest.raises(UsageError, match="nothing to evaluate: name adapters, or train some into"):
        hub.evaluate()
    assert hub.adapters() == []
    assert not (tmp_path / "new").exists()


# ---- training ------------------------------------------------------------------------------------


def test_trained_adapters_are_saved_loaded_and_measured(hub):
    heard = []
    manifests = hub.train(
        [toy_task(), toy_answers()],
        names=["one", "two"],
        how="sequence",
        settings={"two": {"rank": 4}},
        test_examples=5,
        listeners=Listeners(on_event=heard.append),
        **QUICK,
    )
    assert list(manifests) == ["one", "two"]
    assert set(manifests) <= set(hub.model.names)
    for name, rank in (("one", 8), ("two", 4)):
        manifest = manifests[name]
        assert manifest == hub.pool.manifest(name)
        assert manifest.training.settings["rank"] == rank
        assert manifest.training.how == "sequence"
        assert [(s.adapter, s.n) for s in manifest.scores] == [(name, 5)]
        assert hub.evaluate([name], [toy_task() if name == "one" else toy_answers()], limit=5) == [
            *manifest.scores
        ]
        assert hub.verify(name).status == "exact"
    assert [e.adapter for e in heard if e.kind == "stop"] == ["one", "two"]
    assert hub.train([toy_talk()], test_examples=0, **QUICK)["talk"].scores == ()


def interrupt_at(kind, step, adapter=None):
    def hear(event):
        if (event.kind, event.step) == (kind, step) and adapter in (None, event.adapter):
            raise KeyboardInterrupt

    return Listeners(on_event=hear)


LONG = {**QUICK, "max_steps": 40, "epochs": 500, "eval_every": 4}


def test_ctrl_c_keeps_what_was_best_and_says_so(hub):
    with pytest.warns(UserWarning, match="interrupted: the best so far of a, b is saved"):
        found = hub.train(
            [toy_task(), toy_talk()],
            names=["a", "b"],
            listeners=interrupt_at("step", 9, "b"),
            **LONG,
        )
    assert {(m.training.stopped, m.training.best_step) for m in found.values()} == {
        ("interrupted", 8)
    }
    assert {m.scores for m in found.values()} == {()}
    assert hub.verify("a").ok
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upto = hub.train(
            [toy_task()], names=["c"], test_examples=0, **{**LONG, "schedule": "constant"}
        )
    assert upto["c"].training.stopped in ("finished", "early")


def test_ctrl_c_between_validations_keeps_the_steps_so_far(hub):
    with pytest.warns(UserWarning, match="interrupted"):
        found = hub.train([toy_task()], names=["a"], listeners=interrupt_at("step", 2), **LONG)
    assert (found["a"].training.best_step, found["a"].training.validation_loss) == (2, None)
    logits = hub.next_token_logits(["good"] * 2, adapters=["a", None])
    assert not torch.equal(*logits)


def test_ctrl_c_in_the_second_of_a_sequence_keeps_the_first(hub):
    with pytest.warns(UserWarning, match="interrupted"):
        found = hub.train(
            [toy_task(), toy_talk()],
            names=["a", "b"],
            how="sequence",
            listeners=interrupt_at("step", 2, "b"),
            **LONG,
        )
    assert [m.training.stopped for m in found.values()][-1] == "interrupted"
    assert found["a"].training.stopped in ("finished", "early")
    assert {"a", "b"} <= set(hub.pool.names())


def test_an_untrained_adapter_never_replaces_a_stored_one(hub, monkeypatch):
    before = snapshot(hub.pool.root)
    with pytest.warns(UserWarning, match="'toy' is not saved: diverged before it learnt anything"):
        found = hub.train(
            [toy_task()], **{**LONG, "learning_rate": 1e30, "clip": 1e30, "warmup": 0}
        )
    assert found == {}
    assert snapshot(hub.pool.root) == before

    def press(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub.backbone.model, "forward", press)  # Ctrl-C in the first forward
    with (
        pytest.warns(UserWarning, match="interrupted before it learnt anything"),
        pytest.raises(KeyboardInterrupt),
    ):
        hub.train([toy_task()], **LONG)
    assert snapshot(hub.pool.root) == before


def test_ctrl_c_while_measuring_keeps_the_adapters(hub):
    def press(what, _n):
        if what == "talk":
            raise KeyboardInterrupt

    with (
        pytest.warns(UserWarning, match="interrupted: a, b are saved, but not all are measured"),
        pytest.raises(KeyboardInterrupt),
    ):
        hub.train(
            [toy_task(), toy_talk()],
            names=["a", "b"],
            listeners=Listeners(on_judged=press),
            **QUICK,
        )
    assert [len(hub.pool.manifest(name).scores) for name in ("a", "b")] == [1, 0]


def test_unusable_examples_leave_the_pool_unchanged(hub):
    before = snapshot(hub.pool.root)
    wrong = replace(
        toy_answers("fine"),
        load=lambda: Splits(dict.fromkeys(("train", "test"), (Example({"other": "x"}, "y"),) * 3)),
    )
    with pytest.raises(DataError, match="the prompt needs the field question"):
        hub.train([toy_task(), wrong], **QUICK)
    assert snapshot(hub.pool.root) == before


# ---- the engine's options ------------------------------------------------------------------------


def test_engine_options_reach_the_engine(pico_folder, tmp_path):
    options = EngineOptions(rows=3, queue=5, ram_bytes=1000)
    hub = AdapterHub(str(pico_folder), tmp_path, dtype="fp32", device="cpu", engine=options)
    assert (hub.engine.max_rows, hub.engine.max_queue) == (3, 5)
    assert hub._registry.host_cache.budget == 1000
    again = AdapterHub(str(pico_folder), tmp_path, dtype="fp32", device="cpu", rows=2)
    assert again.engine.max_rows == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "greater than or equal to 1"),
        ({"rowz": 1}, "rowz"),
        ({"engine": EngineOptions(), "rows": 2}, "give engine=... or rows, not both"),
    ],
)
def test_engine_options_are_checked(options, words, pico_folder, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(words)):
        AdapterHub(str(pico_folder), tmp_path, **options)
