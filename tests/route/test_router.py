"""Routing on the real thing, small: whom a message is for, nobody where none is close, what is stored."""

from __future__ import annotations

import base64
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from pico import WORDS, keep_adapter
from pydantic import ValidationError

from adapterhub_chat import AdapterHub, Message, Route
from adapterhub_chat.artifact.manifest import MAX_MANIFEST_BYTES, dump_manifest, read_manifest
from adapterhub_chat.artifact.prototype import Routing
from adapterhub_chat.cli.chat_session import ChatSession
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import AdapterError, ConfigError, UsageError
from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.route.arrow import arrows
from adapterhub_chat.route.choice import (
    FAR,
    LEAST,
    PLAIN,
    TYPICAL,
    AdapterScorers,
    Cascade,
    ScorerSet,
    choose,
)
from adapterhub_chat.route.fit import GLANCE_RANK, Fits, PrototypeScorer, fit_prototype
from adapterhub_chat.route.fit import _joint as joint
from adapterhub_chat.route.gaussians import fit_mixture
from adapterhub_chat.route.learn import message_of, messages_in, sample_background
from adapterhub_chat.route.message_features import (
    WIDEST,
    early_layer_features,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.route.message_features import _folded as folded
from adapterhub_chat.route.prototype import prototype_of, routing_of
from adapterhub_chat.route.text_features import LENGTH, NUM_LETTERS, NUM_WORDS, letters, words
from adapterhub_chat.types import Example, Mix, PromptContract

QUICK = {"max_steps": 1, "rows_per_step": 1, "learning_rate": 0.02, "test_examples": 0}


def questions(i):
    return f"Which {WORDS[i % 10]} is number {i} of the {WORDS[(i // 7) % 10]}s?"


def shouts(i):
    return (
        f"@AIRLINE {WORDS[i % 10].upper()} {WORDS[(i // 3) % 10].upper()} IS LATE {i}!!! #{i % 13}"
    )


def chinese(i):
    return "".join("请问这个电影什么时候开始好看吗票多少钱"[(i * j + j) % 19] for j in range(1, 9))


def plain_task(name, make, size=200):
    rows = tuple(Example({"text": make(i)}, "yes") for i in range(size))
    held = rows[3::4]
    train = tuple(row for i, row in enumerate(rows) if i % 4 != 3)
    parts = {"train": train, "validation": held[::2], "test": held[1::2]}
    return Task(name, PromptContract(max_new_tokens=4), "token_f1", lambda: Splits(parts))


TASKS = {f.__name__: plain_task(f.__name__, f) for f in (questions, shouts, chinese)}


@pytest.fixture(scope="module")
def trained(pico_folder, tmp_path_factory):
    hub = AdapterHub(
        str(pico_folder), tmp_path_factory.mktemp("routed"), dtype="fp32", device="cpu"
    )
    hub.train(list(TASKS.values()), **QUICK)
    return hub


def held_out(name):
    return [e.fields["text"] for e in TASKS[name].split("test")]


def test_a_message_goes_to_the_adapter_that_learnt_from_such(trained):
    for name in TASKS:
        found = [r.adapter for r in trained.routes(held_out(name))]
        assert found.count(name) >= 0.8 * len(found), (name, found)
        assert set(found) <= {name, "backbone"}
    one = trained.route(questions(1))
    assert isinstance(one, Route)
    assert one.mix.weights == (("questions", 1.0),)
    assert not one.abstained
    assert 0.5 < one.confidence <= 1
    assert "questions is the likeliest" in one.reason
    assert set(one.scores) == set(TASKS)
    assert sum(s["share"] for s in one.scores.values()) == pytest.approx(1)


# ---- nobody ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "far",
    [
        "def f(x):\n    return {x: [i for i in range(x)]}",
        "Как дела? Что нового сегодня?",
        "q" * 3000,
    ],
)
def test_what_is_like_no_adapters_messages_is_answered_by_the_backbone(trained, far):
    found = trained.route(far)
    assert found.abstained
    assert (found.adapter, found.mix) == ("backbone", Mix())
    assert found.confidence < 0.5
    assert "no adapter is close" in found.reason


def test_an_empty_message_is_nobodys(trained):
    found = trained.routes(["", questions(1), " \n "])
    assert [r.abstained for r in found] == [True, False, True]
    assert found[0].reason == "the message is empty"
    assert found[1] == trained.route(questions(1))


def test_an_empty_pool_is_said(hub):
    assert hub.route("Hello").abstained
    assert hub.route("Hello").reason == "the pool is empty"
    assert hub.route("").abstained
    assert hub.routes([]) == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda hub: hub.route(3), "message 1 must be a text"),
        (lambda hub: hub.routes("Hello"), "texts must be a list"),
        (lambda hub: hub.route("\ud800"), "not valid Unicode"),
        (lambda hub: hub.route("Hello", top=0), "top=0"),
        (lambda hub: hub.route("Hello", among=["nobody"]), "unknown adapter 'nobody'"),
        (lambda hub: hub.route("Hello", among="questions"), "among must be a list"),
        (lambda hub: hub.route("Hello", among=[]), "leaves nobody to choose"),
        (lambda hub: hub.predict("auto", ["Hello"]), "route\\(text\\)"),
        (lambda hub: hub.use("auto").__enter__(), "route\\(text\\)"),
    ],
)
def test_what_cannot_be_routed_is_said(trained, given, wanted):
    with pytest.raises(UsageError, match=wanted):
        given(trained)


# ---- mixes and conversations -----------------------------------------------------------------------


def test_a_mix_shares_among_the_best():
    judged = {"a": (10.0, 0.5), "b": (9.0, 0.5), "c": (9.0, FAR - 0.1)}
    assert choose(judged).mix.names == ("a",)
    mix = choose(judged, top=3).mix
    assert mix.names == ("a", "b")  # c is unlike all of its own
    assert sum(weight for _, weight in mix.weights) == pytest.approx(1)
    assert mix.weights[0][1] > mix.weights[1][1]
    far = {**judged, "b": (-1e6, 0.5)}
    assert choose(far, top=3).mix.names == ("a",)
    unlike = {**judged, "c": (1e6, FAR - 0.1)}
    assert choose(unlike).adapter == "a"  # another is close, however likely this one
    odd = {**judged, "c": (1e6, LEAST / 2)}
    assert choose(odd).adapter == "c"  # among neighbours a rare message is nobody else's


def test_a_conversation_stays_unless_another_is_clearly_better():
    close = {"a": (10.0, 0.5), "b": (9.0, 0.5)}
    assert choose(close).adapter == "a"
    assert choose(close, previous="b").adapter == "b"
    clear = {**close, "a": (1000.0, 0.5)}
    assert choose(clear, previous="b").adapter == "a"
    far = {"a": (10.0, -1.0), "b": (9.0, -2.0)}
    assert choose(far).abstained
    kept = choose(far, previous="b")
    assert (kept.adapter, kept.abstained) == ("b", False)
    assert "stays with b" in kept.reason
    assert choose(far, previous="unloaded").abstained
    less_far = choose({"a": (10.0, -1.0), "b": (9.0, LEAST / 2)}, previous="b")
    assert less_far.confidence == pytest.approx(less_far.scores["b"]["share"] / 2)  # b's own


def test_auto_in_a_batch_is_each_row_by_its_own_adapter(trained):
    texts = [questions(1), shouts(1), "Как дела? Что нового?", chinese(1)]
    names = [trained.route(text).mix for text in texts]
    assert [str(mix) for mix in names] == ["questions", "shouts", "backbone", "chinese"]
    chats = [[Message("user", text)] for text in texts]
    assert trained.chat(chats, adapters=["auto"] * 4) == trained.chat(chats, adapters=names)
    given = ["auto", "chinese", None, "auto"]
    wanted = ["questions", "chinese", None, "chinese"]
    assert trained.chat(chats, adapters=given) == trained.chat(chats, adapters=wanted)
    raw = {"max_new_tokens": 4}
    both = [trained.generate(texts, adapters=a, **raw) for a in (["auto"] * 4, names)]
    assert both[0] == both[1]


def test_a_whole_conversation_stays_with_whom_it_was_for_when_its_last_turn_is_nobodys(trained):
    lost = "Как дела? Что нового?"
    assert trained.route(lost).abstained

    def talk(*said):
        turns = [[Message("user", text), Message("assistant", "Yes.")] for text in said]
        return [turn for pair in turns for turn in pair][:-1]

    rows = [
        talk(questions(1), lost),
        talk(questions(1), shouts(1), lost, lost),  # the nearest
        talk(questions(1), shouts(1)),
        talk(lost, lost),
        talk(lost),
    ]
    named = ["questions", "shouts", "shouts", None, None]
    assert trained.chat(rows, adapters=["auto"] * 5) == trained.chat(rows, adapters=named)
    with pytest.raises(UsageError, match="must end with a message whose role is 'user'"):
        trained.chat([talk(questions(1), lost)[:-1]], adapters=["auto"])


def test_who_is_named_is_not_looked_for(trained, monkeypatch):
    """Routing reads every manifest of the pool; a batch without "auto" has no need of that."""
    monkeypatch.setattr(trained._router, "_manifest", None)
    chat = [[Message("user", questions(1))]]
    assert trained.chat(chat, adapters=["questions"]) == trained.chat(chat, adapters=["questions"])
    assert len(trained.next_token_logits(["a", "b"], ["shouts", None])) == 2


def test_what_is_only_on_trial_is_nobodys_adapter(trained, make_weights):
    with trained.model.temporarily_loaded(make_weights(), "questions"):
        assert set(trained._router._names()) == set(TASKS)


def test_a_turn_that_is_forgotten_moves_no_conversation(trained):
    def write(text):
        if not text.startswith("["):
            raise KeyboardInterrupt

    session = ChatSession(trained, write=lambda _: None)
    session.handle("/use auto")
    session.handle(shouts(1))
    session.write = lambda text: None if "stopped" in text else write(text)
    session.handle(questions(1))
    assert session.mix.names == ("shouts",)
    assert len(session.history) == 2


def test_a_terminal_conversation_by_auto(trained):
    pieces = []
    session = ChatSession(trained, write=pieces.append)
    session.handle("/use auto")
    session.handle(questions(1))
    assert session.mix.names == ("questions",)
    assert "[questions: " in "".join(pieces)
    session.handle("Как дела? Что нового?")
    assert session.mix.names == ("questions",)  # nobody else is close
    session.handle(shouts(1))
    assert session.mix.names == ("shouts",)
    session.handle("/reset")
    session.handle("Как дела? Что нового?")
    assert session.mix.names == ()
    session.handle("/use chinese")
    assert not session.auto


# ---- adding, changing, damaging --------------------------------------------------------------------


@pytest.fixture
def copied(trained, pico_folder, tmp_path):
    """Another hub on a copy of the trained pool."""
    shutil.copytree(trained.pool.root, tmp_path / "pool")
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


def test_an_adapter_that_only_lies_in_the_pool_is_routed_to(copied):
    assert not copied.model.names
    assert copied.route(questions(1)).adapter == "questions"
    copied.pool.delete("questions")
    assert copied.route(questions(1)).adapter != "questions"


def test_a_new_version_in_the_pool_counts_at_once(copied, trained):
    assert copied.route(questions(1)).adapter == "questions"
    other = {n: copied.pool.manifest(n) for n in ("questions", "shouts")}
    swapped = other["questions"].model_copy(update={"routing": other["shouts"].routing})
    copied.pool.describe("questions", swapped)
    copied.pool.describe("shouts", other["shouts"].model_copy(update={"routing": None}))
    assert copied.route(shouts(1)).adapter == "questions"


def test_what_was_learnt_on_another_backbone_does_not_count(copied):
    own = copied.pool.manifest("questions")
    foreign = own.fingerprint.__class__(**{**vars_of(own.fingerprint), "weights": "0" * 16})
    copied.pool.describe("questions", own.model_copy(update={"fingerprint": foreign}))
    assert "questions" not in copied.route(questions(1)).scores


def vars_of(frozen):
    return {name: getattr(frozen, name) for name in frozen.__dataclass_fields__}


def test_a_damaged_adapter_is_left_out(copied):
    (copied.pool.root / "questions" / "adapterhub.json").write_text("{")
    assert set(copied.route(questions(1)).scores) == {"shouts", "chinese"}


def test_routing_and_answering_from_several_threads(trained):
    wanted = trained.routes([questions(i) for i in range(8)])
    said = trained.chat([[Message("user", questions(1))]], adapters=["shouts"])
    found, spoken = [None] * 8, []

    def route(i):
        found[i] = trained.route(questions(i))

    def talk():
        spoken.extend(trained.chat([[Message("user", questions(1))]], adapters=["shouts"]))

    threads = [threading.Thread(target=route, args=(i,)) for i in range(8)]
    threads += [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.adapter for r in found] == [r.adapter for r in wanted]
    assert spoken == said * 4


def test_learning_again_keeps_weights_and_scores(copied):
    before = copied.pool.manifest("questions")
    copied.pool.describe("questions", before.model_copy(update={"routing": None}))
    assert "questions" not in copied.route(questions(1)).scores
    learnt = copied.learn_routes(["questions"], [TASKS["questions"]])
    assert learnt["questions"] == copied.pool.manifest("questions")
    assert learnt["questions"].routing == before.routing
    assert learnt["questions"].sha256 == before.sha256
    assert copied.route(questions(1)).adapter == "questions"
    assert copied.verify("questions").ok


def test_what_cannot_be_learnt_is_said_all_at_once(copied):
    with pytest.raises(ConfigError) as caught:
        copied.learn_routes(["questions", "shouts"])  # their tasks are no files
    assert len(caught.value.misfits) == 2
    few = plain_task("few", questions, size=5)
    with pytest.raises(ConfigError, match="too few messages"):
        copied.learn_routes(["questions"], [few])


def test_learning_several_is_all_or_nothing(copied):
    manifests = {n: copied.pool.manifest(n) for n in TASKS}
    for name, manifest in manifests.items():
        copied.pool.describe(name, manifest.model_copy(update={"routing": None}))
    (copied.pool.root / "shouts" / "adapterhub.json").unlink()
    with pytest.raises(ConfigError, match="'shouts' has no manifest"):
        copied.learn_routes(["questions", "shouts"], [TASKS["questions"]])
    assert copied.pool.manifest("questions").routing is None


def test_messages_of_several_tasks_are_drawn_in_turn():
    one, other = (plain_task(make.__name__, make, 16) for make in (questions, shouts))
    found = messages_in([one, other], "train", 8)
    assert ["@" in text for text in found] == [False, True] * 4


def test_transfer_and_adopt_and_train_keep_a_prototype(trained):
    for name in TASKS:
        routing = trained.pool.manifest(name).routing
        assert routing is not None
        assert routing.count == 150


# ---- by their numbers alone ------------------------------------------------------------------------


def test_without_prototypes_an_adapters_own_numbers_decide(hub, make_weights):
    for name, seed in (("a", 1), ("b", 2)):
        keep_adapter(hub, make_weights(seed=seed), name)
    found = hub.route("Hello film")
    assert found.adapter in ("a", "b")
    assert not found.abstained
    assert "by their numbers alone" in found.reason
    hub.unload("a")
    assert hub.route("Hello film") == found  # read from the pool then
    before = hub.route("Hello film").scores
    keep_adapter(hub, make_weights(seed=3), "a")  # a new version under the old name
    assert hub.route("Hello film").scores["a"] != before["a"]


def test_a_message_that_lies_along_no_adapter_is_nobodys(hub, make_weights):
    keep_adapter(hub, make_weights())
    weights = make_weights()
    nothing = weights.with_factors({m: (0 * a, b) for m, (a, b) in weights.factors.items()})
    hub.model.load("nothing", nothing)
    found = hub._router.route(["Hello film"], among=["nothing"])[0]
    assert found.abstained
    assert found.reason == "the message lies along no adapter"


def test_an_encoders_adapters_are_chosen_by_their_numbers(encoder_hub):
    assert encoder_hub.route("a good film").reason == "the pool is empty"
    model = encoder_hub.model
    head = (2, model.backbone.width)
    for seed in (1, 2):
        start = initial_weights(model.shapes, rank=4, alpha=8.0, seed=seed, head=head)
        model.load(
            f"a{seed}", start.with_factors({m: (a, b + 1) for m, (a, b) in start.factors.items()})
        )
    assert encoder_hub.route("a good film").adapter in ("a1", "a2", "backbone")


def test_an_arrow_is_the_first_right_singular_vector(model, make_weights):
    weights = make_weights(rank=4)
    found = arrows(model, weights)
    names = sorted(n for n in weights.factors if n.startswith(f"{model.early_block}."))
    wide = [n for n in names if weights.factors[n][0].shape[1] == 32]
    assert len(found) == len(wide) > 0
    for vector, name in zip(found, wide, strict=True):
        a, b = (t.double() for t in weights.factors[name])
        (first, *_) = torch.linalg.svd(b @ a)[2]
        assert abs(float(vector @ first)) == pytest.approx(1, abs=1e-6)


# ---- features --------------------------------------------------------------------------------------


def test_early_states_are_transformers_own_and_of_the_bare_backbone(model, make_weights):
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 2]])
    with torch.inference_mode():
        wanted = model.backbone.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(model.early_states(ids), wanted)
    model.load("a", make_weights())
    with model.mixing([Mix((("a", 1.0),))] * 2):
        assert torch.equal(model.early_states(ids), wanted)
        full = model.backbone.model(ids, output_hidden_states=True).hidden_states
    assert len(full) == 3  # other forwards go all the way
    assert not torch.equal(full[1], wanted)


@pytest.mark.parametrize("vectors", [token_features, early_layer_features])
def test_a_vector_depends_on_its_message_alone(model, vectors):
    texts = ["Hello film", "", "好看吗?", "x " * 5000, "Which song?"]
    together = vectors(model, tokenize_messages(model, texts))
    assert together.shape[1] == 32 + NUM_LETTERS + NUM_WORDS
    assert together.isfinite().all()
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(
            vectors(model, tokenize_messages(model, [text]))[0], row, rtol=1e-4, atol=1e-5
        )
    assert vectors(model, []).shape == (0, together.shape[1])


def test_a_glance_is_the_mean_of_tokens_less_for_the_frequent(model):
    (message,) = tokenize_messages(model, ["the film the cast"])
    found = token_features(model, [message])[0]
    table = model.backbone.model.get_input_embeddings().weight.detach().double()
    own = [table[i] / table[i].square().mean().sqrt() for i in message.ids[1:]]
    weights = [1 / (1 + 3000 / (i + 30)) for i in message.ids[1:]]
    wanted = sum(w * t for w, t in zip(weights, own, strict=True)) / sum(weights)
    torch.testing.assert_close(found[:32], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[32:], message.told)


def test_letters_tell_scripts_apart():
    assert len(letters("")) == NUM_LETTERS
    shares = {text: letters(text) for text in ("abc", "电影好", "как", "123", "日本のカ")}
    assert shares["abc"][0] == 1
    assert shares["电影好"][1] == 1
    assert shares["как"][5] == 1
    assert sum(shares["日本のカ"][1:4]) == 1


def test_words_tell_topics_apart_and_not_lengths():
    assert not words("").any()
    film, film_too, tax = (
        words(t) for t in ("A film, a fine cast", "a FINE film", "tax forms and receipts")
    )
    torch.testing.assert_close(film.norm() ** 2, torch.tensor(2 * LENGTH**2).double())
    assert words("so " * 500).norm() <= film.norm() * 1.001
    assert film @ film_too > 2 * abs(film @ tax)
    assert words("一傅众咻") @ words("众咻") > 1
    assert torch.equal(words("\ud800 x"), words("\ud800 x"))  # half a character is a text, too


def test_words_choose_and_do_not_tell_the_fit(prototype):
    """A judge looks no further than its background does; among adapters all numbers count."""
    own, rest = normal(200), normal(100, seed=3)
    said = torch.zeros(200, 4).double()
    said[:, 0] = torch.randn(200, generator=torch.Generator().manual_seed(2)) / 10 + 1
    wide = fit_prototype(
        torch.cat([own, said], 1), torch.cat([rest, said[:100]], 1), prototype.background
    )
    other = fit_prototype(
        torch.cat([own, -said], 1), torch.cat([rest, said[:100]], 1), wide.background
    )
    points = torch.cat([normal(9, seed=4), said[:9]], 1)
    turned = torch.cat([points[:, :12], -points[:, 12:]], 1)
    assert torch.equal(PrototypeScorer(wide)(points), PrototypeScorer(wide)(turned))
    panel = ScorerSet({"a": PrototypeScorer(wide), "b": PrototypeScorer(other)})
    assert {r.adapter for r in panel.routes(points)} == {"a"}
    assert {r.adapter for r in panel.routes(turned)} == {"b"}
    assert prototype_of(routing_of(wide)).background.width == 12


def test_wide_states_are_folded_and_keep_their_distances():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(20, 2 * WIDEST + 300, generator=generator).double()
    narrow = folded(wide)
    assert narrow.shape == (20, WIDEST)
    ratio = torch.pdist(narrow) / torch.pdist(wide)
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.2


def test_a_backbone_makes_up_the_same_texts_again(model):
    texts = sample_background(model, 12)
    assert texts == sample_background(model, 12)
    assert len(set(texts)) > 6


def test_a_message_is_what_a_user_types():
    contract = PromptContract("Passage: {context?}\nQuestion: {question}", system="Answer.")
    task = Task("t", contract, "token_f1", lambda: Splits({}))
    both = Example({"question": "Who?", "context": "Ada wrote it.", "source": "x"}, "Ada")
    assert message_of(task, both) == "Ada wrote it.\nWho?"
    assert message_of(task, Example({"question": "Who?"}, "Ada")) == "Who?"
    own = Example({"text": "Hi"}, "Ho", contract=PromptContract())
    assert message_of(task, own) == "Hi"


# ---- prototypes ------------------------------------------------------------------------------------


def normal(rows, shift=0.0, seed=0, width=12):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, width).double()
    return torch.randn(rows, width, generator=generator).double() * scale + shift


@pytest.fixture(scope="module")
def prototype():
    background = fit_mixture(4 * normal(300, seed=9), 1, 8)
    return fit_prototype(normal(400, seed=1), normal(400, seed=2), background)


def test_a_share_of_its_own_messages_has_a_fit_below_the_threshold_and_of_others_nearly_all(
    prototype,
):
    judge = PrototypeScorer(prototype)
    own = judge(normal(2000, seed=3))
    for level in (0.1, 0.3, 0.5):  # two p-values that are not independent, made one
        assert 0.5 * level < float((own <= level).double().mean()) < 2.5 * level
    assert float((own < LEAST).double().mean()) < 2.5 * LEAST
    far = judge(normal(200, shift=6.0, seed=4))
    assert float((far < LEAST).double().mean()) > 0.99


def test_a_density_is_torchs_own(prototype):
    own = prototype.own
    covariance = own.factors.T @ own.factors + own.rest.diag()
    whole = 0.9 * covariance + 0.1 * (
        prototype.background.factors.T @ prototype.background.factors
        + prototype.background.rest.diag()
    )
    whole = whole + (0.003 * whole.diagonal().mean() + 1e-9) * torch.eye(12).double()
    wanted = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(own.shares),
        torch.distributions.MultivariateNormal(own.centres, whole[None]),
    )
    points = normal(5, seed=5)
    found = Fits.of(prototype).raw(points)[1, 0]
    constant = 6 * torch.log(torch.tensor(2 * torch.pi)).double()
    torch.testing.assert_close(found - constant, wanted.log_prob(points), rtol=1e-3, atol=1e-2)


def test_two_p_values_make_one_as_fisher_has_it():
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(2, 20000, generator=generator).double()
    found = joint(*both)
    chi_squared = -2 * both.log().sum(0)  # with four degrees of freedom
    wanted = torch.special.gammaincc(torch.tensor(2.0).double(), chi_squared / 2)
    torch.testing.assert_close(found, wanted)
    for level in (0.05, 0.4):  # of independent ones, evenly spread
        assert float((found <= level).double().mean()) == pytest.approx(level, abs=0.01)
    below = joint(torch.tensor([-0.3, 0.5, 0.0]), torch.tensor([0.7, -0.1, 0.4]))
    assert below.tolist() == pytest.approx([-0.3, -0.1, 0.0])


def test_which_adapter_is_fishers_discriminant(prototype):
    """Under one covariance: the mean of both clouds', each a little widened by the background."""
    other = fit_prototype(normal(90, 0.8, 7), normal(90, 0.8, 8), prototype.background)

    def covariance(cloud):
        return cloud.factors.T @ cloud.factors + cloud.rest.diag()

    clouds = (prototype.own, other.own)
    common = 0.9 * sum(map(covariance, clouds)) / 2 + 0.1 * covariance(prototype.background)
    common = common + (0.003 * common.diagonal().mean() + 1e-9) * torch.eye(12).double()
    points = normal(9, shift=0.4, seed=5)
    logs = [
        torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(cloud.shares),
            torch.distributions.MultivariateNormal(cloud.centres, common[None]),
        ).log_prob(points)
        for cloud in clouds
    ]
    shares = (torch.stack(logs, 1) / 4).softmax(1)
    found = ScorerSet({"a": PrototypeScorer(prototype), "b": PrototypeScorer(other)}).routes(points)
    for route, row in zip(found, shares.tolist(), strict=True):
        if min(s["fit"] for s in route.scores.values()) >= FAR:
            assert [s["share"] for s in route.scores.values()] == pytest.approx(row, abs=1e-6)
    assert any(min(s["fit"] for s in route.scores.values()) >= FAR for route in found)


def test_one_adapter_more_changes_nothing_in_the_others(prototype):
    other = fit_prototype(normal(90, 3.0, 7), normal(90, 3.0, 8), prototype.background)
    points = normal(20, seed=6)
    alone = ScorerSet({"a": PrototypeScorer(prototype)}).routes(points)
    both = ScorerSet({"a": PrototypeScorer(prototype), "b": PrototypeScorer(other)}).routes(points)
    wanted = [r.scores["a"]["fit"] for r in alone]
    assert [r.scores["a"]["fit"] for r in both] == pytest.approx(wanted, abs=1e-9)
    assert {r.adapter for r in both} == {"a"}


def test_prototypes_of_other_shapes_are_judged_side_by_side_and_keep_their_places(prototype):
    slim = fit_prototype(normal(90, 3.0, 7), normal(90, 3.0, 8), prototype.background, 3)
    one_centre = replace(
        prototype,
        own=fit_mixture(normal(90, -3.0, 3), 1, 64),
        ratios=prototype.ratios[::2],
        densities=prototype.densities[::2],
    )
    judges = {
        name: PrototypeScorer(own)
        for name, own in {"a": prototype, "b": slim, "c": one_centre, "d": prototype}.items()
    }
    points = torch.cat([normal(8, shift, seed=6) for shift in (-3.0, 0.0, 3.0)])
    routes = ScorerSet(judges).routes(points)
    for name, judge in judges.items():
        fits = [route.scores[name]["fit"] for route in routes]
        assert fits == pytest.approx(judge(points).tolist(), abs=1e-9)
    assert all(r.scores["a"]["share"] == pytest.approx(r.scores["d"]["share"]) for r in routes)
    chosen = ["c"] * 8 + ["ad"] * 8 + ["b"] * 8
    assert all(route.adapter in own for route, own in zip(routes, chosen, strict=True))


# ---- at a glance -----------------------------------------------------------------------------------


def seated(*shifts, glance=True):
    """Judges of adapters whose messages lie at shifts, `glance` and look alike."""
    background = fit_mixture(normal(200, seed=11, width=12) * 2, 1, 8)
    made = {}
    for i, shift in enumerate(shifts):
        own, held = normal(90, shift, 20 + i), normal(90, shift, 40 + i)
        look = PrototypeScorer(fit_prototype(own, held, background))
        made[f"a{i}"] = AdapterScorers(
            look,
            PrototypeScorer(fit_prototype(own, held, background, GLANCE_RANK)) if glance else None,
        )
    return made


def test_only_what_is_not_plain_at_a_glance_is_looked_at():
    cascade = Cascade(seated(0.0, 1.5))
    points = torch.cat([normal(20, 0.0, 5), normal(20, 0.75, 6), normal(20, 30.0, 7)])
    asked = []

    def look(places):
        asked.append(list(places))
        return points[list(places)]

    found = cascade.routes(points, look)
    assert len(asked) == 1
    glanced = cascade.glance.routes(points)
    plain = [
        i
        for i, route in enumerate(glanced)
        if not route.abstained
        and route.scores[route.adapter]["share"] >= PLAIN
        and route.scores[route.adapter]["fit"] >= TYPICAL
    ]
    assert 5 < len(plain) < 40
    assert asked[0] == [i for i in range(60) if i not in plain]
    looked = cascade.look.routes(points)
    for i, route in enumerate(found):
        assert route.adapter == (glanced if i in plain else looked)[i].adapter
        assert route.reason.startswith("at a glance, ") == (i in plain)
    assert all(route.abstained for route in found[40:])  # what is far is never plain


def test_where_nothing_is_open_nothing_is_looked_at():
    cascade = Cascade(seated(0.0, 6.0))
    points = torch.cat([normal(9, 0.0, 5), normal(9, 6.0, 6)])
    plain = [r.reason.startswith("at a glance") for r in cascade.routes(points, points.__getitem__)]
    rows = points[plain]
    assert len(rows) > 5
    assert len(cascade.routes(rows, lambda places: pytest.fail(f"looked at {places}"))) == len(rows)


def test_one_adapter_without_a_glance_has_all_looked_at():
    judges = {**seated(0.0, 3.0), "b": seated(6.0, glance=False)["a0"]}
    points = normal(9, 0.0, 5)
    found = Cascade(judges).routes(points, lambda places: points[list(places)])
    assert found == Cascade(judges).look.routes(points)
    assert not any(route.reason.startswith("at a glance") for route in found)


def test_a_look_has_the_last_word():
    """The looks say the opposite of the glances."""
    cascade = Cascade(seated(0.0, 1.0))
    points = torch.cat([normal(20, 0.0, 5), normal(20, 1.0, 6)])
    turned = torch.cat([normal(20, 1.0, 7), normal(20, 0.0, 8)])
    found = cascade.routes(points, lambda places: turned[list(places)])
    looked = [i for i, route in enumerate(found) if not route.reason.startswith("at a glance")]
    assert 3 < len(looked) < 37
    wanted = cascade.look.routes(turned)
    assert [found[i] for i in looked] == [wanted[i] for i in looked]


def test_one_adapter_alone_is_never_chosen_at_a_glance():
    points = normal(9, 0.0, 5)
    cascade = Cascade(seated(0.0))
    assert cascade.routes(points, lambda p: points[list(p)]) == cascade.look.routes(points)


def test_a_glance_of_another_size_is_left_out(copied):
    manifest = copied.pool.manifest("questions")
    wide = normal(60, width=30)
    other = fit_prototype(wide[:30], wide[30:], fit_mixture(wide + 1, 1, 4), 4)
    glance = routing_of(other, other).glance
    routing = manifest.routing.model_copy(update={"glance": glance})
    copied.pool.describe("questions", manifest.model_copy(update={"routing": routing}))
    assert copied.route(questions(1)).adapter == "questions"
    assert not any("glance" in r.reason for r in copied.routes(held_out("shouts")))


def test_a_mix_is_as_wide_at_a_look_as_it_may_be():
    points = normal(40, 0.4, 5)
    found = Cascade(seated(0.0, 0.8)).routes(points, lambda places: points[list(places)], top=2)
    assert {len(route.mix.weights) for route in found if not route.abstained} == {1, 2}


def test_a_message_that_is_plain_runs_no_block(trained, monkeypatch):
    plain = [t for t in held_out("shouts") if "glance" in trained.route(t).reason]
    assert plain
    wanted = [trained.route(text) for text in plain]

    def fail(*given):
        raise AssertionError("a block ran")

    monkeypatch.setattr("adapterhub_chat.route.message_features.engine_of", fail)
    hook = trained.model.backbone.blocks[0].register_forward_pre_hook(fail)
    try:
        assert [trained.route(text) for text in plain] == wanted
        with pytest.raises(AssertionError, match="a block ran"):
            trained.routes([plain[0], "def f(x): return {x: 1}"])
    finally:
        hook.remove()


def test_a_prototype_without_a_glance_is_still_used(copied):
    manifest = copied.pool.manifest("questions")
    old = manifest.routing.model_copy(update={"glance": None})
    copied.pool.describe("questions", manifest.model_copy(update={"routing": old}))
    assert copied.route(questions(1)).adapter == "questions"
    assert not any("glance" in r.reason for r in copied.routes(held_out("shouts")))


def test_what_is_stored_is_what_was_learnt(prototype):
    glance = fit_prototype(
        normal(90, 1.0, 7), normal(90, 1.0, 8), prototype.background, GLANCE_RANK
    )
    stored = routing_of(prototype, glance)
    assert torch.equal(prototype_of(stored.glance).own.factors, glance.own.factors)
    again = prototype_of(stored)
    for cloud, other in ((again.own, prototype.own), (again.background, prototype.background)):
        for name in ("centres", "shares", "factors", "rest"):
            assert torch.equal(getattr(cloud, name), getattr(other, name)), name
    assert torch.equal(again.ratios, prototype.ratios)
    assert torch.equal(again.densities, prototype.densities)


def test_the_widest_prototype_fits_into_a_manifest(trained, tmp_path):
    vectors = normal(300, width=WIDEST + NUM_LETTERS + NUM_WORDS)
    background = fit_mixture(vectors[:, :-NUM_WORDS] + 1, 1, 64)
    widest = fit_prototype(vectors[:200], vectors[200:], background)
    narrow = fit_mixture(vectors[:, :-NUM_WORDS] + 1, 1, GLANCE_RANK)
    glance = fit_prototype(vectors[:200], vectors[200:], narrow, GLANCE_RANK)
    routing = routing_of(widest, glance)
    own = trained.pool.manifest("questions").model_copy(update={"routing": routing})
    text = dump_manifest(own)
    assert len(text) < MAX_MANIFEST_BYTES
    (tmp_path / "adapterhub.json").write_text(text)
    assert read_manifest(tmp_path) == own


def changed(routing, **parts):
    return {**routing.model_dump(), **parts}


def glanced(routing, **parts):
    """What a manifest has of the same prototype as a glance."""
    return {**routing.model_dump(exclude={"features", "glance"}), **parts}


def with_number(routing, place, value):
    raw = torch.frombuffer(bytearray(base64.b64decode(routing.numbers)), dtype=torch.float16)
    raw[place] = value
    return changed(routing, numbers=base64.b64encode(raw.numpy().tobytes()).decode())


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda r: changed(r, numbers=r.numbers[:-4]), "as the sizes say"),
        (lambda r: changed(r, width=r.width + 1), "as the sizes say"),
        (lambda r: changed(r, numbers="!" + r.numbers[1:]), "numbers"),
        (lambda r: changed(r, numbers="A" * 900_000), "at most"),
        (lambda r: changed(r, width=0), "greater than or equal to 1"),
        (lambda r: changed(r, width=10**9), "less than or equal"),
        (lambda r: changed(r, background_width=r.width + 1), "width only"),
        (lambda r: changed(r, features="late-mean-1"), "early-mean-1"),
        (lambda r: changed(r, more=1), "not permitted"),
        (lambda r: changed(r, glance=r.model_dump()), "not permitted"),
        (
            lambda r: changed(r, glance=glanced(r, width=r.width + 1)),
            "(?s)glance.*as the sizes say",
        ),
        (lambda r: with_number(r, 0, float("nan")), "not all are finite"),
        (lambda r: with_number(r, 5, float("inf")), "not all are finite"),
        (lambda r: with_number(r, -1, -60000.0), "do not ascend"),
        (lambda r: with_number(r, r.centres * r.width, 0.0), "shares of centres"),
        (
            lambda r: with_number(r, r.centres * (r.width + 1) + r.rank * r.width, -1.0),
            "variance is negative",
        ),
    ],
)
def test_a_strangers_prototype_is_checked(prototype, damage, wanted):
    routing = routing_of(prototype)
    assert Routing.model_validate(routing.model_dump()) == routing
    with pytest.raises(ValidationError, match=wanted):
        Routing.model_validate(damage(routing))


def test_a_bad_prototype_is_refused_with_its_place(copied):
    file = copied.pool.root / "questions" / "adapterhub.json"
    file.write_text(file.read_text().replace('"numbers": "', '"numbers": "AAAA'))
    with pytest.raises(AdapterError, match=r"routing.*numbers"):
        copied.pool.manifest("questions")
    assert "questions" not in copied.route(questions(1)).scores
