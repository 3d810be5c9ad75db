"""May an adapter be used on this backbone, and does it do what it did? Trust and the registry together."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.folder import config_of
from adapterhub_chat.artifact.manifest import MANIFEST, Manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, PoolError, UnknownNameError, UsageError
from adapterhub_chat.files import file_sha256
from adapterhub_chat.model.backbone import LIBRARIES
from adapterhub_chat.pool.pool import EARLIER, PROBES, Pool
from adapterhub_chat.pool.probe import probe_key
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import PromptContract, Score, as_mix

PROMPTS = ["a good film", "bad"]


def draft(backbone, name="a", **changes):
    return Manifest(
        name=name,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        contract=PromptContract(template=f"{name}: {{text}}"),
        **changes,
    )


@pytest.fixture
def registry(model, tmp_path):
    return Registry(model, Pool(tmp_path / "pool"))


@pytest.fixture
def kept(registry, make_weights):
    """The folder of an adapter `a` that the pool of `hub` holds too."""
    registry.save_new(make_weights(), draft(registry.model.backbone))
    return registry.pool.root / "a"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(hub):
    tensors = hub.backbone.model.state_dict()
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def assert_refused(hub, folder, *words):
    """Loading and verifying say no, with all the words, and leave everything as it was."""
    before = contents(hub.pool.root), contents(folder), state(hub), hub.model.names
    with pytest.raises(AdapterError) as refused:
        hub.load(folder)
    verdict = hub.verify(folder)
    assert not verdict.ok
    assert verdict.status == "refused"
    for word in words:
        assert word in str(refused.value)
        assert word in "; ".join(verdict.problems)
    assert (contents(hub.pool.root), contents(folder), state(hub), hub.model.names) == before
    segments = hub.model.slots._segments
    free = sum(len(segment.free) for segment in segments)
    assert free == sum(segment.bank.slots for segment in segments) - len(hub.model.names)
    return verdict.problems


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder, change):
    """Change the weights and set the manifest's sha256 to theirs, as a forger would."""
    tensors = load_file(folder / WEIGHTS)
    save_file({n: change(n, t).contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    sha256 = file_sha256(folder / WEIGHTS)
    edit_json(folder / MANIFEST, lambda values: values.update(sha256=sha256))


def test_problems_do_not_depend_on_the_folders_name(hub, kept, tmp_path):
    folder = tmp_path / "one\n  - two"
    shutil.copytree(kept, folder)
    edit_json(folder / MANIFEST, lambda values: values.update(sha256="0" * 64))
    (problem,) = hub.verify(folder).problems
    assert str(folder / WEIGHTS) in problem
    with pytest.raises(AdapterError) as refused:
        hub.load(folder, "b")
    assert refused.value.misfits == (problem,)


def test_each_problem_of_a_folder_is_listed_separately(hub, kept):
    edit_json(kept / CONFIG, lambda values: values.update(r=0, bias="all"))
    with pytest.raises(AdapterError) as refused:
        hub.load(kept)
    assert len(refused.value.misfits) > 1
    assert hub.verify(kept).problems == refused.value.misfits
    assert all(problem in str(refused.value) for problem in refused.value.misfits)


# ---- the four answers ----------------------------------------------------------------------------


def test_exact_on_the_backbone_it_was_made_on(hub, kept):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub.load("a") == "a"
    verdict = hub.verify("a")
    assert (verdict.ok, verdict.status, verdict.problems) == (True, "exact", ())


def assert_compatible(hub, registry, *words):
    with pytest.warns(UserWarning, match="adapter 'a' is compatible: made on float32") as caught:
        hub.load("a")
    assert caught[0].filename == __file__
    for word in words:
        assert word in str(caught[0].message)
    verdict = hub.verify("a")
    assert (verdict.ok, verdict.status) == (True, "compatible")
    assert "made on float32 (none quantization)" in verdict.problems[0]
    ours = hub.next_token_logits(PROMPTS, ["a", None])
    assert (ours[0] - hub.next_token_logits(PROMPTS)[0]).abs().max() > 0.1


def test_compatible_with_a_warning_in_another_precision(kept, registry, pico_folder):
    hub = AdapterHub(str(pico_folder), registry.pool.root, dtype="bf16", device="cpu")
    assert_compatible(hub, registry, "this backbone is bfloat16 (none quantization)")


def test_compatible_with_a_warning_on_a_4_bit_backbone(kept, registry, pico_folder):
    folder = str(pico_folder)
    try:
        hub = AdapterHub(folder, registry.pool.root, dtype="fp32", device="cpu", quantize="nf4")
        hub.next_token_logits(PROMPTS)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"bitsandbytes cannot do this here: {error}")
    assert_compatible(hub, registry, "this backbone is float32 (nf4 quantization)")


def test_unverified_with_a_warning_when_plain_peft_made_it(hub, kept):
    (kept / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"adapter 'a' is unverified: it has no adapterhub.json"):
        hub.load(kept)
    verdict = hub.verify(kept)
    assert (verdict.ok, verdict.status) == (True, "unverified")
    assert verdict.problems == (
        "it has no adapterhub.json: its backbone and its prompt are unknown",
    )


def with_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


def with_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def with_weights(folder):
    weights = folder / "model.safetensors"
    save_file({n: t + 0.01 for n, t in load_file(weights).items()}, weights, {"format": "pt"})


def with_sizes(folder):
    config = LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 64
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ([with_template], {"template"}),
        ([with_token], {"tokenizer"}),
        ([with_weights], {"weights"}),
        ([with_sizes], {"config", "weights"}),
        ([with_template, with_token, with_weights], {"template", "tokenizer", "weights"}),
    ],
)
def test_refused_on_another_backbone_naming_each_difference(
    change, fields, hub, kept, pico_folder, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(pico_folder, other)
    for step in change:
        step(other)
    there = AdapterHub(str(other), hub.pool.root, dtype="fp32", device="cpu")
    problems = assert_refused(there, kept, f"load it on '{pico_folder}'")
    named = {p.split("the backbone's ")[1].split(" is ")[0] for p in problems if "made for" in p}
    assert named == fields
    sizes = [p for p in problems if "32 -> 48, the backbone 32 -> 64" in p]
    assert len(sizes) == (4 if with_sizes in change else 0)
    assert next(i.status for i in there.adapters() if i.name == "a") == "refused"


def test_refused_on_other_weights_of_the_same_shapes(kept, hub, other_folder):
    there = AdapterHub(str(other_folder), hub.pool.root, dtype="fp32", device="cpu")
    (problem,) = assert_refused(there, kept, "the backbone's weights is")
    assert there.backbone.fingerprint.weights in problem
    assert hub.backbone.fingerprint.weights in problem


def test_a_refused_mix_is_an_error_before_any_forward(kept, hub, other_folder):
    there = AdapterHub(str(other_folder), hub.pool.root, dtype="fp32", device="cpu")
    with pytest.raises(AdapterError, match="is refused on"):
        there.next_token_logits(PROMPTS, ["a", None])
    assert there.model.names == ()


# ---- the probe -----------------------------------------------------------------------------------


def test_the_probe_is_what_the_adapter_answers(hub, kept):
    probe = hub.pool.manifest("a").probe
    hub.load("a")
    with_it, without = hub.next_token_logits([probe.prompt] * 2, ["a", None])
    assert probe.tokens == tuple(with_it.topk(len(probe.tokens)).indices.tolist())
    logprobs = with_it.log_softmax(-1)[list(probe.tokens)]
    torch.testing.assert_close(logprobs, torch.tensor(probe.logprobs), atol=1e-3, rtol=0)
    logprobs = without.log_softmax(-1)[list(probe.tokens)]
    recorded = torch.tensor(probe.backbone_logprobs)
    torch.testing.assert_close(logprobs, recorded, atol=1e-3, rtol=0)
    assert probe.shift == pytest.approx(float((with_it - without).abs().max()), abs=1e-3)


def test_an_adapter_that_silently_does_nothing_is_refused(hub, kept):
    edit_tensors(kept, lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)
    assert_refused(hub, kept, "the adapter has no effect")


def test_an_adapter_that_does_almost_nothing_is_refused(hub, kept):
    edit_tensors(kept, lambda name, t: t / 1000 if "lora_B" in name else t)
    assert_refused(hub, kept, "the adapter has no effect")


def test_other_weights_under_a_forged_hash_are_refused(hub, kept):
    edit_tensors(kept, lambda name, t: -t if "lora_B" in name else t)
    assert_refused(hub, kept, "a log-probability of its probe is off by")


@pytest.mark.parametrize("alpha", [4, 24])
def test_another_alpha_is_refused(alpha, hub, kept):
    edit_json(kept / CONFIG, lambda values: values.update(lora_alpha=alpha))
    assert_refused(hub, kept, "a log-probability of its probe is off by")


def test_another_scaling_is_refused(hub, kept):
    edit_json(kept / CONFIG, lambda values: values.update(use_rslora=True))
    assert_refused(hub, kept, "a log-probability of its probe is off by")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [1, 300, 2, 3, 4]}, "token 300, the backbone has 300"),
        ({"tokens": [1, 2]}, "2 tokens have 5 log-probabilities"),
        ({"backbone_logprobs": [-1.0]}, "5 tokens have 1 log-probabilities"),
        ({"logprobs": [-1.0, float("nan"), -1.0, -1.0, -1.0]}, "NaN is no number in JSON"),
        ({"logprobs": [-90.0] * 5}, "is off by"),
        (
            {"logprobs": [-500.0] * 5, "backbone_logprobs": [1e300] * 5, "shift": 0.0},
            "the backbone alone answers its probe otherwise",
        ),
        ({"prompt": ""}, "probe.prompt"),
    ],
)
def test_a_forged_probe_is_refused(change, words, hub, kept):
    edit_json(kept / MANIFEST, lambda values: values["probe"].update(change))
    assert_refused(hub, kept, words)


def test_an_adapter_without_a_probe_is_only_compatible(hub, kept):
    edit_json(kept / MANIFEST, lambda values: values.update(probe=None))
    verdict = hub.verify("a")
    assert (verdict.ok, verdict.status) == (True, "compatible")
    assert "it has no probe" in verdict.problems[0]
    assert next(i.status for i in hub.adapters() if i.name == "a") == "compatible"


def test_a_probe_without_the_backbones_numbers_is_compared_in_the_same_precision_only(
    hub, kept, pico_folder
):
    edit_json(kept / MANIFEST, lambda values: values["probe"].pop("backbone_logprobs"))
    assert hub.verify("a").status == "exact"
    edit_json(kept / MANIFEST, lambda values: values["probe"].update(logprobs=[-9.0] * 5))
    assert_refused(hub, kept, "is off by")
    there = AdapterHub(str(pico_folder), hub.pool.root, dtype="bf16", device="cpu")
    assert there.verify("a").status == "compatible"


@pytest.mark.parametrize("alpha", [4, 24])
def test_another_alpha_is_refused_in_another_precision_too(alpha, hub, kept, pico_folder):
    edit_json(kept / CONFIG, lambda values: values.update(lora_alpha=alpha))
    there = AdapterHub(str(pico_folder), hub.pool.root, dtype="bf16", device="cpu")
    (problem,) = there.verify("a").problems
    assert "a log-probability of its probe is off by" in problem


def test_an_untrained_adapter_without_effect_is_accepted(hub, registry, make_weights):
    registry.save_new(make_weights(size=0.0), draft(hub.backbone))
    assert hub.pool.manifest("a").probe.shift == 0
    assert hub.verify("a").status == "exact"


# ---- the probe is remembered ---------------------------------------------------------------------


@pytest.fixture
def forwards(hub):
    """How often the hub's backbone has run."""
    seen = []
    hub.backbone.model.register_forward_hook(lambda *_all: seen.append(1))
    return seen


def test_a_probe_made_on_saving_is_not_run_again_on_load(hub, kept, forwards):
    hub.load("a")
    assert forwards == []
    hub.verify("a")
    assert len(forwards) == 1  # verifying always asks
    assert hub.pool.answered_probes() == [probe_key(hub.pool.load("a"), hub.model)]


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"\xff\n" * 9)])
def test_without_records_a_probe_is_run_once(damage, hub, kept, forwards, pico_folder):
    damage(hub.pool.root / PROBES)
    for _ in range(3):
        hub.load("a")
    assert len(forwards) == 1
    there = AdapterHub(str(pico_folder), hub.pool.root, dtype="fp32", device="cpu")
    there.backbone.model.register_forward_hook(lambda *_all: forwards.append(1))
    there.load("a")
    assert len(forwards) == 1  # the first one has noted it for the second


def test_in_a_read_only_pool_the_process_remembers_passed_probes(hub, kept, forwards):
    (hub.pool.root / PROBES).unlink()
    (hub.pool.root / PROBES).mkdir()  # in the way, as on a disk that may only be read
    for _ in range(3):
        hub.load("a")
    assert len(forwards) == 1
    assert hub.pool.answered_probes() == []


def test_a_failed_probe_is_run_every_time(hub, kept, forwards):
    edit_json(kept / MANIFEST, lambda values: values["probe"].update(logprobs=[-90.0] * 5))
    for count in (1, 2):
        with pytest.raises(AdapterError, match="is off by"):
            hub.load("a")
        assert len(forwards) == count


def test_the_probe_key_changes_with_everything_the_answer_depends_on(
    hub, kept, monkeypatch, pico_folder
):
    stored = hub.pool.load("a")
    keys = {probe_key(stored, hub.model)}
    for change in (
        {"sha256": "0"},
        {"probe": stored.manifest.probe.model_copy(update={"shift": 9})},
    ):
        other = replace(stored, manifest=stored.manifest.model_copy(update=change))
        keys.add(probe_key(other, hub.model))
    keys.add(probe_key(replace(stored, config={**stored.config, "lora_alpha": 9}), hub.model))
    there = AdapterHub(str(pico_folder), hub.pool.root, dtype="bf16", device="cpu")
    keys.add(probe_key(stored, there.model))
    monkeypatch.setitem(LIBRARIES, "torch", "9.9")
    keys.add(probe_key(stored, hub.model))
    monkeypatch.setitem(LIBRARIES, "transformers", "9.9")
    keys.add(probe_key(stored, hub.model))
    assert len(keys) == 7
    assert all(len(key) == 64 for key in keys)
    assert probe_key(replace(stored, manifest=None), hub.model) == ""


def test_a_changed_description_runs_no_probe(hub, kept, registry, forwards):
    score = Score("a", "toy", "accuracy", 0.5, 0.4, 0.6, 10, 0.3)
    registry.record_scores([score])
    assert hub.pool.manifest("a").scores == (score,)
    hub.load("a")
    assert forwards == []


# ---- rolling back --------------------------------------------------------------------------------


def two_versions(registry, make_weights):
    """Keep `a` twice; return each version's manifest and answers."""
    found = []
    for seed in (1, 2):
        manifest = registry.save_new(
            make_weights(seed=seed), draft(registry.model.backbone, about=f"v{seed}")
        )
        found.append((manifest, answers(registry.model)))
    return found


def answers(model):
    ids = torch.tensor([[4, 5, 6]])
    with model.mixing([as_mix("a")]), torch.no_grad():
        return model.backbone.model(ids).logits


def test_rolling_back_gives_new_requests_the_earlier_version(registry, make_weights):
    (old, before), (new, after) = two_versions(registry, make_weights)
    assert (
        registry.rollback("a") == registry.known("a").manifest == registry.pool.manifest("a") == old
    )
    assert torch.equal(answers(registry.model), before)
    assert registry.rollback("a") == new
    assert torch.equal(answers(registry.model), after)
    assert not torch.equal(before, after)


def test_a_running_request_keeps_its_version(registry, make_weights):
    (_, before), (_, after) = two_versions(registry, make_weights)
    ids = torch.tensor([[4, 5, 6]])
    with registry.model.mixing([as_mix("a")]), torch.no_grad():
        registry.rollback("a")
        assert torch.equal(registry.model.backbone.model(ids).logits, after)
    assert torch.equal(answers(registry.model), before)


def test_rollback_does_not_load_an_unloaded_adapter(registry, hub, make_weights, tmp_path):
    (old, _), _ = two_versions(registry, make_weights)
    shutil.copytree(registry.pool.root / "a", tmp_path / "elsewhere")
    hub.load(tmp_path / "elsewhere", name="a")
    loaded = hub.next_token_logits(PROMPTS, ["a", "a"])
    assert hub.rollback("a") == old  # the pool's; the loaded one came from another folder
    assert torch.equal(hub.next_token_logits(PROMPTS, ["a", "a"]), loaded)
    hub.unload("a")
    hub.rollback("a")
    assert hub.model.names == ()


def test_a_refused_previous_version_is_not_restored(hub, registry, make_weights):
    two_versions(registry, make_weights)
    edit_tensors(registry.pool.root / "a" / EARLIER, lambda _name, t: t * float("nan"))
    hub.load("a")
    before = contents(hub.pool.root), hub.next_token_logits(PROMPTS, ["a", None])
    with pytest.raises(AdapterError, match="some numbers are not finite"):
        hub.rollback("a")
    assert contents(hub.pool.root) == before[0]
    assert torch.equal(hub.next_token_logits(PROMPTS, ["a", None]), before[1])


def test_rolling_back_to_another_precision_warns_the_caller(registry, make_weights, pico_folder):
    two_versions(registry, make_weights)
    hub = AdapterHub(str(pico_folder), registry.pool.root, dtype="bf16", device="cpu")
    with pytest.warns(UserWarning, match="compatible"):
        hub.load("a")
    with pytest.warns(UserWarning, match="adapter 'a' is compatible") as caught:
        hub.rollback("a")
    assert caught[0].filename == __file__


def test_a_load_fills_one_slot_with_the_weights_of_the_file(hub, kept):
    num_loads = hub.model.slots.num_loads
    hub.load(kept)
    assert hub.model.slots.num_loads == num_loads + 1
    torch.testing.assert_close(
        hub.model.weights("a").factors, hub.pool.load("a").weights.factors, rtol=0, atol=0
    )


# ---- damage --------------------------------------------------------------------------------------


def test_weights_with_another_hash_than_the_manifests_are_refused(hub, kept):
    data = bytearray((kept / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (kept / WEIGHTS).write_bytes(data)
    assert_refused(hub, kept, "is not the file that adapterhub.json describes")


def test_a_damaged_manifest_is_refused(hub, kept):
    (kept / MANIFEST).write_text("{")
    assert_refused(hub, kept, MANIFEST, "is not valid JSON")


def test_a_damaged_config_is_refused(hub, kept):
    (kept / CONFIG).write_text("[]")
    assert_refused(hub, kept, CONFIG, "must hold a JSON object")


def test_shape_and_fingerprint_misfits_are_in_one_message(hub, kept, other_folder):
    there = AdapterHub(str(other_folder), hub.pool.root, dtype="fp32", device="cpu")
    first = "model.layers.0.self_attn.q_proj"
    edit_tensors(kept, lambda name, t: t[:, :-1] if f"{first}.lora_A" in name else t)
    assert_refused(
        there,
        kept,
        f"{first}: the adapter maps 31 -> 32",
        "the backbone's weights is",
    )


def test_a_refused_adapter_leaves_the_loaded_one_of_its_name_in_place(hub, kept, tmp_path):
    hub.load("a")
    before = hub.next_token_logits(PROMPTS, ["a", None])
    manifest = hub.pool.manifest("a")
    forged = tmp_path / "forged" / "a"
    shutil.copytree(kept, forged)
    edit_tensors(forged, lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)
    with pytest.raises(AdapterError, match="no effect"):
        hub.load(forged)
    (kept / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(AdapterError, match="no safetensors file"):
        hub.load("a")
    assert hub.model.names == ("a",)
    assert torch.equal(hub.next_token_logits(PROMPTS, ["a", None]), before)
    info = next(i for i in hub.adapters() if i.name == "a")
    assert info.loaded
    assert info.scores == manifest.scores


# ---- the backbone is never touched ---------------------------------------------------------------


def test_load_and_unload_leave_the_backbone_bit_for_bit(hub, kept):
    logits, tensors = hub.next_token_logits(PROMPTS), state(hub)
    hub.load("a")
    hub.next_token_logits(PROMPTS, ["a", None])
    hub.unload("a")
    assert torch.equal(hub.next_token_logits(PROMPTS), logits)
    assert state(hub) == tensors
    assert hub.model.names == ()


def test_verifying_loads_nothing_and_changes_nothing(hub, kept):
    before = hub.next_token_logits(PROMPTS), state(hub), contents(hub.pool.root)
    assert hub.verify("a").ok
    assert hub.verify(kept).ok
    assert hub.verify(str(kept)).ok
    assert hub.model.names == ()
    assert torch.equal(hub.next_token_logits(PROMPTS), before[0])
    assert (state(hub), contents(hub.pool.root)) == before[1:]


@pytest.mark.parametrize("name", ["auto", "two words", "backbone"])
def test_verify_accepts_any_folder_name(name, hub, kept, tmp_path):
    strange = tmp_path / name
    shutil.copytree(kept, strange)
    assert hub.verify(strange).status == "exact"
    with pytest.raises(UsageError, match=r"reserved|allowed are"):
        hub.load(strange)
    assert hub.load(strange, name="proper") == "proper"


def test_verify_of_a_missing_folder(hub, kept, tmp_path):
    with pytest.raises(UnknownNameError, match="known: a"):
        hub.verify("b")
    assert not hub.verify(tmp_path / "nowhere").ok


# ---- the registry -----------------------------------------------------------------------------------


def test_save_new_loads_the_adapter_and_saves_it_for_reloading(registry, hub, make_weights):
    weights = make_weights()
    manifest = registry.save_new(weights, draft(registry.model.backbone))
    assert registry.model.names == ("a",)
    assert registry.known("a").manifest == manifest == registry.pool.manifest("a")
    hub.load("a")
    with registry.model.mixing([as_mix("a")]), torch.no_grad():
        ids = torch.tensor([[4, 5, 6]])
        ours = registry.model.backbone.model(ids).logits
    with hub.model.mixing([as_mix("a")]), torch.no_grad():
        assert torch.equal(hub.backbone.model(ids).logits, ours)


def test_peft_is_told_the_hub_id_of_a_packaged_backbone(registry, make_weights):
    packaged = draft(registry.model.backbone).model_copy(update={"backbone": "smollm2-135m"})
    registry.save_new(make_weights(), packaged)
    config = json.loads((registry.pool.root / "a" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_an_adapter_that_cannot_be_saved_is_not_loaded(registry, make_weights):
    old = make_weights(seed=1)
    manifest = registry.save_new(old, draft(registry.model.backbone, about="old"))
    shutil.rmtree(registry.pool.root)
    registry.pool.root.write_text("a file in the way")
    with pytest.raises(PoolError):
        registry.save_new(make_weights(seed=2), draft(registry.model.backbone, about="new"))
    assert registry.model.names == ("a",)
    for module, (a, b) in registry.model.weights("a").factors.items():
        torch.testing.assert_close((a, b), old.factors[module])
    assert registry.known("a").manifest == manifest


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_saved(bad, registry, make_weights):
    good = make_weights()
    broken = good.with_factors({m: (a, b * bad) for m, (a, b) in good.factors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        registry.save_new(broken, draft(registry.model.backbone))
    assert registry.model.names == ()
    assert registry.pool.names() == []


def test_a_pool_member_takes_precedence_over_a_folder_of_its_name(
    registry, kept, make_weights, monkeypatch
):
    registry.save_new(make_weights(seed=9), draft(registry.model.backbone, name="b"))
    monkeypatch.chdir(kept.parent.parent)
    shutil.copytree(kept.parent / "b", "a")
    shutil.copytree(kept.parent / "b", "c")
    assert registry.read("a").path == kept
    assert registry.read("./a").path.resolve() == (kept.parent.parent / "a")
    assert registry.read("c").name == "c"


def test_one_adapter_under_two_names(hub, kept):
    hub.load("a")
    hub.load("a", name="twin")
    assert hub.model.names == ("a", "twin")
    both = hub.next_token_logits(PROMPTS[:1] * 2, ["a", "twin"])
    torch.testing.assert_close(both[0], both[1])
    with pytest.raises(UsageError, match="reserved"):
        hub.load("a", name="auto")


def test_the_heaviest_adapter_of_a_mix_gives_the_contract(registry, make_weights):
    for seed, name in enumerate("ab"):
        registry.save_new(make_weights(seed=seed), draft(registry.model.backbone, name=name))
    assert registry.contract(as_mix({"a": 0.3, "b": 0.7})).template == "b: {text}"
    assert registry.contract(as_mix({"a": -0.8, "b": 0.7})).template == "a: {text}"
    assert registry.contract(as_mix(None)) is None


def test_the_adapters_of_a_mix_are_loaded_from_the_pool_once(hub, kept):
    fresh = Registry(hub.model, hub.pool)
    mixes = fresh.resolve(["a", None, {"a": 0.5}, "a"])
    assert [str(mix) for mix in mixes] == ["a", "backbone", "a=0.5", "a"]
    assert fresh.model.names == ("a",)
    with pytest.raises(UnknownNameError, match="known: a"):
        fresh.resolve(["a", "nobody"])
    fresh.unload("a")
    assert fresh.known("a") is None


def test_a_score_is_written_to_the_pool_and_to_the_loaded_manifest(registry, kept):
    score = Score("a", "toy", "accuracy", 0.5, 0.4, 0.6, 10, 0.3)
    registry.describe("a", registry.known("a").manifest.with_scores([score]))
    assert registry.known("a").manifest.scores == (score,)
    assert registry.pool.load("a").manifest.scores == (score,)


def test_a_score_of_an_older_version_is_not_written(registry, kept, make_weights):
    score = Score("a", "toy", "accuracy", 0.5, 0.4, 0.6, 10, 0.3)
    newer = Registry(registry.model, Pool(registry.pool.root))
    newer.save_new(make_weights(seed=5), draft(registry.model.backbone, about="newer"))
    with pytest.raises(AdapterError, match="load it again"):
        registry.describe("a", registry.known("a").manifest.with_scores([score]))
    assert registry.pool.load("a").manifest.about == "newer"


def test_the_saved_config_matches_the_weights(registry, kept):
    stored = registry.pool.load("a")
    assert dict(stored.config) == config_of(
        stored.weights, registry.model.backbone.name, registry.model.shapes
    )
