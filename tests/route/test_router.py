"""Routing on a pico model: routes, abstention, prototypes and features, and what manifests store."""

from __future__ import annotations

import base64
import shutil
import sys
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
from adapterhub_chat.route.arrow import arrow_vectors
from adapterhub_chat.route.choice import (
    CONFIDENT_FIT,
    CONFIDENT_SHARE,
    MIN_FIT,
    OUTLIER_FIT,
    AdapterScorers,
    Cascade,
    ScorerSet,
    choose_route,
)
from adapterhub_chat.route.fit import (
    TOKEN_RANK,
    BatchedPrototypes,
    PrototypeScorer,
    _fisher_combined,
    fit_prototype,
)
from adapterhub_chat.route.gaussians import fit_mixture
from adapterhub_chat.route.learn import message_of, messages_in
from adapterhub_chat.route.message_features import (
    MAX_WIDTH,
    _folded_to_max_width,
    early_layer_features,
    token_features,
    tokenize_messages,
)
from adapterhub_chat.route.prototype import prototype_of, routing_of
from adapterhub_chat.route.text_features import (
    NGRAM_NORM,
    NUM_CHARACTER_FEATURES,
    NUM_NGRAM_FEATURES,
    character_features,
    ngram_features,
)
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


def test_message_is_routed_to_the_adapter_trained_on_its_kind(trained):
    for name in TASKS:
        actual = [r.adapter for r in trained.routes(held_out(name))]
        assert actual.count(name) >= 0.8 * len(actual), (name, actual)
        assert set(actual) <= {name, "backbone"}
    one = trained.route(questions(1))
    assert isinstance(one, Route)
    assert one.mix.weights == (("questions", 1.0),)
    assert not one.abstained
    assert 0.5 < one.confidence <= 1
    assert "questions is the likeliest" in one.reason
    assert set(one.scores) == set(TASKS)
    assert sum(s["share"] for s in one.scores.values()) == pytest.approx(1)


# ---- abstention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "far",
    [
        "def f(x):\n    return {x: [i for i in range(x)]}",
        "Как дела? Что нового сегодня?",
        "q" * 3000,
    ],
)
def test_foreign_message_is_answered_by_the_backbone(trained, far):
    actual = trained.route(far)
    assert actual.abstained
    assert (actual.adapter, actual.mix) == ("backbone", Mix())
    assert actual.confidence < 0.5
    assert "no adapter is close" in actual.reason


def test_empty_message_abstains(trained):
    actual = trained.routes(["", questions(1), " \n "])
    assert [r.abstained for r in actual] == [True, False, True]
    assert actual[0].reason == "the message is empty"
    assert actual[1] == trained.route(questions(1))


def test_empty_pool_abstains_with_a_reason(hub):
    assert hub.route("Hello").abstained
    assert hub.route("Hello").reason == "the pool is empty"
    assert hub.route("").abstained
    assert hub.routes([]) == []


@pytest.mark.parametrize(
    ("given", "expected"),
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
def test_invalid_routing_arguments_raise(trained, given, expected):
    with pytest.raises(UsageError, match=expected):
        given(trained)


# ---- mixes and conversations -----------------------------------------------------------------------


def test_mix_contains_only_the_best_adapters():
    scores = {"a": (10.0, 0.5), "b": (9.0, 0.5), "c": (9.0, OUTLIER_FIT - 0.1)}
    assert choose_route(scores).mix.names == ("a",)
    mix = choose_route(scores, top=3).mix
    assert mix.names == ("a", "b")  # c is unlike all of its own
    assert sum(weight for _, weight in mix.weights) == pytest.approx(1)
    assert mix.weights[0][1] > mix.weights[1][1]
    far = {**scores, "b": (-1e6, 0.5)}
    assert choose_route(far, top=3).mix.names == ("a",)
    unlike = {**scores, "c": (1e6, OUTLIER_FIT - 0.1)}
    assert choose_route(unlike).adapter == "a"  # another is close, however likely this one
    odd = {**scores, "c": (1e6, MIN_FIT / 2)}
    assert choose_route(odd).adapter == "c"  # among neighbours a rare message is nobody else's


def test_previous_adapter_stays_unless_another_is_clearly_better():
    close = {"a": (10.0, 0.5), "b": (9.0, 0.5)}
    assert choose_route(close).adapter == "a"
    assert choose_route(close, previous="b").adapter == "b"
    clear = {**close, "a": (1000.0, 0.5)}
    assert choose_route(clear, previous="b").adapter == "a"
    far = {"a": (10.0, -1.0), "b": (9.0, -2.0)}
    assert choose_route(far).abstained
    kept = choose_route(far, previous="b")
    assert (kept.adapter, kept.abstained) == ("b", False)
    assert "stays with b" in kept.reason
    assert choose_route(far, previous="unloaded").abstained
    less_far = choose_route({"a": (10.0, -1.0), "b": (9.0, MIN_FIT / 2)}, previous="b")
    assert less_far.confidence == pytest.approx(less_far.scores["b"]["share"] / 2)  # b's own


def test_auto_routes_each_row_of_a_batch(trained):
    texts = [questions(1), shouts(1), "Как дела? Что нового?", chinese(1)]
    names = [trained.route(text).mix for text in texts]
    assert [str(mix) for mix in names] == ["questions", "shouts", "backbone", "chinese"]
    chats = [[Message("user", text)] for text in texts]
    assert trained.chat(chats, adapters=["auto"] * 4) == trained.chat(chats, adapters=names)
    given = ["auto", "chinese", None, "auto"]
    expected = ["questions", "chinese", None, "chinese"]
    assert trained.chat(chats, adapters=given) == trained.chat(chats, adapters=expected)
    raw = {"max_new_tokens": 4}
    both = [trained.generate(texts, adapters=a, **raw) for a in (["auto"] * 4, names)]
    assert both[0] == both[1]


def test_conversation_keeps_its_route_when_the_last_turn_fits_no_adapter(trained):
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


def test_batch_without_auto_reads_no_manifests(copied):
    chat = [[Message("user", questions(1))]]
    opened, active = [], True

    def record(event, arguments):
        if active and event == "open" and "chinese" in str(arguments[0]):
            opened.append(arguments[0])

    copied.load("questions")
    copied.load("shouts")
    sys.addaudithook(record)
    copied.chat(chat, adapters=["questions"])
    assert len(copied.next_token_logits(["a", "b"], ["shouts", None])) == 2
    assert not opened
    copied.chat(chat, adapters=["auto"])
    assert opened
    active = False  # a hook cannot be removed


def test_temporarily_loaded_adapters_are_not_candidates(trained, make_weights):
    with trained.model.temporarily_loaded(make_weights(), "questions"):
        assert set(trained._router._names()) == set(TASKS)


def test_interrupted_turn_does_not_change_the_route(trained):
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


def test_chat_session_with_auto(trained):
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


def test_adapters_of_the_pool_need_not_be_loaded(copied):
    assert not copied.model.names
    assert copied.route(questions(1)).adapter == "questions"
    copied.pool.delete("questions")
    assert copied.route(questions(1)).adapter != "questions"


def test_changed_manifest_takes_effect_at_once(copied, trained):
    assert copied.route(questions(1)).adapter == "questions"
    other = {n: copied.pool.manifest(n) for n in ("questions", "shouts")}
    swapped = other["questions"].model_copy(update={"routing": other["shouts"].routing})
    copied.pool.describe("questions", swapped)
    copied.pool.describe("shouts", other["shouts"].model_copy(update={"routing": None}))
    assert copied.route(shouts(1)).adapter == "questions"


def test_prototype_of_another_backbone_is_ignored(copied):
    own = copied.pool.manifest("questions")
    foreign = own.fingerprint.__class__(**{**vars_of(own.fingerprint), "weights": "0" * 16})
    copied.pool.describe("questions", own.model_copy(update={"fingerprint": foreign}))
    assert "questions" not in copied.route(questions(1)).scores


def vars_of(frozen):
    return {name: getattr(frozen, name) for name in frozen.__dataclass_fields__}


def test_damaged_adapter_is_left_out(copied):
    (copied.pool.root / "questions" / "adapterhub.json").write_text("{")
    assert set(copied.route(questions(1)).scores) == {"shouts", "chinese"}


def test_routing_and_chat_from_several_threads(trained):
    expected = trained.routes([questions(i) for i in range(8)])
    said = trained.chat([[Message("user", questions(1))]], adapters=["shouts"])
    actual, spoken = [None] * 8, []

    def route(i):
        actual[i] = trained.route(questions(i))

    def talk():
        spoken.extend(trained.chat([[Message("user", questions(1))]], adapters=["shouts"]))

    threads = [threading.Thread(target=route, args=(i,)) for i in range(8)]
    threads += [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.adapter for r in actual] == [r.adapter for r in expected]
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


def test_learn_routes_raises_all_misfits_at_once(copied):
    with pytest.raises(ConfigError) as caught:
        copied.learn_routes(["questions", "shouts"])  # their tasks are no files
    assert len(caught.value.misfits) == 2
    few = plain_task("few", questions, size=5)
    with pytest.raises(ConfigError, match="too few messages"):
        copied.learn_routes(["questions"], [few])


def test_learn_routes_changes_all_or_nothing(copied):
    manifests = {n: copied.pool.manifest(n) for n in TASKS}
    for name, manifest in manifests.items():
        copied.pool.describe(name, manifest.model_copy(update={"routing": None}))
    (copied.pool.root / "shouts" / "adapterhub.json").unlink()
    with pytest.raises(ConfigError, match="'shouts' has no manifest"):
        copied.learn_routes(["questions", "shouts"], [TASKS["questions"]])
    assert copied.pool.manifest("questions").routing is None


def test_messages_alternate_between_tasks():
    one, other = (plain_task(make.__name__, make, 16) for make in (questions, shouts))
    actual = messages_in([one, other], "train", 8)
    assert ["@" in text for text in actual] == [False, True] * 4


def test_training_stores_prototypes(trained):
    for name in TASKS:
        routing = trained.pool.manifest(name).routing
        assert routing is not None
        assert routing.count == 150


# ---- arrows ----------------------------------------------------------------------------------------


def test_without_prototypes_arrows_decide(hub, make_weights):
    for name, seed in (("a", 1), ("b", 2)):
        keep_adapter(hub, make_weights(seed=seed), name)
    actual = hub.route("Hello film")
    assert actual.adapter in ("a", "b")
    assert not actual.abstained
    assert "by their numbers alone" in actual.reason
    hub.unload("a")
    assert hub.route("Hello film") == actual  # read from the pool then
    before = hub.route("Hello film").scores
    keep_adapter(hub, make_weights(seed=3), "a")  # a new version under the old name
    assert hub.route("Hello film").scores["a"] != before["a"]


def test_message_without_alignment_abstains(hub, make_weights):
    keep_adapter(hub, make_weights())
    weights = make_weights()
    nothing = weights.with_factors({m: (0 * a, b) for m, (a, b) in weights.factors.items()})
    hub.model.load("nothing", nothing)
    actual = hub._router.route(["Hello film"], among=["nothing"])[0]
    assert actual.abstained
    assert actual.reason == "the message lies along no adapter"


def test_encoder_adapters_are_routed_by_arrows(encoder_hub):
    assert encoder_hub.route("a good film").reason == "the pool is empty"
    model = encoder_hub.model
    head = (2, model.backbone.width)
    for seed in (1, 2):
        start = initial_weights(model.shapes, rank=4, alpha=8.0, seed=seed, head=head)
        model.load(
            f"a{seed}", start.with_factors({m: (a, b + 1) for m, (a, b) in start.factors.items()})
        )
    assert encoder_hub.route("a good film").adapter in ("a1", "a2", "backbone")


def test_arrow_is_the_first_right_singular_vector(model, make_weights):
    weights = make_weights(rank=4)
    actual = arrow_vectors(model, weights)
    names = sorted(n for n in weights.factors if n.startswith(f"{model.early_block}."))
    wide = [n for n in names if weights.factors[n][0].shape[1] == 32]
    assert len(actual) == len(wide) > 0
    for vector, name in zip(actual, wide, strict=True):
        a, b = (t.double() for t in weights.factors[name])
        (first, *_) = torch.linalg.svd(b @ a)[2]
        assert abs(float(vector @ first)) == pytest.approx(1, abs=1e-6)


# ---- features --------------------------------------------------------------------------------------


def test_early_states_equal_transformers_hidden_states_of_the_bare_backbone(model, make_weights):
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 2]])
    with torch.inference_mode():
        expected = model.backbone.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(model.early_states(ids), expected)
    model.load("a", make_weights())
    with model.mixing([Mix((("a", 1.0),))] * 2):
        assert torch.equal(model.early_states(ids), expected)
        full = model.backbone.model(ids, output_hidden_states=True).hidden_states
    assert len(full) == 3  # other forwards go all the way
    assert not torch.equal(full[1], expected)


@pytest.mark.parametrize("vectors", [token_features, early_layer_features])
def test_features_do_not_depend_on_the_batch(model, vectors):
    texts = ["Hello film", "", "好看吗?", "x " * 5000, "Which song?"]
    together = vectors(model, tokenize_messages(model, texts))
    assert together.shape[1] == 32 + NUM_CHARACTER_FEATURES + NUM_NGRAM_FEATURES
    assert together.isfinite().all()
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(
            vectors(model, tokenize_messages(model, [text]))[0], row, rtol=1e-4, atol=1e-5
        )
    assert vectors(model, []).shape == (0, together.shape[1])


def test_token_features_are_the_weighted_mean_of_embeddings(model):
    (message,) = tokenize_messages(model, ["the film the cast"])
    actual = token_features(model, [message])[0]
    table = model.backbone.model.get_input_embeddings().weight.detach().double()
    own = [table[i] / table[i].square().mean().sqrt() for i in message.ids[1:]]
    weights = [1 / (1 + 3000 / (i + 30)) for i in message.ids[1:]]
    expected = sum(w * t for w, t in zip(weights, own, strict=True)) / sum(weights)
    torch.testing.assert_close(actual[:32], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(actual[32:], message.text_features)


def test_character_features_separate_scripts():
    assert len(character_features("")) == NUM_CHARACTER_FEATURES
    shares = {
        text: character_features(text) for text in ("abc", "电影好", "как", "123", "日本のカ")
    }
    assert shares["abc"][0] == 1
    assert shares["电影好"][1] == 1
    assert shares["как"][5] == 1
    assert sum(shares["日本のカ"][1:4]) == 1


def test_ngram_features_separate_topics_but_not_lengths():
    assert not ngram_features("").any()
    film, film_too, tax = (
        ngram_features(t) for t in ("A film, a fine cast", "a FINE film", "tax forms and receipts")
    )
    torch.testing.assert_close(film.norm() ** 2, torch.tensor(2 * NGRAM_NORM**2).double())
    assert ngram_features("so " * 500).norm() <= film.norm() * 1.001
    assert film @ film_too > 2 * abs(film @ tax)
    assert ngram_features("一傅众咻") @ ngram_features("众咻") > 1
    assert torch.equal(
        ngram_features("\ud800 x"), ngram_features("\ud800 x")
    )  # half a character is a text, too


def test_ngram_features_affect_the_choice_but_not_the_fit(prototype):
    """A fit uses the features that the background has; the choice among adapters uses all."""
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


def test_folding_wide_states_preserves_distances():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(20, 2 * MAX_WIDTH + 300, generator=generator).double()
    narrow = _folded_to_max_width(wide)
    assert narrow.shape == (20, MAX_WIDTH)
    ratio = torch.pdist(narrow) / torch.pdist(wide)
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.2


def test_message_of_joins_the_fields_of_an_example():
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


def test_fit_is_calibrated_on_own_messages_and_low_on_others(
    prototype,
):
    scorer = PrototypeScorer(prototype)
    own = scorer(normal(2000, seed=3))
    for level in (0.1, 0.3, 0.5):  # two p-values that are not independent, made one
        assert 0.5 * level < float((own <= level).double().mean()) < 2.5 * level
    assert float((own < MIN_FIT).double().mean()) < 2.5 * MIN_FIT
    far = scorer(normal(200, shift=6.0, seed=4))
    assert float((far < MIN_FIT).double().mean()) > 0.99


def test_density_equals_torch_distributions(prototype):
    own = prototype.mixture
    covariance = own.factors.T @ own.factors + own.diagonal.diag()
    whole = 0.9 * covariance + 0.1 * (
        prototype.background.factors.T @ prototype.background.factors
        + prototype.background.diagonal.diag()
    )
    whole = whole + (0.003 * whole.diagonal().mean() + 1e-9) * torch.eye(12).double()
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(own.shares),
        torch.distributions.MultivariateNormal(own.centres, whole[None]),
    )
    points = normal(5, seed=5)
    actual = BatchedPrototypes.of(prototype).raw_scores(points)[1, 0]
    constant = 6 * torch.log(torch.tensor(2 * torch.pi)).double()
    torch.testing.assert_close(actual - constant, expected.log_prob(points), rtol=1e-3, atol=1e-2)


def test_p_values_are_combined_by_fishers_method():
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(2, 20000, generator=generator).double()
    actual = _fisher_combined(*both)
    chi_squared = -2 * both.log().sum(0)  # with four degrees of freedom
    expected = torch.special.gammaincc(torch.tensor(2.0).double(), chi_squared / 2)
    torch.testing.assert_close(actual, expected)
    for level in (0.05, 0.4):  # of independent ones, evenly spread
        assert float((actual <= level).double().mean()) == pytest.approx(level, abs=0.01)
    below = _fisher_combined(torch.tensor([-0.3, 0.5, 0.0]), torch.tensor([0.7, -0.1, 0.4]))
    assert below.tolist() == pytest.approx([-0.3, -0.1, 0.0])


def test_shares_are_fishers_linear_discriminant(prototype):
    """Under one covariance: the mean of both clouds', each a little widened by the background."""
    other = fit_prototype(normal(90, 0.8, 7), normal(90, 0.8, 8), prototype.background)

    def covariance(cloud):
        return cloud.factors.T @ cloud.factors + cloud.diagonal.diag()

    clouds = (prototype.mixture, other.mixture)
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
    actual = ScorerSet({"a": PrototypeScorer(prototype), "b": PrototypeScorer(other)}).routes(
        points
    )
    for route, row in zip(actual, shares.tolist(), strict=True):
        if min(s["fit"] for s in route.scores.values()) >= OUTLIER_FIT:
            assert [s["share"] for s in route.scores.values()] == pytest.approx(row, abs=1e-6)
    assert any(min(s["fit"] for s in route.scores.values()) >= OUTLIER_FIT for route in actual)


def test_another_adapter_does_not_change_the_fits_of_the_first(prototype):
    other = fit_prototype(normal(90, 3.0, 7), normal(90, 3.0, 8), prototype.background)
    points = normal(20, seed=6)
    alone = ScorerSet({"a": PrototypeScorer(prototype)}).routes(points)
    both = ScorerSet({"a": PrototypeScorer(prototype), "b": PrototypeScorer(other)}).routes(points)
    expected = [r.scores["a"]["fit"] for r in alone]
    assert [r.scores["a"]["fit"] for r in both] == pytest.approx(expected, abs=1e-9)
    assert {r.adapter for r in both} == {"a"}


def test_prototypes_of_unequal_shapes_are_scored_in_order(prototype):
    slim = fit_prototype(normal(90, 3.0, 7), normal(90, 3.0, 8), prototype.background, 3)
    one_centre = replace(
        prototype,
        mixture=fit_mixture(normal(90, -3.0, 3), 1, 64),
        ratios=prototype.ratios[::2],
        densities=prototype.densities[::2],
    )
    scorers = {
        name: PrototypeScorer(own)
        for name, own in {"a": prototype, "b": slim, "c": one_centre, "d": prototype}.items()
    }
    points = torch.cat([normal(8, shift, seed=6) for shift in (-3.0, 0.0, 3.0)])
    routes = ScorerSet(scorers).routes(points)
    for name, scorer in scorers.items():
        fits = [route.scores[name]["fit"] for route in routes]
        assert fits == pytest.approx(scorer(points).tolist(), abs=1e-9)
    assert all(r.scores["a"]["share"] == pytest.approx(r.scores["d"]["share"]) for r in routes)
    chosen = ["c"] * 8 + ["ad"] * 8 + ["b"] * 8
    assert all(route.adapter in own for route, own in zip(routes, chosen, strict=True))


# ---- cascade ---------------------------------------------------------------------------------------


def make_scorers(*shifts, with_token=True):
    """Return scorers of adapters whose messages lie at shifts, the same in both stages."""
    background = fit_mixture(normal(200, seed=11, width=12) * 2, 1, 8)
    made = {}
    for i, shift in enumerate(shifts):
        own, held = normal(90, shift, 20 + i), normal(90, shift, 40 + i)
        made[f"a{i}"] = AdapterScorers(
            PrototypeScorer(fit_prototype(own, held, background)),
            PrototypeScorer(fit_prototype(own, held, background, TOKEN_RANK))
            if with_token
            else None,
        )
    return made


def test_only_unclear_messages_reach_the_second_stage():
    cascade = Cascade(make_scorers(0.0, 1.5))
    points = torch.cat([normal(20, 0.0, 5), normal(20, 0.75, 6), normal(20, 30.0, 7)])
    requested = []

    def early_layer_vectors(indices):
        requested.append(list(indices))
        return points[list(indices)]

    actual = cascade.routes(points, early_layer_vectors)
    assert len(requested) == 1
    first_stage = cascade.token_stage.routes(points)
    clear = [
        i
        for i, route in enumerate(first_stage)
        if not route.abstained
        and route.scores[route.adapter]["share"] >= CONFIDENT_SHARE
        and route.scores[route.adapter]["fit"] >= CONFIDENT_FIT
    ]
    assert 5 < len(clear) < 40
    assert requested[0] == [i for i in range(60) if i not in clear]
    second_stage = cascade.early_layer_stage.routes(points)
    for i, route in enumerate(actual):
        assert route.adapter == (first_stage if i in clear else second_stage)[i].adapter
        assert route.reason.startswith("at a glance, ") == (i in clear)
    assert all(route.abstained for route in actual[40:])  # what is far is never clear


def test_second_stage_is_skipped_when_all_messages_are_clear():
    cascade = Cascade(make_scorers(0.0, 6.0))
    points = torch.cat([normal(9, 0.0, 5), normal(9, 6.0, 6)])
    clear = [r.reason.startswith("at a glance") for r in cascade.routes(points, points.__getitem__)]
    rows = points[clear]
    assert len(rows) > 5
    assert len(
        cascade.routes(rows, lambda indices: pytest.fail(f"second stage for {indices}"))
    ) == len(rows)


def test_missing_token_scorer_disables_the_first_stage():
    scorers = {**make_scorers(0.0, 3.0), "b": make_scorers(6.0, with_token=False)["a0"]}
    points = normal(9, 0.0, 5)
    actual = Cascade(scorers).routes(points, lambda indices: points[list(indices)])
    assert actual == Cascade(scorers).early_layer_stage.routes(points)
    assert not any(route.reason.startswith("at a glance") for route in actual)


def test_second_stage_overrides_the_first():
    """The features of the second stage say the opposite of the first stage's."""
    cascade = Cascade(make_scorers(0.0, 1.0))
    points = torch.cat([normal(20, 0.0, 5), normal(20, 1.0, 6)])
    turned = torch.cat([normal(20, 1.0, 7), normal(20, 0.0, 8)])
    actual = cascade.routes(points, lambda indices: turned[list(indices)])
    second_stage = [
        i for i, route in enumerate(actual) if not route.reason.startswith("at a glance")
    ]
    assert 3 < len(second_stage) < 37
    expected = cascade.early_layer_stage.routes(turned)
    assert [actual[i] for i in second_stage] == [expected[i] for i in second_stage]


def test_single_adapter_skips_the_first_stage():
    points = normal(9, 0.0, 5)
    cascade = Cascade(make_scorers(0.0))
    assert cascade.routes(points, lambda p: points[list(p)]) == cascade.early_layer_stage.routes(
        points
    )


def test_token_prototype_of_another_size_is_ignored(copied):
    manifest = copied.pool.manifest("questions")
    wide = normal(60, width=30)
    other = fit_prototype(wide[:30], wide[30:], fit_mixture(wide + 1, 1, 4), 4)
    glance = routing_of(other, other).glance
    routing = manifest.routing.model_copy(update={"glance": glance})
    copied.pool.describe("questions", manifest.model_copy(update={"routing": routing}))
    assert copied.route(questions(1)).adapter == "questions"
    assert not any("glance" in r.reason for r in copied.routes(held_out("shouts")))


def test_second_stage_makes_mixes_of_several_adapters():
    points = normal(40, 0.4, 5)
    actual = Cascade(make_scorers(0.0, 0.8)).routes(
        points, lambda indices: points[list(indices)], top=2
    )
    assert {len(route.mix.weights) for route in actual if not route.abstained} == {1, 2}


def test_first_stage_runs_no_block(trained):
    clear = [t for t in held_out("shouts") if "glance" in trained.route(t).reason]
    assert clear
    foreign = "def f(x): return {x: 1}"
    expected = [trained.route(text) for text in (*clear, foreign)]
    parameters = [*trained.model.backbone.blocks[0].parameters()]
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.fill_(torch.nan)
        assert [trained.route(text) for text in clear] == expected[:-1]
        assert str(trained.route(foreign)) != str(expected[-1])
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
    assert trained.route(foreign) == expected[-1]


def test_routing_without_token_prototype_is_still_used(copied):
    manifest = copied.pool.manifest("questions")
    old = manifest.routing.model_copy(update={"glance": None})
    copied.pool.describe("questions", manifest.model_copy(update={"routing": old}))
    assert copied.route(questions(1)).adapter == "questions"
    assert not any("glance" in r.reason for r in copied.routes(held_out("shouts")))


def test_prototype_round_trip_through_the_manifest(prototype):
    glance = fit_prototype(normal(90, 1.0, 7), normal(90, 1.0, 8), prototype.background, TOKEN_RANK)
    stored = routing_of(prototype, glance)
    assert torch.equal(prototype_of(stored.glance).mixture.factors, glance.mixture.factors)
    again = prototype_of(stored)
    for cloud, other in (
        (again.mixture, prototype.mixture),
        (again.background, prototype.background),
    ):
        for name in ("centres", "shares", "factors", "diagonal"):
            assert torch.equal(getattr(cloud, name), getattr(other, name)), name
    assert torch.equal(again.ratios, prototype.ratios)
    assert torch.equal(again.densities, prototype.densities)


def test_widest_prototype_fits_into_a_manifest(trained, tmp_path):
    vectors = normal(300, width=MAX_WIDTH + NUM_CHARACTER_FEATURES + NUM_NGRAM_FEATURES)
    background = fit_mixture(vectors[:, :-NUM_NGRAM_FEATURES] + 1, 1, 64)
    widest = fit_prototype(vectors[:200], vectors[200:], background)
    narrow = fit_mixture(vectors[:, :-NUM_NGRAM_FEATURES] + 1, 1, TOKEN_RANK)
    glance = fit_prototype(vectors[:200], vectors[200:], narrow, TOKEN_RANK)
    routing = routing_of(widest, glance)
    own = trained.pool.manifest("questions").model_copy(update={"routing": routing})
    text = dump_manifest(own)
    assert len(text) < MAX_MANIFEST_BYTES
    (tmp_path / "adapterhub.json").write_text(text)
    assert read_manifest(tmp_path) == own


def changed(routing, **parts):
    return {**routing.model_dump(), **parts}


def as_token_prototype(routing, **parts):
    """The same prototype as the fields of a token prototype."""
    return {**routing.model_dump(exclude={"features", "glance"}), **parts}


def with_number(routing, place, value):
    raw = torch.frombuffer(bytearray(base64.b64decode(routing.numbers)), dtype=torch.float16)
    raw[place] = value
    return changed(routing, numbers=base64.b64encode(raw.numpy().tobytes()).decode())


@pytest.mark.parametrize(
    ("damage", "expected"),
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
            lambda r: changed(r, glance=as_token_prototype(r, width=r.width + 1)),
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
def test_untrusted_prototype_is_validated(prototype, damage, expected):
    routing = routing_of(prototype)
    assert Routing.model_validate(routing.model_dump()) == routing
    with pytest.raises(ValidationError, match=expected):
        Routing.model_validate(damage(routing))


def test_invalid_prototype_is_refused_with_its_location(copied):
    file = copied.pool.root / "questions" / "adapterhub.json"
    file.write_text(file.read_text().replace('"numbers": "', '"numbers": "AAAA'))
    with pytest.raises(AdapterError, match=r"routing.*numbers"):
        copied.pool.manifest("questions")
    assert "questions" not in copied.route(questions(1)).scores
