"""The recorded probe, on other dtypes and kernels: rounding is no fault, and a damaged adapter is found."""

from dataclasses import replace

import pytest
import torch

from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.pool.probe import make_probe, probe_problem

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module")
def models(pico_folder):
    """The same backbone in each dtype and quantization."""
    return {
        **{d: AdapterModel(load_backbone(str(pico_folder), dtype=d, device="cpu")) for d in DTYPES},
        **{
            q: AdapterModel(load_backbone(str(pico_folder), quantize=q, dtype="fp32", device="cpu"))
            for q in ("nf4", "int8")
        },
    }


def random_adapter(model, seed, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    start = initial_weights(model.shapes, rank=4, alpha=8.0, seed=seed)
    factors = {
        m: (a, torch.randn(b.shape, generator=generator) * size)
        for m, (a, b) in start.factors.items()
    }
    return start.with_factors(factors)


def record(model, weights):
    model.load("made", weights)
    try:
        return make_probe(model, "made")
    finally:
        model.unload("made")


def problem(model, weights, probe, status):
    model.load("checked", weights)
    try:
        return probe_problem(model, "checked", probe, status)
    finally:
        model.unload("checked")


def kernels(name):
    return torch.backends.mkldnn.flags(enabled=name == "mkldnn")


@pytest.mark.parametrize("made_on", DTYPES)
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_rounding_of_another_dtype_or_kernel_is_accepted(models, made_on, step):
    alarms = []
    for seed in range(0, 100, step):
        weights = random_adapter(models["fp32"], seed, size=0.02 * 1.04**seed)
        probe = record(models[made_on], weights)
        for name, model in models.items():
            for library in ("mkldnn", "torch"):
                with kernels(library):
                    status = "exact" if name == made_on else "compatible"
                    if fault := problem(model, weights, probe, status):
                        alarms.append((seed, name, library, fault))
    assert not alarms


def changed(weights, change):
    return weights.with_factors({m: change(m, a, b) for m, (a, b) in weights.factors.items()})


def exchanged(weights, first, second):
    """Give the module `first` of every layer the factors of `second`, and the other way round."""

    def other(module):
        end = {first: second, second: first}.get(module.rpartition(".")[2])
        return module.rpartition(".")[0] + "." + end if end else module

    return weights.with_factors({m: weights.factors[other(m)] for m in weights.factors})


def transposed_in_place(b):
    return b.t().reshape(b.shape).contiguous()


DAMAGES = {
    "scale doubled": lambda w, _: replace(w, alphas={m: 2 * a for m, a in w.alphas.items()}),
    "scale halved": lambda w, _: replace(w, alphas={m: a / 2 for m, a in w.alphas.items()}),
    "alpha of another rank": lambda w, _: replace(w, rslora=True),
    "nothing": lambda w, _: changed(w, lambda m, a, b: (a, torch.zeros_like(b))),
    "first layer zeroed": lambda w, _: changed(w, lambda m, a, b: (a, b * (".layers.0." not in m))),
    "last layer zeroed": lambda w, _: changed(w, lambda m, a, b: (a, b * (".layers.1." not in m))),
    "A of another seed": lambda w, o: changed(w, lambda m, a, b: (o.factors[m][0], b)),
    "B of another seed": lambda w, o: changed(w, lambda m, a, b: (a, o.factors[m][1])),
    "sign turned": lambda w, _: changed(w, lambda m, a, b: (a, -b)),
    "gate and up exchanged": lambda w, _: exchanged(w, "gate_proj", "up_proj"),
    "k and v exchanged": lambda w, _: exchanged(w, "k_proj", "v_proj"),
    "B transposed in place": lambda w, _: changed(
        w, lambda m, a, b: (a, transposed_in_place(b) if m.endswith("down_proj") else b)
    ),
    "A transposed in place": lambda w, _: changed(w, lambda m, a, b: (transposed_in_place(a), b)),
    "one module lacks its update": lambda w, _: changed(
        w, lambda m, a, b: (a, b * (not m.endswith("layers.0.mlp.down_proj")))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected_on_every_dtype(models, damage):
    missed = []
    for seed in range(4):
        weights = random_adapter(models["fp32"], seed)
        probe = record(models["bf16" if seed % 2 else "fp32"], weights)
        damaged = DAMAGES[damage](weights, random_adapter(models["fp32"], seed + 1000))
        missed += [
            (seed, d) for d in DTYPES if not problem(models[d], damaged, probe, "compatible")
        ]
    assert not missed
