"""The real thing, small: pico models with real tokenizers, toy tasks, and what many tests do with them."""

from __future__ import annotations

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import torch
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

from adapterhub_chat.artifact.manifest import Manifest, Training
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.splits import Splits
from adapterhub_chat.data.task import Task
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.training.job import make_job
from adapterhub_chat.types import SPLITS, Example, PromptContract, Score, as_mix

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
    hub._registry.save_new(weights, manifest)
    return hub


def random_weights(shapes, rank=4, seed=1, alpha=8.0, only=None, rslora=False, size=0.3):
    """Return random AdapterWeights that matter, for the modules that end in one of `only` (None: all)."""
    shapes = {m: s for m, s in shapes.items() if only is None or m.rpartition(".")[2] in only}
    start = initial_weights(shapes, rank=rank, alpha=alpha, rslora=rslora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return start.with_factors(
        {
            m: (a, torch.randn(b.shape, generator=generator) * size)
            for m, (a, b) in start.factors.items()
        }
    )


SMALL = {"row_length": 64, "rows_per_step": 1, "max_steps": 12, "epochs": 99, "patience": 0}
TOLERANCE = 2e-5
"""fp32: other shapes of the same products round differently; 12 steps of AdamW carry it on."""


def job(model, task, name=None, **settings):
    config = TrainConfig(**{**SMALL, **settings})
    return make_job(model.backbone.tokenizer, name or task.name, task, config)


def overlap(new, old):
    """The sum over modules of |A_old A_new^T|^2: the reference for `overlap_gradient`."""
    shared = [m for m in new.factors if m in old.factors]
    pairs = [(old.factors[m][0].float(), new.factors[m][0]) for m in shared]
    return sum((a_old @ a_new.T).square().sum() for a_old, a_new in pairs)


def close(one, other, tolerance=TOLERANCE):
    assert set(one.factors) == set(other.factors)
    for module, pair in one.factors.items():
        for mine, its in zip(pair, other.factors[module], strict=True):
            torch.testing.assert_close(mine, its, atol=tolerance, rtol=0)


def alone(model, request):
    """What a request gives in an engine of its own."""
    return Engine(model, prefix_bytes=0).submit(request).result()


def some_requests(count, seed=0, names=6, mixed=True):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 70)))
        choices = [None, *(f"a{n}" for n in range(names))]
        name = rng.choice([*choices, {"a0": 0.5, "a1": -1.0}] if mixed else choices)
        rules = Sampling(max_new_tokens=rng.randrange(1, 20), ignore_eos=rng.random() < 0.5)
        found.append(Request(prompt, as_mix(name), rules))
    return found


TOYS = {"sentiment": toy_task, "qa": toy_answers, "generation": toy_talk}


def write_task(folder, name, task):
    """Write a toy task as a user would: a TOML file beside its JSON lines."""
    examples = [e for split in SPLITS for e in task.split(split)]
    rows = [{**e.fields, "answer": e.answer} for e in examples]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    contract = task.contract
    lines = [
        f'metric = "{task.metric}"\n[data]\npath = "{name}.jsonl"\n[columns]\nanswer = "answer"',
        *(f'{field} = "{field}"' for field in examples[0].fields),
        f"[prompt]\ntemplate = {json.dumps(contract.template)}",
        f"system = {json.dumps(contract.system)}\nmax_new_tokens = {contract.max_new_tokens}",
        f"stop = {json.dumps(contract.stop)}\n[split]\nvalidation = 0.2\ntest = 0.2\n[labels]",
        *(f"{label} = {json.dumps(words)}" for label, words in contract.labels.items()),
    ]
    (folder / f"{name}.toml").write_text("\n".join(lines))


CHILDREN = multiprocessing.get_context("forkserver")


def in_child(function, *arguments):
    """Call in a process of its own; its exception is raised here."""
    with ProcessPoolExecutor(1, mp_context=CHILDREN) as executor:
        return executor.submit(function, *arguments).result()


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


CHILDREN.set_forkserver_preload(["adapterhub_chat.pool.pool", "pytest", "hypothesis"])
