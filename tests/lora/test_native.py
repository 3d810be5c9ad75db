"""The native products against the same sums in float64, and against themselves: a row is its own."""

import pytest
import torch
from torch.nn import functional

from adapterhub_chat.lora import native
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.plan import Plan
from adapterhub_chat.lora.sites import Site
from adapterhub_chat.lora.weights import AdapterWeights, Head

SITE = Site("q|k", ("q", "k"), 70, (130, 33))  # no width is a multiple of a tile or a vector
OTHER = Site("o", ("o",), 96, (64,))
TILED = Site("g|u", ("g", "u"), 96, (144, 48))  # for matrix tiles, four and one to a pass
ALL = (SITE, OTHER, TILED)
CLOSE = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 0.06, "rtol": 0.02}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    if native.library(folder) is None:
        pytest.skip("needs a C++ compiler")
    return folder


@pytest.fixture(params=CLOSE, ids=str)
def dtype(request):
    return request.param


def numbers(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def banks(dtype):
    """Two banks of one layout and one of another, full of numbers."""
    made = [
        Bank(sites, slots=slots, rank=rank, dtype=dtype)
        for sites, slots, rank in ((ALL, 3, 8), (ALL, 2, 8), ((SITE, TILED), 1, 64))
    ]
    for seed, bank in enumerate(made):
        bank.flat.copy_(numbers(*bank.flat.shape, seed=seed, dtype=dtype) * 0.2)
    return made


MIX = torch.tensor(
    [
        [0.0, 1.0, 0, 0, 0, 0],
        [0.0, 0.0, 0, 0, 0, 0],
        [0.0, 0.0, 0, 0, 1, 0],
        [0.5, 0.0, 0, -2, 0, 1],
        *[[0.0, 1.0, 0, 0, 0, 0]] * 5,
        [0.0, 0.0, 0, 0, 0, 1],
    ]
)


def updated(products, bank_list, mix, site, x, y, tokens=1):
    places = [place for bank in bank_list for place in bank.places]
    y = y.clone()
    for entries in Plan(places, mix).entries(tokens):
        entries.add(products, site.name, x, y)
    return y


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize("site", ALL, ids=lambda site: site.name)
def test_the_update_is_the_equation(folder, dtype, site, tokens):
    products, bank_list = native.Products(dtype, folder), banks(dtype)
    rows = len(MIX) * tokens
    x = numbers(rows, site.in_features, seed=7, dtype=dtype)
    y = numbers(rows, sum(site.out_features), seed=8, dtype=dtype)
    wanted = y.double()
    at = 0
    for bank in bank_list:
        for slot in range(bank.slots):
            if site.name in bank.A:
                h = x.double() @ bank.A[site.name][slot].double().T
                parts = h.split(bank.rank, dim=1)
                delta = [
                    low @ bank.B[m][slot].double()
                    for low, m in zip(parts, site.members, strict=True)
                ]
                weight = MIX[:, at].repeat_interleave(tokens)[:, None].double()
                wanted = wanted + weight * torch.cat(delta, dim=1)
            at += 1
    got = updated(products, bank_list, MIX, site, x, y, tokens)
    torch.testing.assert_close(got.double(), wanted, **CLOSE[dtype])
    assert torch.equal(got[tokens : 2 * tokens], y[tokens : 2 * tokens])  # a row without an adapter


@pytest.mark.parametrize(("site", "tokens"), [(SITE, 1), (TILED, 1), (TILED, 16), (TILED, 20)])
def test_a_rows_update_is_the_same_bits_beside_any_others(folder, dtype, site, tokens):
    products, bank_list = native.Products(dtype, folder), banks(dtype)
    x = numbers(len(MIX) * tokens, site.in_features, seed=7, dtype=dtype)
    y = numbers(len(MIX) * tokens, sum(site.out_features), seed=8, dtype=dtype)
    together = updated(products, bank_list, MIX, site, x, y, tokens)
    for n in range(len(MIX)):
        own = slice(n * tokens, (n + 1) * tokens)
        alone = updated(products, bank_list, MIX[n : n + 1], site, x[own], y[own], tokens)
        assert torch.equal(alone, together[own])


def test_tiles_compute_the_shapes_that_they_support(folder):
    products, bank_list = native.Products(torch.bfloat16, folder), banks(torch.bfloat16)
    (entries,) = Plan(bank_list[0].places, MIX[:, :3]).entries(16)
    kept = []

    def lora_tiles(*given):
        kept.append(bool(library(*given)))
        return kept[-1]

    library, products.lora_tiles = products.lora_tiles, lora_tiles
    for site in (TILED, SITE):
        x = numbers(len(MIX) * 16, site.in_features, seed=1, dtype=torch.bfloat16)
        entries.add(products, site.name, x, x.new_zeros(len(x), sum(site.out_features)))
    assert kept == [True, False] * products.has_tiles


@pytest.mark.parametrize("width", [64, 70])
def test_norm_adds_and_divides(folder, dtype, width):
    products = native.Products(dtype, folder)
    x, delta = (numbers(5, width, seed=n, dtype=dtype) for n in (1, 2))
    weight = numbers(width, seed=3, dtype=dtype)
    plain = products.norm(x.clone(), None, weight, 1e-5)
    wanted = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(plain.double(), wanted, **CLOSE[dtype])
    total = x + delta
    added = x.clone()
    torch.testing.assert_close(
        products.norm(added, delta, weight, 1e-5), products.norm(total.clone(), None, weight, 1e-5)
    )
    assert torch.equal(added, total)


def test_silu_is_right_from_end_to_end(folder, dtype):
    products = native.Products(dtype, folder)
    gate = torch.cat([torch.linspace(-120, 120, 290), torch.tensor([0.0, -1e4, 1e4])]).to(dtype)
    up = numbers(len(gate), seed=1, dtype=dtype)
    got = products.silu(torch.stack([torch.cat([gate, up])] * 2))
    wanted = functional.silu(gate.double()) * up.double()
    for row in got:
        torch.testing.assert_close(row.double(), wanted, atol=CLOSE[dtype]["atol"], rtol=0.02)


@pytest.mark.parametrize("width", [8, 64, 80])
def test_attention_sees_its_own_row_up_to_its_own_position(folder, dtype, width):
    products, heads, kv_heads, capacity = native.Products(dtype, folder), 6, 2, 64
    positions = torch.tensor([0, 5, 40])
    rows = len(positions)
    keys, values = (numbers(rows, kv_heads, capacity, width, seed=n, dtype=dtype) for n in (1, 2))
    qkv = numbers(rows, (heads + 2 * kv_heads) * width, seed=3, dtype=dtype)
    angles = positions[:, None].float() / 10 ** (torch.arange(width // 2) / width)
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    new = keys.clone(), values.clone()
    step = native.NativeStep((heads, kv_heads, width), width**-0.5, capacity, rows)
    step.at(positions, cos, sin)
    got = products.attend(step, qkv, *new, qkv.new_empty(rows, heads * width))
    q, k, v = qkv.double().view(rows, -1, width).split([heads, kv_heads, kv_heads], dim=1)

    def turned(x):
        half = x.roll(width // 2, -1) * torch.tensor([-1.0, 1.0]).repeat_interleave(width // 2)
        return x * cos[:, None] + half * sin[:, None]

    for n, at in enumerate(positions.tolist()):
        torch.testing.assert_close(new[0][n, :, at].double(), turned(k)[n], **CLOSE[dtype])
        assert torch.equal(new[1][n, :, at].double(), v[n])
        assert torch.equal(new[0][n, :, at + 1 :], keys[n, :, at + 1 :])
        seen = [t[n, :, : at + 1].double().repeat_interleave(3, 0) for t in new]
        wanted = functional.scaled_dot_product_attention(turned(q)[n][:, None], *seen).flatten()
        torch.testing.assert_close(got[n].double(), wanted, **CLOSE[dtype])


def test_nan_stays_nan(folder, dtype):
    products = native.Products(dtype, folder)
    bad = torch.full((1, 64), float("nan"), dtype=dtype)
    assert products.silu(bad).isnan().all()
    assert products.norm(bad, None, torch.ones(64, dtype=dtype), 1e-5).isnan().all()


def test_without_a_compiler_there_is_no_library(tmp_path, monkeypatch):
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert native.library(tmp_path) is None
    monkeypatch.setenv("CXX", "false")
    assert native.library(tmp_path / "other") is None
    assert not list((tmp_path / "other").iterdir())  # no half a library
    native.library.cache_clear()


def adapter(rank, dtype, seed=0):
    """Weights on every module of ALL's sites."""
    outs = {
        m: (s.in_features, o) for s in ALL for m, o in zip(s.members, s.out_features, strict=True)
    }
    factors = {
        m: (
            numbers(rank, i, seed=seed + n, dtype=dtype),
            numbers(o, rank, seed=seed - n - 1, dtype=dtype),
        )
        for n, (m, (i, o)) in enumerate(outs.items())
    }
    return AdapterWeights(factors, {m: 3.0 + n for n, m in enumerate(outs)})


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_a_slot_is_filled_as_torch_fills_it(folder, dtype, source, rank):
    ours, theirs = banks(dtype)[0], banks(dtype)[0]
    weights = adapter(rank, source)
    native.write(folder, ours, 1, weights)
    theirs.write(1, weights)
    assert torch.equal(ours.flat, theirs.flat)


def test_a_slot_is_filled_without_a_library_too(tmp_path):
    ours, theirs = banks(torch.float32)[0], banks(torch.float32)[0]
    weights = adapter(8, torch.float32)
    native.write(tmp_path / "nothing here", ours, 2, weights)
    theirs.write(2, weights)
    assert torch.equal(ours.flat, theirs.flat)
    assert not (tmp_path / "nothing here").exists()


def test_a_slot_of_another_device_is_assembled_on_the_cpu(folder, dtype):
    """What another device is given in one copy is what it would be given piece by piece."""
    sites, heads = ALL[:1], (2, 70)
    ours, theirs = (Bank(sites, slots=2, rank=8, dtype=dtype, head=heads) for _ in range(2))
    whole = adapter(5, dtype)
    factors = {m: whole.factors[m] for m in SITE.members}
    head = Head(torch.randn(2, 70), torch.randn(2))
    weights = AdapterWeights(factors, whole.alphas, head=head)
    ours.flat.fill_(7.0)  # what was there before is gone
    native._write_through_host(folder, ours, 1, weights)
    theirs.write(1, weights)
    assert torch.equal(ours.flat[1], theirs.flat[1])
    assert ours.labels == theirs.labels == [0, 2]
    assert bool((ours.flat[0] == 7.0).all())
