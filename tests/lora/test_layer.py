"""The equation on a real model: against merged weights in float64, bit for bit where it must be."""

import copy
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import VOCABULARY, close, job, pico_tokenizer, toy_answers, toy_task
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from adapterhub_chat.errors import AdapterError, UnknownNameError, UsageError
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.layer import attach
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.sites import Site, find_sites
from adapterhub_chat.lora.weights import AdapterWeights, concatenate, initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import as_mix

IDS = torch.tensor([[5, 9, 60, 31, 7, 120], [8, 8, 99, 3, 200, 41]] * 3)
TOLERANCE = 2e-4
"""fp32 against float64 on logits of size about 10."""


def logits(model, mixes=None, ids=IDS):
    with torch.no_grad():
        if mixes is None:
            return model.backbone.model(ids).logits
        with model.mixing([as_mix(m) for m in mixes]):
            return model.backbone.model(ids).logits


def merged_logits(model, mix, ids):
    """The reference: W + sum of scaled B A, in float64, by plain transformers."""
    plain = copy.deepcopy(model.backbone.model).double()
    for module in plain.modules():
        module.__dict__.pop("forward", None)
        module._forward_pre_hooks.clear()
    for name, weight in as_mix(mix).weights:
        adapter = model.weights(name)
        for module, (a, b) in adapter.factors.items():
            delta = weight * adapter.scale(module) * (b.double() @ a.double())
            plain.get_submodule(module).weight.data += delta
    with torch.no_grad():
        return plain(ids).logits


def state_bytes(model):
    return {n: t.clone() for n, t in model.backbone.model.state_dict().items()}


@pytest.fixture
def loaded(model, make_weights):
    model.load("a", make_weights(rank=4, seed=1))
    model.load("b", make_weights(rank=12, seed=2, alpha=3.0))
    model.load("c", make_weights(rank=8, seed=3, only=("q_proj", "up_proj"), rslora=True))
    return model


@pytest.mark.parametrize(
    "mixes",
    [
        ["a", "b", "c", None, "a", "c"],
        ["a"] * 6,
        ["c", "b", "a", "c", "b", "a"],
        ["a"] * 5 + ["b"],
        ["b", "b", None, None, None, None],
        [{"a": 0.5, "b": 0.5}, "c", None, {"c": -2.0}, "a", {"a": 1, "b": 1, "c": 1}],
        [{"a": 0.3}] * 6,
    ],
)
def test_each_row_is_the_equation(loaded, mixes):
    got = logits(loaded, mixes)
    base = logits(loaded)
    for i, mix in enumerate(mixes):
        wanted = merged_logits(loaded, mix, IDS[i : i + 1])[0]
        torch.testing.assert_close(got[i].double(), wanted, atol=TOLERANCE, rtol=0)
        if mix is None:
            assert torch.equal(got[i], base[i])
        else:
            assert (got[i] - base[i]).abs().max() > 0.1


def test_zero_rows_are_the_backbone_bit_for_bit(loaded):
    assert torch.equal(logits(loaded, [None] * 6), logits(loaded))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_row_of_a_mixed_batch_is_that_row_alone(loaded, data):
    choice = st.sampled_from(["a", "b", "c", None, {"a": 0.5, "c": 0.5}, {"b": 2.0}])
    mixes = data.draw(st.lists(choice, min_size=6, max_size=6))
    together = logits(loaded, mixes)
    for i, mix in enumerate(mixes):
        alone = logits(loaded, [mix], IDS[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)


def test_after_load_and_unload_the_backbone_is_bit_identical(model, make_weights):
    before, bytes_before = logits(model), state_bytes(model)
    model.load("a", make_weights())
    logits(model, ["a"] * 6)
    model.unload("a")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, bytes_before[n]) for n, t in state_bytes(model).items())


def test_a_slot_is_reused_and_leaves_nothing_behind(model, make_weights):
    model.load("big", make_weights(rank=16, seed=1))
    model.unload("big")
    small = make_weights(rank=2, seed=2, only=("q_proj",))
    model.load("small", small)
    got = logits(model, ["small"] * 6)
    for i in range(6):
        wanted = merged_logits(model, "small", IDS[i : i + 1])[0]
        torch.testing.assert_close(got[i].double(), wanted, atol=TOLERANCE, rtol=0)


def test_many_adapters_grow_the_bank_and_keep_their_outputs(model, make_weights):
    model.load("first", make_weights(rank=4, seed=50))
    before = logits(model, ["first"] * 6)
    for i in range(9):
        model.load(f"n{i}", make_weights(rank=3 + i, seed=i))
    torch.testing.assert_close(logits(model, ["first"] * 6), before, atol=1e-5, rtol=0)
    assert model.names == ("first", *(f"n{i}" for i in range(9)))


def test_a_running_forward_keeps_its_adapter(loaded, make_weights):
    wanted = logits(loaded, ["a"] * 6)
    with loaded.mixing([as_mix("a")] * 6):
        loaded.load("a", make_weights(seed=77))
        loaded.unload("b")
        loaded.load("d", make_weights(seed=78))
        with torch.no_grad():
            assert torch.equal(loaded.backbone.model(IDS).logits, wanted)
    assert not torch.equal(logits(loaded, ["a"] * 6), wanted)


def test_threads_do_not_see_each_other(loaded):
    wanted = {name: logits(loaded, [name] * 6) for name in ("a", "b", "c")}
    wrong = []
    barrier = threading.Barrier(3)

    def run(name):
        for _ in range(15):
            barrier.wait()
            if not torch.equal(logits(loaded, [name] * 6), wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_all_misfits_are_named_and_nothing_changes(loaded, make_weights):
    good = make_weights()
    factors = dict(good.factors)
    first, second, third = list(factors)[:3]
    factors["model.layers.9.nowhere"] = factors[first]
    factors[second] = (torch.zeros(4, 31), factors[second][1])
    factors[third] = (factors[third][0], torch.full_like(factors[third][1], torch.nan))
    bad = AdapterWeights(factors, dict.fromkeys(factors, 8.0))
    before = logits(loaded, ["a"] * 6)
    with pytest.raises(AdapterError) as error:
        loaded.load("a", bad)
    for part in ("model.layers.9.nowhere", second, third, "31 -> ", "not finite"):
        assert part in str(error.value)
    assert torch.equal(logits(loaded, ["a"] * 6), before)
    with pytest.raises(AdapterError, match="reserved"):
        loaded.load("backbone", good)
    with pytest.raises(UnknownNameError, match="known: a, b, backbone, c"):
        logits(loaded, ["nobody"] * 6)


def test_sites_join_linears_that_share_an_input(model):
    names = [site.members for site in find_sites(model.backbone.model)]
    attention = "model.layers.0.self_attn."
    assert (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj") in names
    assert ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj") in names
    assert not any("lm_head" in m for members in names for m in members)


def test_site_members_with_different_inputs_are_correct():
    """Cross attention: k and v read another tensor than q; the shared shrink must notice."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, memory):
            return self.q_proj(x), self.k_proj(memory), self.v_proj(memory)

    torch.manual_seed(0)
    net = Cross()
    sites = find_sites(net)
    attach(net, sites)
    bank = Bank(sites, slots=1, rank=2, dtype=torch.float32)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (4, 4))
    start = initial_weights(shapes, rank=2, alpha=2, seed=0)
    adapter = start.with_factors(
        {m: (a, torch.randn_like(b)) for m, (a, b) in start.factors.items()}
    )
    bank.write(0, adapter)
    x, memory = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    plain = net(x, memory)
    with activate(Plan(bank.places, torch.ones(3, 1))):
        mixed = net(x, memory)
    for name, read, before, after in zip(shapes, (x, memory, memory), plain, mixed, strict=True):
        a, b = adapter.factors[name]
        torch.testing.assert_close(after, before + read @ a.T @ b.T)


def test_a_trainable_bank_gives_each_slot_its_own_gradient(model, make_weights):
    sites = model.sites
    modules = [m for s in sites for m in s.members]
    bank = model.new_bank(modules, slots=2, rank=4, dtype=torch.float32, trainable=True)
    bank.write(0, make_weights(seed=1))
    bank.write(1, make_weights(seed=2))
    mix = torch.tensor([[1.0, 0.0]] * 6)
    with activate(Plan(bank.places, mix)):
        model.backbone.model(IDS).logits.square().mean().backward()
    used, idle = (bank.gradient(n, 1.0, torch.empty(bank.flat.shape[1])) for n in (0, 1))
    assert used.abs().sum() > 0
    assert not idle.any()
    bank.zero_gradients()
    assert not any(t.grad.any() for t in (*bank.A.values(), *bank.B.values()))


def test_a_slot_holds_what_was_written_with_the_scale_in_b(make_weights):
    weights = make_weights(rank=3, only=("k_proj", "down_proj"))
    sites = [Site(m, (m,), a.shape[1], (b.shape[0],)) for m, (a, b) in weights.factors.items()]
    bank = Bank(sites, slots=3, rank=8, dtype=torch.float32)
    bank.write(1, weights)
    for module, (a, b) in weights.factors.items():
        assert torch.equal(bank.A[module][1, :3], a)
        assert torch.equal(bank.B[module][1, :3], (b * weights.scale(module)).T)
    assert not bank.flat[::2].any()
    vector = bank.vector(weights)
    bank.put(0, vector, weights.scale(next(iter(weights.factors))))
    assert torch.equal(bank.flat[0], bank.flat[1])
    back = bank.weights(vector, weights)
    assert all(
        torch.equal(back.factors[m][n], weights.factors[m][n]) for m in back.factors for n in (0, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slot_of_another_type_is_rounded_once(dtype, make_weights):
    weights = make_weights(rank=3, alpha=2.3, only=("down_proj",)).to(dtype)
    sites = [Site(m, (m,), a.shape[1], (b.shape[0],)) for m, (a, b) in weights.factors.items()]
    bank = Bank(sites, slots=1, rank=3, dtype=torch.bfloat16)
    bank.write(0, weights)
    for module, (a, b) in weights.factors.items():
        assert torch.equal(bank.A[module][0, :3], a.bfloat16())
        scaled = (b.float() * weights.scale(module)).bfloat16()
        assert torch.equal(bank.B[module][0, :3], scaled.T)


def test_the_gradient_of_a_vector_equals_autograds(model, make_weights):
    """The bank's gradient against plain autograd over the scaled factors."""
    weights = make_weights(rank=3, alpha=12.0)
    modules = list(weights.factors)
    bank = model.new_bank(modules, slots=2, rank=3, dtype=torch.float32, trainable=True)
    bank.put(1, bank.vector(weights), 4.0)
    with activate(Plan(bank.places, torch.tensor([[0.0, 1.0]] * 6))):
        model.backbone.model(IDS).logits.square().mean().backward()
    got = bank.weights(bank.gradient(1, 4.0, torch.empty(bank.flat.shape[1])), weights)
    leaves = {m: tuple(t.clone().requires_grad_() for t in p) for m, p in weights.factors.items()}
    handles = [
        model.backbone.model.get_submodule(m).register_forward_hook(
            lambda _l, x, y, m=m: y + x[0] @ leaves[m][0].T @ leaves[m][1].T * 4.0
        )
        for m in modules
    ]
    model.backbone.model(IDS).logits.square().mean().backward()
    for handle in handles:
        handle.remove()
    for module, pair in leaves.items():
        for mine, its in zip(got.factors[module], pair, strict=True):
            torch.testing.assert_close(mine, its.grad, atol=1e-5, rtol=1e-3)


def test_concatenated_adapters_are_their_sum(loaded, make_weights):
    parts = [make_weights(rank=4, seed=1), make_weights(rank=2, seed=2, only=("q_proj", "up_proj"))]
    for name, part in zip(("one", "two"), parts, strict=True):
        loaded.load(name, part)
    loaded.load("both", concatenate(parts))
    wanted = logits(loaded, [{"one": 1.0, "two": 1.0}] * 6)
    torch.testing.assert_close(logits(loaded, ["both"] * 6), wanted, atol=TOLERANCE, rtol=0)


def test_a_backbone_has_one_model_at_a_time_and_is_restored(backbone):
    model = AdapterModel(backbone)
    with pytest.raises(UsageError, match="carries adapters already: close the other model first"):
        AdapterModel(backbone)
    model.close()
    linears = [m for m in backbone.model.modules() if isinstance(m, nn.Linear)]
    assert not any("forward" in vars(linear) for linear in linears)
    linears[0].forward = lambda x: x * 0  # another library's
    again = AdapterModel(backbone)
    again.close()
    assert float(linears[0](torch.ones(1, 32)).sum()) == 0


def test_backbones_of_other_families_train(tmp_path):
    """OPT: biases, gradients that do not lie in order, and blocks that drop out when told they train."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32, dropout=0.5, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    model = AdapterModel(load_backbone(str(tmp_path), dtype="fp32", device="cpu"))
    jobs = [job(model, toy_task(), rows_per_step=1), job(model, toy_answers(), rows_per_step=1)]
    together = train(model, jobs)
    with model.checkpointing():
        again = train(model, jobs)
    for each in jobs:
        alone = train(model, [each])[each.name].weights
        close(together[each.name].weights, alone)
        close(again[each.name].weights, alone)
