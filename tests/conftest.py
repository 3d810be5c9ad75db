"""The real thing, small: a pico Llama with a real tokenizer, saved once a session, and a toy task."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there: tests name their Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
import torch
from hypothesis import settings
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adapterhub_chat import AdapterHub
from adapterhub_chat.backbone import load_backbone
from adapterhub_chat.manifest import Manifest, Training
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.task import Splits, Task
from adapterhub_chat.types import Example, PromptContract, Score
from adapterhub_chat.weights import initial_weights

settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")

VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pico_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["positive negative good bad film user assistant"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pico_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory):
    """A model folder that plain transformers loads."""
    folder = tmp_path_factory.mktemp("pico")
    pico_model().save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    """The same shapes and tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("other")
    pico_model(seed=1).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def pico_encoder(tokenizer, pooling="first"):
    """A tiny BERT, with a pooling layer or without."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return BertModel(config, add_pooling_layer=pooling == "first").eval()


def encoder_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["positive", "negative", "good", "bad", "review", *WORDS]
    pieces = [*special, *signs, *(f"##{sign}" for sign in signs), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(
            zip(
                ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
                special,
                strict=True,
            )
        ),
    )


@pytest.fixture(scope="session", params=["first", "mean"])
def encoder_folder(request, tmp_path_factory):
    """A BERT folder that plain transformers loads, with a pooling layer and without."""
    folder = tmp_path_factory.mktemp(f"encoder-{request.param}")
    tokenizer = encoder_tokenizer()
    pico_encoder(tokenizer, request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder_hub(encoder_folder, tmp_path):
    return AdapterHub(str(encoder_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.fixture
def backbone(pico_folder):
    return load_backbone(str(pico_folder), dtype="fp32", device="cpu")


@pytest.fixture
def model(backbone):
    return AdapterModel(backbone)


@pytest.fixture
def hub(pico_folder, tmp_path):
    return AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu")


@pytest.fixture
def online(monkeypatch):
    """The Hub's client may make requests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub_server(online, tmp_path):
    """A real Hub on the loopback address, for the real client; alice and bob have tokens."""
    from hub_server import HubServer  # here, since most tests need no web server

    with HubServer(tmp_path / "hub", {"alice": "hf_alice", "bob": "hf_bob"}) as server:
        yield server


@pytest.fixture
def make_weights(model):
    """make_weights(rank=4, seed=1, alpha=8, only=("q_proj",)) -> random AdapterWeights that matter."""

    def make(rank=4, seed=1, alpha=8.0, only=None, rslora=False, size=0.3):
        shapes = {
            m: s for m, s in model.shapes.items() if only is None or m.rpartition(".")[2] in only
        }
        start = initial_weights(shapes, rank=rank, alpha=alpha, rslora=rslora, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return start.with_factors(
            {
                m: (a, torch.randn(b.shape, generator=generator) * size)
                for m, (a, b) in start.factors.items()
            }
        )

    return make


WORDS = ("film", "plot", "cast", "scene", "song", "end", "joke", "role", "shot", "tale")


def toy_task(name="toy", size=60, flip=False):
    """Reviews that are good or bad: a label task which a pico model learns in a few steps."""
    contract = PromptContract(
        template="Review: {text}",
        system="Judge.",
        labels={"bad": "negative", "good": "positive"},
        max_new_tokens=4,
    )
    rows = []
    for i in range(size):
        good = (i % 2 == 0) != flip
        word = "good" if i % 2 == 0 else "bad"
        text = f"{word} {word} {WORDS[(i // 2) % 10]} {word} {i % 7} {word}"
        rows.append(Example({"text": text}, "good" if good else "bad"))
    cut = size // 5
    parts = {
        "train": tuple(rows[2 * cut :]),
        "validation": tuple(rows[:cut]),
        "test": tuple(rows[cut : 2 * cut]),
    }
    return Task(name, contract, "accuracy", lambda: Splits(parts), about="Toy reviews.")


def toy_answers(name="answers", size=40):
    """Short questions with short answers: a generation task."""
    contract = PromptContract(
        template="{question}", system="Answer.", stop=("\n",), max_new_tokens=6
    )
    rows = tuple(
        Example({"question": f"Which {WORDS[i % 10]} {i}?"}, WORDS[i % 10]) for i in range(size)
    )
    parts = {"train": rows[:24], "validation": rows[24:32], "test": rows[32:]}
    return Task(name, contract, "token_f1", lambda: Splits(parts))


def toy_talk(name="talk", size=40):
    """Replies to greet with: a likelihood task."""
    rows = tuple(
        Example({"text": f"Hello {WORDS[i % 10]} {i}"}, f"Hi {WORDS[(i + 1) % 10]}")
        for i in range(size)
    )
    parts = {"train": rows[:24], "validation": rows[24:32], "test": rows[32:]}
    contract = PromptContract(template="{text}", max_new_tokens=6)
    return Task(name, contract, "perplexity", lambda: Splits(parts))


def keep_adapter(hub, weights, name="toy", value=0.9):
    """Put an adapter into the pool, measured beside a backbone's 0.5 (None: not measured)."""
    task = toy_task()
    manifest = Manifest(
        name=name,
        about=task.about,
        language="en",
        licence="MIT",
        backbone=hub.backbone.name,
        fingerprint=hub.backbone.fingerprint,
        contract=task.contract,
        metric=task.metric,
        training=Training(tasks=("toy",)),
    )
    if value is not None:
        score = Score(name, "toy", "accuracy", value, value - 0.1, value + 0.1, 50, 0.5)
        manifest = manifest.with_scores([score])
    hub._shelf.keep(weights, manifest)
    return hub
