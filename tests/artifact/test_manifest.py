"""adapterhub.json: what is written is read again, what does not fit is named in one message."""

import hashlib
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pico import toy_task
from pydantic import ValidationError

from adapterhub_chat.artifact.manifest import (
    MANIFEST,
    Manifest,
    Probe,
    Training,
    dump_manifest,
    read_manifest,
)
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.files import file_sha256
from adapterhub_chat.training.job import make_job
from adapterhub_chat.training.learner import Trained
from adapterhub_chat.training.run import manifest_of
from adapterhub_chat.types import Fingerprint, PromptContract, Score

FULL = Manifest(
    name="sentiment",
    about="Judges reviews: 好 or bad.",
    language="en",
    licence="Apache-2.0",
    created="2025-01-01T00:00:00+00:00",
    sha256="ab" * 32,
    backbone="pico",
    fingerprint=Fingerprint("LlamaForCausalLM", "c", "t", "m", "w", "nf4", "bfloat16"),
    contract=PromptContract(
        template="Review: {text}",
        system="Judge.",
        labels={"bad": "negative", "good": "positive"},
        stop=("\n",),
        max_new_tokens=4,
    ),
    metric="accuracy",
    training=Training(
        how="joint", tasks=("sentiment",), beside=("qa",), settings={"rank": 8}, steps=10
    ),
    scores=(Score("sentiment", "sentiment", "accuracy", 0.9, 0.8, 0.95, 100, 0.6, {"f1": 0.9}),),
    probe=Probe(prompt="Hello?", tokens=(1, 2), logprobs=(-0.5, -1.25), shift=2.0),
)


def written(folder, **changes):
    """Write FULL with changes in its JSON; None takes a key out."""
    values = json.loads(dump_manifest(FULL)) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(kept))
    return folder


def refusal(folder):
    with pytest.raises(AdapterError) as refused:
        read_manifest(folder)
    assert str(folder / MANIFEST) in str(refused.value)
    return str(refused.value)


def test_a_written_manifest_is_read_back(tmp_path):
    (tmp_path / MANIFEST).write_text(dump_manifest(FULL), encoding="utf-8")
    read = read_manifest(tmp_path)
    assert read == FULL
    assert isinstance(read.contract, PromptContract)
    assert list(read.contract.labels) == ["bad", "good"]
    assert dump_manifest(read) == dump_manifest(FULL)


@given(
    st.builds(
        PromptContract,
        template=st.text(),
        system=st.text(),
        labels=st.dictionaries(st.text(), st.text()),
        stop=st.lists(st.text()).map(tuple),
        temperature=st.floats(0, 10),
    ),
    st.text(),
)
def test_any_text_survives_a_round_trip(contract, about):
    manifest = FULL.model_copy(update={"contract": contract, "about": about})
    assert Manifest.model_validate_json(dump_manifest(manifest).encode()) == manifest


def test_the_file_is_readable_json():
    text = dump_manifest(FULL)
    assert "好" in text
    assert text.endswith("}\n")
    assert '\n  "backbone": "pico",\n' in text


def test_a_folder_without_the_file_has_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", [b"", b"name: a", b"[]", b"null", b"\xff\xfe{}", b"[" * 9999])
def test_an_invalid_manifest_is_refused(content, tmp_path):
    (tmp_path / MANIFEST).write_bytes(content)
    refusal(tmp_path)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    assert "not a regular file" in refusal(tmp_path)


def test_all_misfits_are_in_one_message(tmp_path):
    written(
        tmp_path,
        backbone=None,
        schema_version=2,
        extra=1,
        fingerprint={"architecture": "Llama", "colour": "red"},
        contract={"max_new_tokens": "many"},
        training={"how": "magic"},
        scores=[{"adapter": "a"}],
    )
    message = refusal(tmp_path)
    for part in (
        "backbone: is missing",
        "schema_version: input should be 1; got 2",
        "extra: no such key; allowed: about, backbone",
        "fingerprint.weights: is missing",
        "fingerprint.colour: no such key",
        "contract.max_new_tokens: input should be a valid integer",
        "training.how: input should be 'joint', 'sequence'",
        "scores.0.task: is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ()},
        {"tokens": (-1, 2)},
        {"logprobs": (-0.5,)},
        {"logprobs": (-0.5, math.nan)},
        {"backbone_logprobs": (-0.5,)},
        {"prompt": ""},
        {"prompt": "long " * 1000},
        {"shift": math.nan},
        {"shift": math.inf},
        {"shift": -1.0},
    ],
)
def test_an_invalid_probe_is_refused(changes, tmp_path):
    probe = FULL.probe.model_dump()
    with pytest.raises(ValidationError):
        Probe(**probe | changes)
    written(tmp_path, probe=probe | changes)
    assert "probe" in refusal(tmp_path)


def test_a_new_score_replaces_the_old_one_on_its_task_only():
    def score(task, value):
        return Score("sentiment", task, "accuracy", value, 0.0, 1.0, 10)

    both = FULL.with_scores([score("qa", 0.2)]).with_scores([score("sentiment", 0.7)])
    assert both.score("qa").value == 0.2
    assert both.score("sentiment").value == 0.7
    assert len(both.scores) == 2
    assert both.score("unknown") is None
    assert FULL.score("sentiment").value == 0.9


def test_the_base_model_is_the_hub_id_where_there_is_one():
    assert FULL.base_model == "pico"
    packaged = FULL.model_copy(update={"backbone": "smollm2-135m"})
    assert packaged.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_file_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 5000)
    expected = hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
    assert file_sha256(tmp_path / "file") == expected


def test_a_new_adapters_manifest_names_its_origin(backbone, make_weights):
    task = toy_task()
    job = make_job(backbone.tokenizer, "mine", task, TrainConfig(rank=2))
    trained = Trained(make_weights(), 10, 8, 0.25, 999, 1.26, "finished")
    manifest = manifest_of([task], backbone, job, trained, how="joint", trained_with=["other"])
    assert manifest.name == "mine"
    assert manifest.fingerprint == backbone.fingerprint
    assert manifest.contract == task.contract
    assert manifest.metric == "accuracy"
    record = manifest.training
    assert (record.how, record.tasks, record.beside) == ("joint", ("toy",), ("other",))
    assert record.data_sha256 == (task.data_hash(),)
    assert record.settings["rank"] == 2
    assert (record.steps, record.best_step, record.tokens) == (10, 8, 999)
    assert (record.seconds, record.validation_loss) == (1.3, 0.25)
    assert Manifest.model_validate_json(dump_manifest(manifest)) == manifest


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_was_never_measured_stays_out_of_the_json(loss, backbone, make_weights):
    task = toy_task()
    job = make_job(backbone.tokenizer, "mine", task, TrainConfig())
    trained = Trained(make_weights(), 1, 0, loss, 9, 0.1, "interrupted")
    manifest = manifest_of([task], backbone, job, trained, how="sequence")
    assert manifest.training.validation_loss is None
    json.loads(dump_manifest(manifest), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [0] * 200_000},
        {"training": {"tasks": [0] * 200_000}},
        {"contract": {"stop": [0] * 200_000}},
        {str(n): 1 for n in range(80_000)},
    ],
)
def test_a_manifest_of_many_values_is_refused_before_parsing(tmp_path, change):
    (tmp_path / MANIFEST).write_text(json.dumps(change))
    started = time.monotonic()
    assert "more than 10,000 values" in refusal(tmp_path)
    assert time.monotonic() - started < 0.5


def test_untrusted_keys_are_shown_without_control_characters(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"\x1b[2J\n" + "k" * 5000: 1}))
    message = refusal(tmp_path)
    assert "\x1b" not in message
    assert len(message) < 3000
