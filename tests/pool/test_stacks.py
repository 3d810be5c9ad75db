"""Stacks in the pool: what a row of one computes, what it stands on, and what happens when that moves."""

import shutil

import pytest
import torch
from peft import PeftModel
from pico import keep_adapter, random_weights, toy_task
from transformers import AutoModelForCausalLM

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.manifest import read_manifest
from adapterhub_chat.errors import AdapterError, UsageError
from adapterhub_chat.lora.weights import concatenate

FEW = {"max_steps": 8, "rows_per_step": 1, "learning_rate": 0.02, "eval_examples": 12}
PROMPTS = ["good good film", "the plot is bad"]


@pytest.fixture(scope="module")
def prepared(pico_folder, tmp_path_factory):
    """A pool with a source and a stack on it."""
    root = tmp_path_factory.mktemp("stacked") / "pool"
    hub = AdapterHub(str(pico_folder), root, dtype="fp32", device="cpu")
    keep_adapter(hub, random_weights(hub.model.shapes, size=0.05), "source")
    hub.transfer(
        "source", toy_task("target"), "stack", name="both", shots=4, source_task=toy_task(), **FEW
    )
    return root


@pytest.fixture
def stacked(prepared, pico_folder, tmp_path):
    """A hub over a pool of its own with the two."""
    shutil.copytree(prepared, tmp_path / "pool")
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"stack_layers": "9:"}, "stack_layers='9:' names no block"),
        ({"layer": 7}, "allowed are -2 to 1"),
    ],
)
def test_missing_blocks_are_an_error_before_training(hub, make_weights, blocks, message):
    keep_adapter(hub, make_weights(), "source")
    before = hub.pool.names()
    with pytest.raises(UsageError, match=message):
        hub.transfer("source", toy_task("target"), source_task=toy_task(), **blocks)
    assert hub.pool.names() == before


def test_a_row_of_a_stack_is_a_row_of_both(stacked):
    hub = stacked
    own, under = hub.pool.load("both"), hub.pool.load("source")
    assert own.weights.max_rank == 8
    assert own.manifest.stack[0].sha256 == under.manifest.sha256
    assert own.manifest.training.parents == (under.manifest.sha256,)
    hub.model.load("flat", concatenate([under.weights, own.weights]))
    rows = [*PROMPTS, PROMPTS[0], PROMPTS[0]]
    found = hub.next_token_logits(rows, ["both", "both", "source", None])
    torch.testing.assert_close(
        found[:2], hub.next_token_logits(PROMPTS, ["flat"] * 2), atol=1e-4, rtol=1e-4
    )
    for row, adapter in ((2, "source"), (3, None)):  # others of the batch are as they are alone
        alone = hub.next_token_logits([rows[row]], [adapter])
        torch.testing.assert_close(found[row], alone[0], atol=1e-4, rtol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_half_a_stack_is_half_of_both(stacked):
    named = stacked.next_token_logits(PROMPTS, [{"both": 0.5}] * 2)
    parts = stacked.next_token_logits(PROMPTS, [{"both": 0.5, "source": 1.0}] * 2)
    stacked.model.load("t", stacked.pool.load("both").weights)
    wanted = stacked.next_token_logits(PROMPTS, [{"t": 0.5, "source": 0.5}] * 2)
    torch.testing.assert_close(named, wanted, atol=1e-4, rtol=1e-4)
    assert (named - parts).abs().max() > 1e-4


def test_another_process_finds_both_by_the_name_alone(stacked):
    before = stacked.next_token_logits(PROMPTS, ["both"] * 2)
    other = AdapterHub(stacked.backbone.name, stacked.pool.root, dtype="fp32", device="cpu")
    assert torch.equal(other.next_token_logits(PROMPTS, ["both"] * 2), before)
    assert other.verify("both").ok
    assert other.predict("both", PROMPTS)[0].label in ("good", "bad")
    assert other.evaluate(["both"], [toy_task()], limit=4)[0].n == 4


def test_a_source_under_another_name_is_found_by_its_content(stacked):
    root = stacked.pool.root
    shutil.move(root / "source", root / "renamed")
    other = AdapterHub(stacked.backbone.name, root, dtype="fp32", device="cpu")
    before = stacked.next_token_logits(PROMPTS, ["both"] * 2)
    torch.testing.assert_close(other.next_token_logits(PROMPTS, ["both"] * 2), before)


def test_a_stack_whose_source_is_gone_is_refused_with_the_cure(stacked):
    stacked.pool.delete("source")
    other = AdapterHub(stacked.backbone.name, stacked.pool.root, dtype="fp32", device="cpu")
    with pytest.raises(AdapterError, match=r"stands on 'source' .* is not there .* pull it"):
        other.load("both")
    found = other.verify("both")
    assert not found.ok
    assert "is not there" in found.problems[0]


def test_a_stack_whose_source_has_changed_is_refused_until_it_is_restored(stacked, make_weights):
    keep_adapter(stacked, make_weights(seed=7), "source")
    for hub in (
        stacked,
        AdapterHub(stacked.backbone.name, stacked.pool.root, dtype="fp32", device="cpu"),
    ):
        with pytest.raises(AdapterError, match="other content by now"):
            hub.next_token_logits(PROMPTS, ["both"] * 2)
    stacked.rollback("source")
    assert stacked.next_token_logits(PROMPTS, ["both"] * 2).isfinite().all()


def test_a_source_that_another_process_changed_is_noticed_when_it_is_loaded(stacked, make_weights):
    other = AdapterHub(stacked.backbone.name, stacked.pool.root, dtype="fp32", device="cpu")
    other.next_token_logits(PROMPTS, ["both"] * 2)
    keep_adapter(stacked, make_weights(seed=7), "source")
    other.model.unload("source")  # as when it is evicted
    with pytest.raises(AdapterError, match="other content by now"):
        other.next_token_logits(PROMPTS, ["both"] * 2)


def test_flattened_it_is_a_plain_adapter_that_peft_reads(stacked):
    made = stacked.flatten("both")
    assert made.name == "both-flat"
    assert not made.stack
    assert made.training.parents == (
        stacked.pool.manifest("source").sha256,
        stacked.pool.manifest("both").sha256,
    )
    wanted = stacked.next_token_logits(PROMPTS, ["both"] * 2)
    torch.testing.assert_close(
        stacked.next_token_logits(PROMPTS, ["both-flat"] * 2), wanted, atol=1e-4, rtol=1e-4
    )
    base = AutoModelForCausalLM.from_pretrained(stacked.backbone.name, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, stacked.pool.root / "both-flat")
    for prompt, logits in zip(PROMPTS, wanted, strict=True):
        ids = torch.tensor([stacked.backbone.tokenizer(prompt).input_ids])
        with torch.inference_mode():
            theirs = peft(ids).logits[0, -1]
        torch.testing.assert_close(theirs, logits, atol=1e-3, rtol=1e-3)
    with pytest.raises(UsageError, match="is no stack"):
        stacked.flatten("both-flat")


def test_a_stack_on_a_stack_names_both(stacked):
    stacked.transfer(
        "both", toy_task("third"), "stack", name="top", shots=4, source_task=toy_task(), **FEW
    )
    assert [u.name for u in stacked.pool.manifest("top").stack] == ["source", "both"]
    stacked.flatten("top")
    torch.testing.assert_close(
        stacked.next_token_logits(PROMPTS, ["top"] * 2),
        stacked.next_token_logits(PROMPTS, ["top-flat"] * 2),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_source_from_a_folder_outside_is_flattened_at_once(stacked, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(stacked.pool.root / "source", outside)
    stacked.transfer(
        str(outside), toy_task("t"), "stack", name="own", shots=4, source_task=toy_task(), **FEW
    )
    assert not stacked.pool.manifest("own").stack
    assert stacked.pool.load("own").weights.max_rank == 12


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_a_stack_is_merged_as_a_whole(stacked):
    stacked.merge(["both"], "cat", name="copy")
    torch.testing.assert_close(
        stacked.next_token_logits(PROMPTS, ["copy"] * 2),
        stacked.next_token_logits(PROMPTS, ["both"] * 2),
        atol=1e-3,
        rtol=1e-3,
    )


def test_a_stack_is_not_published_by_itself(stacked, hub_server):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    with pytest.raises(AdapterError, match="flatten both"):
        stacked.push("both", "alice/x", **access)


# ---- the gate ------------------------------------------------------------------------------------


def hurting(hub, name):
    """Write into a manifest that the transfer was judged to hurt."""
    manifest = hub.pool.manifest(name)
    worse = manifest.transfer.model_copy(update={"verdict": "hurts", "gain": -0.2})
    hub.pool.describe(name, manifest.model_copy(update={"transfer": worse}))
    assert read_manifest(hub.pool.path(name)).transfer.verdict == "hurts"


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_a_harmful_adapter_is_neither_merged_nor_stacked_on_unless_forced(stacked):
    hurting(stacked, "both")
    with pytest.raises(AdapterError, match=r"'both' was judged to hurt .* force=True"):
        stacked.merge(["both", "source"], name="merged")
    assert stacked.merge(["both", "source"], name="merged", force=True).name == "merged"
    target, how = toy_task("t"), {"shots": 4, "source_task": toy_task(), "name": "top", **FEW}
    for method in ("stack", "auto"):
        with pytest.raises(AdapterError, match="nothing is stacked on it"):
            stacked.transfer("both", target, method, **how)
    assert stacked.transfer("both", target, "stack", force=True, **how).manifest.name == "top"
