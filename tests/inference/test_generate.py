"""Decoding: greedy equals transformers; rows are independent; stop strings are never emitted."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pico import VOCABULARY
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from adapterhub_chat import AdapterHub
from adapterhub_chat.errors import UnknownNameError, UsageError
from adapterhub_chat.inference.detokenizer import Detokenizer, stable_length
from adapterhub_chat.inference.generate import generate
from adapterhub_chat.inference.likelihood import next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import Mix, as_mix

PROMPTS = (
    (5, 9, 31, 7, 120),
    (44,),
    (200, 13, 77),
    (90, 91, 92, 93, 94, 95, 96, 97, 98),
    (44, 6),
    (3, 250, 3, 250, 3, 250),
    (260, 261, 262),
)


@pytest.fixture(scope="module")
def reference(pico_folder):
    return AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32).eval()


@pytest.fixture
def loaded(model, make_weights):
    """The pico model with two adapters that change every text."""
    model.load("a", make_weights(rank=4, seed=1, size=0.6))
    model.load("b", make_weights(rank=8, seed=2, size=0.6, only=("q_proj", "down_proj")))
    return model


def greedy(model, prompt, tokens, tokenizer, *, ignore_eos=False):
    """transformers' own greedy continuation of one prompt, as text."""
    ends = {} if ignore_eos else {"eos_token_id": tokenizer.eos_token_id}
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens if ignore_eos else None,
        do_sample=False,
        pad_token_id=0,
        **ends,
    )
    new = out[0, len(prompt) :].tolist()
    if not ignore_eos and tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    return tokenizer.decode(new, skip_special_tokens=True)


def merged(folder, weights):
    """A plain transformers model with an adapter added to its own weights, by peft."""
    config = LoraConfig(
        r=next(iter(weights.factors.values()))[0].shape[0],
        lora_alpha=next(iter(weights.alphas.values())),
        target_modules=list(weights.factors),
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = get_peft_model(base, config).eval()
    with torch.no_grad():
        for module, (a, b) in weights.factors.items():
            layer = wrapped.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return wrapped.merge_and_unload()


def ending_prompts(reference, count, *, before):
    """(token, prompts): a token that greedy decoding generates after many prompts, at different steps."""
    ids = torch.arange(3, VOCABULARY)[:, None]
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=before,
        min_new_tokens=before,
        do_sample=False,
        pad_token_id=0,
    )[:, 1:].tolist()
    ((end, _),) = Counter(token for row in out for token in {*row[1:]}).most_common(1)
    found = sorted((row.index(end), (i,)) for i, row in enumerate(out, 3) if end in row[1:])
    chosen = found[:: max(1, len(found) // count)][:count]
    assert len({steps for steps, _ in chosen}) > 2, "too few ends: the test needs other prompts"
    return end, [prompt for _, prompt in chosen]


# ---- greedy --------------------------------------------------------------------------------------


def test_greedy_rows_of_one_batch_equal_transformers_row_by_row(model, reference):
    tokenizer = model.backbone.tokenizer
    for ignore_eos in (False, True):
        rules = Sampling(max_new_tokens=24, ignore_eos=ignore_eos)
        texts = generate(model, [Request(p, sampling=rules) for p in PROMPTS])
        wanted = [greedy(reference, p, 24, tokenizer, ignore_eos=ignore_eos) for p in PROMPTS]
        assert texts == wanted
        assert len(set(texts)) == len(texts)


def test_learned_position_embeddings_get_the_right_positions(model, tmp_path):
    """GPT-2 learns a vector per position, so padding must not shift positions."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=2, **shape)
    plain = GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path)
    model.backbone.tokenizer.save_pretrained(tmp_path)
    gpt2 = AdapterModel(load_backbone(str(tmp_path), dtype="fp32", device="cpu"))
    tokenizer, rules = gpt2.backbone.tokenizer, Sampling(max_new_tokens=12)
    texts = generate(gpt2, [Request(p, sampling=rules) for p in PROMPTS])
    assert texts == [greedy(plain, p, 12, tokenizer) for p in PROMPTS]
    assert len(set(texts)) > 3


def test_rows_with_adapters_equal_peft_merged_models(loaded, pico_folder, reference):
    tokenizer, rules = loaded.backbone.tokenizer, Sampling(max_new_tokens=12)
    models = {n: merged(pico_folder, loaded.weights(n)) for n in ("a", "b")} | {"": reference}
    requests, wanted = [], []
    for i, prompt in enumerate(PROMPTS):
        name = ("a", "b", "")[i % 3]
        requests.append(Request(prompt, as_mix(name or None), rules))
        wanted.append(greedy(models[name], prompt, 12, tokenizer))
    assert generate(loaded, requests) == wanted
    plain = generate(loaded, [Request(r.prompt, sampling=rules) for r in requests])
    same = [a == b for a, b in zip(plain, wanted, strict=True)]
    assert same == [i % 3 == 2 for i in range(len(PROMPTS))]


def test_a_row_of_a_mixed_batch_equals_that_row_alone(loaded):
    mixes = [as_mix("a"), Mix(), as_mix({"a": 0.5, "b": -0.25}), as_mix("b"), as_mix("a")]
    rules = [
        Sampling(max_new_tokens=n, temperature=t, top_p=p, seed=n, ignore_eos=n % 2 == 0)
        for n, t, p in [(3, 0, 1), (20, 1, 0.9), (9, 0.7, 1), (14, 0, 1), (6, 2, 0.5)]
    ]
    requests = [Request(*row) for row in zip(PROMPTS, mixes, rules, strict=False)]
    together = generate(loaded, requests)
    assert together == [generate(loaded, [r])[0] for r in requests]
    assert generate(loaded, requests[::-1]) == together[::-1]


# ---- the end of a row ----------------------------------------------------------------------------


def test_rows_that_end_early_do_not_change_the_others(model, reference):
    tokenizer = model.backbone.tokenizer
    end, early = ending_prompts(reference, 6, before=20)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    prompts = [*PROMPTS, *early]
    rules = Sampling(max_new_tokens=30)
    texts = generate(model, [Request(p, sampling=rules) for p in prompts])
    assert texts == [greedy(reference, p, 30, tokenizer) for p in prompts]
    on = Sampling(max_new_tokens=30, ignore_eos=True)
    longer = generate(model, [Request(p, sampling=on) for p in prompts])
    went_on = [len(b) > len(a) for a, b in zip(texts, longer, strict=True)]
    assert all(went_on[len(PROMPTS) :])
    assert not all(went_on[: len(PROMPTS)]), "every row ends: none had to go on without the others"


def test_each_row_has_its_own_max_new_tokens(model):
    rules = [Sampling(max_new_tokens=n, ignore_eos=True) for n in range(1, 10)]
    texts = generate(model, [Request((44,), sampling=r) for r in rules])
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter.rstrip("\ufffd"))
    assert len({t.rstrip("\ufffd") for t in texts}) > 5


def pieces_of(model, requests):
    pieces = [[] for _ in requests]
    texts = generate(model, requests, on_text=lambda row, piece: pieces[row].append(piece))
    return texts, pieces


def test_stop_strings_cut_the_text_across_token_boundaries(model):
    """Every substring of a text, as a stop: cut there, and no letter of it emitted."""
    rules = {"max_new_tokens": 24, "ignore_eos": True}
    (whole,) = generate(model, [Request((44, 6), sampling=Sampling(**rules))])
    spans = {whole[i : i + n] for n in (1, 2, 3, 7) for i in range(len(whole) - n)}
    stops = sorted(span for span in spans if "\ufffd" not in span)
    assert len(stops) > 20, f"{whole!r} says too little: the test needs another prompt"
    texts, streams = pieces_of(
        model, [Request((44, 6), sampling=Sampling(**rules, stop=("\x00", s))) for s in stops]
    )
    for stop, text, pieces in zip(stops, texts, streams, strict=True):
        assert text == whole[: whole.index(stop)]
        assert "".join(pieces) == text


def test_the_first_of_several_stops_cuts(model):
    rules = {"max_new_tokens": 16, "ignore_eos": True}
    (whole,) = generate(model, [Request((44,), sampling=Sampling(**rules))])
    late, early = whole[8:10], whole[2:9]
    (text,) = generate(model, [Request((44,), sampling=Sampling(**rules, stop=(late, early)))])
    assert text == whole[:2]


def test_streamed_pieces_add_up_to_the_text_of_all_tokens(model, reference):
    tokenizer = model.backbone.tokenizer
    wanted = [greedy(reference, p, 40, tokenizer, ignore_eos=True) for p in PROMPTS]
    assert any("\ufffd" in text for text in wanted), "no broken letters: the test proves nothing"
    for strip in (False, True):
        rules = Sampling(max_new_tokens=40, ignore_eos=True, strip=strip)
        texts, streams = pieces_of(model, [Request(p, sampling=rules) for p in PROMPTS])
        assert texts == [text.strip() if strip else text for text in wanted]
        assert ["".join(pieces) for pieces in streams] == texts
        assert min(map(len, streams)) > 5


def detokenized(model, text, **rules):
    """Detokenize a text's bytes, a token each; return the text and its pieces."""
    tokenizer, letters = model.backbone.tokenizer, bytes_to_unicode()
    ids = [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in text.encode()]
    row = Detokenizer(tokenizer, Sampling(max_new_tokens=len(ids) + 1, **rules), frozenset({2}))
    pieces = []
    for token in [*ids, tokenizer.eos_token_id]:
        if not row.finish_reason:
            pieces.append(row.append(token))
    return row.text, pieces


@settings(max_examples=150, deadline=None)
@example(text="xa你b", stops=["a你"])
@example(text="naïve 🙂 end", stops=["🙂", "ve 🙃"])
@given(
    text=st.text(st.sampled_from("ab 你好🙂é\n"), max_size=12),
    stops=st.lists(st.text(st.sampled_from("ab 你🙂é"), min_size=1, max_size=3), max_size=3),
)
def test_half_letters_and_half_stops_are_never_emitted(byte_model, text, stops):
    emitted, pieces = detokenized(byte_model, text, stop=tuple(stops))
    cut = first_stop(text, stops)
    assert emitted == text[:cut]
    assert "".join(pieces) == emitted
    assert not any("\ufffd" in piece for piece in pieces)
    stripped, pieces = detokenized(byte_model, text, stop=tuple(stops), strip=True)
    assert stripped == text[:cut].strip() == "".join(pieces)


def first_stop(text, stops):
    """Return the index at which the text is cut: that of the stop which is complete first."""
    for end in range(len(text) + 1):
        if starts := [text[:end].index(s) for s in stops if s in text[:end]]:
            return min(starts)
    return len(text)


@pytest.fixture(scope="module")
def byte_model(pico_folder):
    return AdapterModel(load_backbone(str(pico_folder), dtype="fp32", device="cpu"))


def test_stable_length_excludes_half_letters_and_half_stops():
    assert stable_length("abc", ()) == 3
    assert stable_length("abc\ufffd\ufffd", ()) == 3
    assert stable_length("abc", ("cd", "bcd", "x")) == 1
    assert stable_length("xa\ufffd", ("a你",)) == 1


# ---- sampling ------------------------------------------------------------------------------------


def test_a_seed_fixes_a_row_in_any_batch(loaded):
    hot = Sampling(max_new_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    row = Request((44, 6), as_mix("a"), hot)
    (alone,) = generate(loaded, [row])
    others = [Request(p, sampling=Sampling(temperature=2.0, max_new_tokens=4)) for p in PROMPTS]
    assert generate(loaded, [*others, row, row])[-2:] == [alone, alone]
    other = Request((44, 6), as_mix("a"), Sampling(12, 1.0, seed=8, ignore_eos=True))
    assert generate(loaded, [other]) != [alone]


def test_without_a_seed_samples_differ(model):
    hot = Sampling(max_new_tokens=12, temperature=1.5, ignore_eos=True)
    assert len(set(generate(model, [Request((44,), sampling=hot)] * 8))) > 1


def test_sampling_neither_uses_nor_changes_the_global_generator(model):
    hot = Sampling(max_new_tokens=6, temperature=1.0, seed=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(model, [Request((44,), sampling=hot)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert generate(model, [Request((44,), sampling=hot)]) == first


def test_sampling_follows_the_softmax_of_the_logits(model, reference):
    """3,000 first tokens at a temperature, with and without a nucleus, against their probabilities."""
    prompt, count, temperature = (44,), 3000, 0.7
    with torch.no_grad():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / temperature).softmax(-1)
    ordered, index = wanted.sort(descending=True)
    inside = index[(ordered.cumsum(-1) - ordered) < 0.6]
    nucleus = torch.zeros_like(wanted)
    nucleus[inside] = wanted[inside] / wanted[inside].sum()
    assert 1 < len(inside) < VOCABULARY
    tokenizer = model.backbone.tokenizer
    words = [tokenizer.decode([i], skip_special_tokens=True) for i in range(VOCABULARY)]
    for top_p, probabilities in ((1.0, wanted), (0.6, nucleus)):
        rules = (Sampling(1, temperature, top_p, seed=s) for s in range(count))
        texts = generate(model, [Request(prompt, sampling=r) for r in rules])
        likely = dict.fromkeys(words, 0.0)
        for word, p in zip(words, probabilities.tolist(), strict=True):
            likely[word] += p
        assert all(likely[t] > 0 for t in texts)
        for word, p in likely.items():
            spread = (count * p * (1 - p)) ** 0.5
            assert abs(texts.count(word) - count * p) <= 5 * spread + 3, word


def test_a_tiny_nucleus_is_greedy(model):
    cold = generate(model, [Request(p) for p in PROMPTS])
    for rules in (Sampling(temperature=1.0, top_p=1e-9), Sampling(temperature=1e-40)):
        assert generate(model, [Request(p, sampling=rules) for p in PROMPTS]) == cold


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number from 0 on"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"stop": ("\n", "")}, "empty text"),
        ({"seed": 2**63}, "must fit into 64 bits"),
        ({"max_new_tokens": -3, "top_p": 2}, "max_new_tokens=-3 must be at least 1; top_p=2"),
    ],
)
def test_invalid_sampling_values_are_refused(values, wanted):
    with pytest.raises(UsageError, match=wanted):
        Sampling(**values)


def test_no_requests_give_no_texts(model):
    assert generate(model, []) == []
    assert next_token_logits(model, []).shape == (0, VOCABULARY)


def test_an_empty_prompt_is_named(model):
    with pytest.raises(UsageError, match=r"prompt 1 is empty.*prompt 3 is empty"):
        generate(model, [Request((4,)), Request(()), Request((5,)), Request(())])


def test_an_unknown_adapter_is_named(model):
    with pytest.raises(UnknownNameError, match="unknown adapter 'qa'; known: backbone"):
        generate(model, [Request((4,), as_mix("qa"))])


# ---- logits --------------------------------------------------------------------------------------


def test_next_token_logits_equal_those_of_transformers(loaded, pico_folder, reference):
    models = {n: merged(pico_folder, loaded.weights(n)) for n in ("a", "b")} | {"": reference}
    names = ["b", "", "a", "a", "b", "", "a"]
    rows = [Request(p, as_mix(n or None)) for p, n in zip(PROMPTS, names, strict=True)]
    found = next_token_logits(loaded, rows)
    assert (found.shape, found.dtype) == ((len(rows), VOCABULARY), torch.float32)
    assert found.device.type == "cpu"
    with torch.no_grad():
        wanted = [
            models[n](torch.tensor([p])).logits[0, -1] for p, n in zip(PROMPTS, names, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(wanted), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_text_stops_at_every_end_token_of_the_model(pico_folder, tmp_path, where):
    """The tokenizer knows one end, the model's own files may list several."""

    def result(ends, sampling):
        hub = AdapterHub(str(pico_folder), tmp_path, dtype="fp32", device="cpu")
        getattr(hub.backbone.model, where).eos_token_id = ends
        prompt = tuple(hub.backbone.tokenizer("good film").input_ids)
        return hub.engine.submit(Request(prompt, as_mix(None), sampling)).result()

    free = result(2, Sampling(max_new_tokens=12, ignore_eos=True)).ids
    stopped = result([2, free[5]], Sampling(max_new_tokens=12))
    assert stopped.reason == "stop"
    assert stopped.ids == free[: free.index(free[5])]
