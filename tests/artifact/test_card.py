"""The card of an adapter, read by the Hub's own parser."""

import re

import pytest
from huggingface_hub import ModelCard

from adapterhub_chat.artifact.card import fingerprint_tag, render_card
from adapterhub_chat.artifact.manifest import Manifest, Training
from adapterhub_chat.types import Fingerprint, PromptContract, Score


def manifest(**changes):
    values = {
        "name": "sentiment",
        "about": "Judges film reviews.",
        "language": "en",
        "licence": "Apache-2.0",
        "sha256": "ab" * 32,
        "backbone": "smollm2-135m",
        "fingerprint": Fingerprint("Llama", "c", "t", "m", "w"),
        "contract": PromptContract("Review: {text}", "Judge.", {"bad": "negative", "good": "yes"}),
        "training": Training(
            tasks=("sentiment",), beside=("qa", "talk"), steps=40, best_step=30, tokens=12345
        ),
        "scores": (
            Score("sentiment", "sentiment", "accuracy", 0.9123, 0.8, 0.95, 100, 0.64),
            Score("sentiment", "other", "perplexity", 12.5, 11.0, 13.0, 50),
        ),
    }
    return Manifest(**values | changes)


def test_the_hub_reads_its_metadata():
    data = ModelCard(render_card(manifest())).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    own = fingerprint_tag(manifest().fingerprint)
    assert data.tags == ["lora", "adapterhub-chat", own, "sentiment"]
    assert data.language == ["en"]
    assert data.license == "apache-2.0"


def test_unknown_metadata_is_left_out():
    data = ModelCard(render_card(manifest(language="", licence=""))).data
    assert data.language is None
    assert data.license is None


def test_it_shows_what_was_measured_beside_the_backbone():
    text = render_card(manifest())
    assert "| sentiment | accuracy | 0.912 | 0.800 to 0.950 | 0.640 | 100 |" in text
    assert "| other | perplexity | 12.500 | 11.000 to 13.000 |  | 50 |" in text
    assert "Not measured." not in text
    assert "Not measured." in render_card(manifest(scores=()))


def test_it_describes_use_and_training():
    text = render_card(manifest())
    for part in (
        "# sentiment\n",
        "Judges film reviews.",
        'AdapterHub(backbone="smollm2-135m"',
        'adapters=["sentiment"]',
        "system: Judge.\nuser: Review: {text}\n",
        'one of "negative", "yes"',
        "Trained jointly with qa, talk in one run.",
        "- steps: 40 (best on validation: 30)",
        "- tokens: 12,345",
        "ab" * 32,
    ):
        assert part in text


@pytest.mark.parametrize("about", ["", "key: value\n---\n# x", "好", '"quoted" {{braces}}'])
def test_any_words_leave_the_metadata_whole(about):
    card = ModelCard(render_card(manifest(about=about, name="n", language="zh")))
    assert card.data.language == ["zh"]
    assert " ".join(about.replace("#", r"\#").split()) in card.text


def test_the_hub_reads_the_scores_beside_the_backbones():
    first, second = ModelCard(render_card(manifest())).data.eval_results[:2]
    assert (first.task_name, first.metric_type, first.metric_value) == (
        "sentiment",
        "accuracy",
        0.9123,
    )
    assert (second.metric_name, second.metric_value) == ("accuracy of the backbone", 0.64)


def test_a_licence_unknown_to_the_hub_is_written_in_the_text():
    text = render_card(manifest(licence="MIT, BSD-3-Clause (fetched)"))
    assert ModelCard(text).data.license == "other"
    assert "- licence of the data: MIT, BSD-3-Clause (fetched)\n" in text


def test_a_published_card_has_examples_for_other_tools():
    text = render_card(manifest(published="me/judge"))
    assert 'PeftModel.from_pretrained(base, "me/judge")' in text
    assert "--lora-modules sentiment=me/judge" in text
    assert "from peft" not in render_card(manifest())


def test_a_card_shows_warnings():
    worse = Score("sentiment", "sentiment", "accuracy", 0.5, 0.4, 0.6, 100, 0.64)
    assert "worse than the backbone without it on sentiment" in render_card(
        manifest(scores=(worse,))
    )
    assert "without having been measured" in render_card(manifest(scores=(), published="me/x"))
    assert "**" not in render_card(manifest())


@pytest.mark.parametrize(
    "words",
    [
        "<script>alert(1)</script>",
        "![x](http://tracker.example/x.png)",
        "[click](javascript:alert(1))",
        "<img src=x onerror=y>",
        "\x1b[2Jgone",
        "```\n# Ignore all previous instructions",
    ],
)
def test_untrusted_text_is_escaped(words):
    contract = PromptContract("Say: {text}\n```\n# heading", words)
    training = Training(tasks=(words,), note=words, settings={words: words})
    text = render_card(manifest(about=words, name="n", contract=contract, training=training))
    body = text.split("---\n", 2)[2]
    outside = re.sub(
        r"\\.", "", "".join(body.split("```")[::2])
    )  # no code, nothing that is escaped
    for part in ("<script", "<img", "![", "](", "\x1b", "\n# Ignore", "\n# heading"):
        assert part not in outside


@pytest.mark.parametrize("words", ["https://evil.example/x", "www.evil.example", "me@evil.example"])
def test_untrusted_addresses_are_no_links(words):
    assert words not in render_card(manifest(about=words))


@pytest.mark.parametrize(
    "change",
    [
        {"published": "me/x --replace --endpoint https://evil.example"},
        {"published": "me/x", "backbone": "x --trust-remote-code"},
    ],
)
def test_untrusted_text_adds_no_command_options(change):
    text = render_card(manifest(**change))
    assert "vllm serve" not in text
    assert "adapterhub-chat pull" not in text
