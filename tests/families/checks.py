"""The columns of the matrix: what a backbone must give, each compared with plain transformers and PEFT.

A check returns one cell: "right", "refused: SENTENCE" where the package declined at a door (loading a
backbone or an adapter, or starting to train), "wrong: WHAT", or "raw: EXCEPTION" where an exception that is
none of the package's reached the user. A refusal anywhere else comes too late and is wrong.
"""

from __future__ import annotations

import contextlib
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

from adapterhub_chat import AdapterHub
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import pack
from adapterhub_chat.errors import AdapterHubError
from adapterhub_chat.inference.likelihood import next_token_logits, sequence_losses, token_losses
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.weights import Head
from adapterhub_chat.route import learn
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.loop import train
from adapterhub_chat.types import NO_ADAPTER, Mix, as_mix
from tests.families.models import WINDOW, Family
from tests.pico import random_weights, toy_answers, toy_task

EXACT = 1e-4
"""Largest error over the largest value that float32 rounding may make."""
CARRIED = 1e-3
"""The same for numbers that a few steps of an optimizer made."""
MATTERS = 1e-2
"""An adapter that moves the logits by a smaller share than this would show nothing."""
UNWANTED = ("lm_head", "out_proj", "conv1d", "classifier")
"""Layers that PEFT's all-linear leaves out, or refuses in state-space models."""
LENGTHS = (1, 2, 7, WINDOW, WINDOW + 1, 24, 33, 60)
"""Prompts in tokens, about: some are longer than any window."""
NEW_TOKENS = 24
IMAGINED = 32
"""Texts that a backbone makes up for routing, instead of many hundreds: they take most of the time."""
ROW_LENGTH = 64
QUICK = {"max_steps": 4, "row_length": ROW_LENGTH, "learning_rate": 0.02, "rows_per_step": 2}
QUICK |= {"eval_examples": 4, "patience": 0, "epochs": 99}

Check = Callable[["Bench"], float]


class RefusedError(Exception):
    """The package declined at a door."""


class WrongError(Exception):
    """What came out is not what should have."""


@contextlib.contextmanager
def door() -> Iterator[None]:
    """Take an error of the package inside the block as a refusal at the right moment."""
    try:
        yield
    except AdapterHubError as error:
        raise RefusedError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Return a random text of about so many tokens for each length."""
    draw = random.Random(seed)
    letters = string.ascii_lowercase + " "
    return ["".join(draw.choice(letters) for _ in range(length)) for length in lengths]


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest value, infinite where numbers are not finite."""
    if ours.shape != theirs.shape:
        raise WrongError(f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    both = torch.stack([ours.float(), theirs.float()])
    if not both.isfinite().all():
        return float("inf")
    return float((both[0] - both[1]).abs().max() / both[1].abs().max().clamp(min=1e-12))


@dataclass
class Bench:
    """One family under test: its folder, our hub over it and transformers' own model, each loaded once."""

    family: Family
    folder: Path
    """Where the backbone is saved."""
    work: Path
    """An empty folder."""

    @cached_property
    def hub(self) -> AdapterHub:
        """Our hub, with two random adapters loaded."""
        hub = self.new_hub("pool")
        for seed, name in enumerate(("one", "two"), 1):
            hub.model.load(name, self.weights(hub, seed))
        return hub

    def new_hub(self, pool: str, quantize: Any = None) -> AdapterHub:
        """Return a hub over the folder."""
        options: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "quantize": quantize}
        with door():
            return AdapterHub(str(self.folder), self.work / pool, **options)

    def weights(self, hub: AdapterHub, seed: int) -> Any:
        """Return a random adapter; an encoder's has a head of two labels."""
        found = random_weights(hub.model.shapes, seed=seed)
        if not hub.backbone.encodes:
            return found
        draw = torch.Generator().manual_seed(seed)
        width = int(hub.backbone.width or 0)
        head = Head(torch.randn(2, width, generator=draw), torch.randn(2, generator=draw))
        return replace(found, head=head)

    @cached_property
    def plain(self) -> Any:
        """Transformers' own model: a language model, or a classifier with its own random head."""
        return self.load_plain()

    def load_plain(self, **options: Any) -> Any:
        """Return the folder as transformers loads it."""
        auto = transformers.AutoModelForCausalLM
        if self.family.encodes:
            auto, options = (
                transformers.AutoModelForSequenceClassification,
                {**options, "num_labels": 2},
            )
            torch.manual_seed(7)
        return auto.from_pretrained(self.folder, dtype=torch.float32, **options).eval()

    def ids(self, text: str) -> tuple[int, ...]:
        """Return a text's ids, as the saved tokenizer gives them."""
        return tuple(self.tokenizer(text).input_ids)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' own tokenizer."""
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    @torch.no_grad()
    def theirs(self, text: str, model: Any = None) -> Tensor:
        """Return transformers' logits after a text; an encoder's are its labels'."""
        logits: Tensor = (model or self.plain)(torch.tensor([self.ids(text)])).logits
        return logits[0] if self.family.encodes else logits[0, -1]

    def ours(
        self, rows: Sequence[str], who: Sequence[Any], hub: AdapterHub | None = None
    ) -> Tensor:
        """Return our logits after each text under its adapter."""
        hub = hub or self.hub
        if not self.family.encodes:
            return hub.next_token_logits(rows, who)
        pairs = zip(rows, who, strict=True)
        return next_token_logits(hub.model, [Request(self.ids(t), as_mix(a)) for t, a in pairs])

    def worst(self, name: str | None, model: Any = None, hub: AdapterHub | None = None) -> float:
        """Return the largest error of our logits under an adapter, against transformers' or PEFT's model."""
        rows = texts(LENGTHS)
        return max(error_of(self.ours([t], [name], hub)[0], self.theirs(t, model)) for t in rows)

    def matters(self, model: Any, base: Sequence[Tensor]) -> None:
        """Raise WrongError where an adapter of PEFT's hardly changes what transformers gave for the texts."""
        moved = [
            error_of(self.theirs(t, model), b) for t, b in zip(texts(LENGTHS), base, strict=True)
        ]
        if max(moved) < MATTERS:
            raise WrongError("the adapter changes nothing in PEFT")

    def plain_logits(self) -> list[Tensor]:
        """Return transformers' logits for the usual texts, with no adapter."""
        return [self.theirs(text) for text in texts(LENGTHS)]


# ---- the columns ---------------------------------------------------------------------------------


def logits(bench: Bench) -> float:
    """Compare the backbone's own logits (an encoder's features) with plain transformers'."""
    if not bench.family.encodes:
        return bench.worst(None)
    return features(bench, bench.hub, bench.plain)


@torch.no_grad()
def features(bench: Bench, hub: AdapterHub, plain: Any) -> float:
    """Return the largest error of an encoder's features, of each text alone."""
    worst = 0.0
    for text in texts(LENGTHS):
        out = plain.base_model(torch.tensor([bench.ids(text)]))
        pooled = hub.backbone.pooling == "first"
        theirs = out.pooler_output if pooled else out[0].mean(1)
        worst = max(worst, error_of(_features(bench, hub, [text]), theirs))
    return worst


@torch.no_grad()
def _features(bench: Bench, hub: AdapterHub, rows: Sequence[str]) -> Tensor:
    """Return an encoder's features of texts, a row each, with no adapter."""
    ids = [bench.ids(text) for text in rows]
    batch = pack([[Encoded(own, ((0,),))] for own in ids], max(map(len, ids)))
    with hub.model.mixing([NO_ADAPTER] * len(ids)):
        return hub.model.features(batch)


def greedy(bench: Bench) -> float:
    """Compare greedy texts with those of transformers' `generate`."""
    settings = bench.plain.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    rows = texts((5, 20, 45), seed=1)
    ours = bench.hub.generate(rows, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    differ = []
    for row, mine in zip(rows, ours, strict=True):
        ids = torch.tensor([bench.ids(row)])
        with torch.no_grad():
            whole = bench.plain.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = whole[0, ids.shape[1] :].tolist()
        if mine != bench.tokenizer.decode(new, skip_special_tokens=True):
            differ.append(str(ids.shape[1]))
    if differ:
        raise WrongError(f"other texts than generate's after prompts of {', '.join(differ)} tokens")
    return 0.0


def mixed(bench: Bench) -> float:
    """Compare rows of a mixed batch, one of them four times as long, with the same rows alone."""
    rows = texts((3, 15, 9, 12, 60), seed=2)
    who = ["one", "two", None, {"one": 0.5, "two": -1.0}, "one"]
    if bench.family.encodes:
        who[3] = "two"
    worst = 0.0
    for count in (4, 5):
        together = bench.ours(rows[:count], who[:count])
        for text, name, row in zip(rows, who, together, strict=False):
            (alone,) = bench.ours([text], [name])
            worst = max(worst, error_of(row[: len(alone)], alone))
    if bench.family.encodes:
        return worst
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    written = bench.hub.generate(rows, who, **options)
    alone = [bench.hub.generate([t], [a], **options)[0] for t, a in zip(rows, who, strict=True)]
    if differ := [who[i] or "none" for i, text in enumerate(alone) if written[i] != text]:
        raise WrongError(
            f"{len(differ)} of {len(rows)} texts differ, under {', '.join(map(str, differ))}"
        )
    return worst


def some_examples(bench: Bench) -> list[Encoded]:
    """Return examples of several lengths; the continuations of some are longer than a window."""
    draw = random.Random(3)
    if bench.family.encodes:
        return [Encoded(bench.ids(t), ((draw.randrange(2),),)) for t in texts((4, 9, 20, 3, 13), 3)]
    sizes = ((4, 5), (9, 2), (20, 18), (3, 3), (13, 1), (30, 20))
    rows = texts([a for a, _ in sizes], seed=3)
    return [
        Encoded(bench.ids(text), (tuple(draw.randrange(3, 290) for _ in range(size)),))
        for text, (_, size) in zip(rows, sizes, strict=True)
    ]


def packed_losses(bench: Bench) -> float:
    """Compare the losses of packed examples with those of each apart, also of several continuations."""
    examples, model = some_examples(bench), bench.hub.model
    if not bench.family.encodes:
        choices = tuple((draw, draw + 1, 7) for draw in (40, 90, 140))
        examples = [*examples, *(replace(e, continuations=choices) for e in examples)]
    worst = 0.0
    for count in (1, 3):
        own = [e for e in examples if len(e.continuations) == count]
        if not own:
            continue
        for mix in (as_mix("one"),) if bench.family.encodes else (Mix(), as_mix("one")):
            together = sequence_losses(model, own, mix)
            singly = [replace(e, continuations=(c,)) for e in own for c in e.continuations]
            apart = torch.stack([sequence_losses(model, [e], mix).flatten() for e in singly])
            worst = max(worst, error_of(together, apart.view(len(own), count)))
    return worst


def packed_gradient(bench: Bench) -> float:
    """Compare the gradient of packed examples with the sum of each one's own."""
    model, examples = bench.hub.model, some_examples(bench)
    weights = bench.weights(bench.hub, seed=1)
    bank = model.new_bank(
        tuple(weights.factors),
        slots=1,
        rank=weights.max_rank,
        dtype=torch.float32,
        labels=weights.labels,
        trainable=True,
    )
    bank.write(0, weights)

    def gradient(chosen: Sequence[Encoded], length: int) -> Tensor:
        bank.zero_gradients()
        batch = model.pack([chosen], length)
        with activate(Plan(bank.places, torch.ones(batch.num_rows, 1))):
            found = model.answer_logits(batch)
        token_losses(found, batch.targets).sum().backward()
        assert bank.gradients is not None
        return bank.gradients[0].clone()

    together = gradient(examples, sum(e.num_inputs for e in examples) + 5)
    apart = torch.stack([gradient([e], e.num_inputs) for e in examples]).sum(0)
    if not apart.any():
        raise WrongError("there is no gradient")
    return error_of(together, apart)


def packed(bench: Bench) -> float:
    """Compare losses and gradients of packed examples with those of each apart."""
    return max(packed_losses(bench), packed_gradient(bench))


def trained(bench: Bench) -> float:
    """Train an adapter here for a few steps, and compare its logits with what PEFT makes of its folder."""
    base = bench.plain_logits()
    with door(), mock.patch.object(learn, "NUM_BACKGROUND_TEXTS", IMAGINED):
        bench.hub.train([toy_task("trained")], test_examples=0, **QUICK)
    theirs = _peft_of(bench, bench.hub.pool.path("trained"))
    bench.matters(theirs, base)
    return bench.worst("trained", theirs)


def _peft_of(bench: Bench, folder: Path) -> Any:
    """Return PEFT's model of a saved adapter, over a model of its own; raise WrongError where it cannot."""
    base = bench.load_plain()
    _pool_like(bench, base)
    try:
        return peft.PeftModel.from_pretrained(base, folder).eval()
    except Exception as error:
        raise WrongError(
            f"PEFT cannot load it: {type(error).__name__}: {one_line(error)}"
        ) from error


def _pool_like(bench: Bench, model: Any) -> None:
    """Where features are means, put a mean in the place of BERT's pooling layer, as its users must."""
    base = model.base_model
    if (
        bench.family.encodes
        and bench.hub.backbone.pooling == "mean"
        and getattr(base, "pooler", None)
    ):
        base.pooler = Mean()


class Mean(nn.Module):
    """What stands for BERT's pooling layer where features are means."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mean over the tokens."""
        return hidden.mean(1)


def foreign(bench: Bench) -> float:
    """Load an adapter on all linear layers that PEFT made, and compare logits with PEFT's.

    Where that is refused (PEFT means experts, too), one on attention alone must load and agree.
    """
    try:
        return _from_peft(bench, "foreign", "all-linear")
    except RefusedError as refused:
        first = refused
    with contextlib.suppress(RefusedError):
        error = _from_peft(bench, "attention", _names(bench, attention=True))
        if error > EXACT:
            raise WrongError(f"an adapter on attention alone: {error:.2g}")
    raise first


def _from_peft(bench: Bench, name: str, targets: str | list[str]) -> float:
    """Make an adapter with PEFT, load it, and return the largest error of our logits under it."""
    base, folder = bench.plain_logits(), bench.work / name
    theirs = _made_by_peft(bench, targets)
    theirs.save_pretrained(folder)
    bench.matters(theirs, base)
    with door():
        bench.hub.load(folder, name=name)
    return bench.worst(name, theirs)


def _made_by_peft(bench: Bench, targets: str | list[str]) -> Any:
    """Return PEFT's model with a random adapter; of a state-space model, only on layers that PEFT allows."""
    model = bench.load_plain()
    _pool_like(bench, model)
    kind = "SEQ_CLS" if bench.family.encodes else "CAUSAL_LM"
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, task_type=kind, target_modules=targets, init_lora_weights=False)
    try:
        return peft.get_peft_model(model, config).eval()
    except ValueError as error:
        if "Mamba" not in str(error) or targets != "all-linear":
            raise
        return _made_by_peft(bench, _names(bench))


def _names(bench: Bench, attention: bool = False) -> list[str]:
    """Return last names of linear layers: of all that PEFT allows, or of attention alone."""
    found = set()
    for module, layer in bench.plain.named_modules():
        last = module.rpartition(".")[2]
        kept = not attention or "attn" in module or "attention" in module
        if isinstance(layer, nn.Linear) and kept and last not in UNWANTED:
            found.add(last)
    return sorted(found)


def _quantized(bench: Bench, kind: str) -> float:
    """Compare a quantized backbone with bitsandbytes in transformers, and rows in a batch with rows alone."""
    hub = bench.new_hub(f"pool-{kind}", quantize=kind)
    try:
        if bench.family.encodes:
            error = features(bench, hub, _packed_plain(bench, kind))
        else:
            error = bench.worst(None, _packed_plain(bench, kind), hub)
    except AdapterHubError:
        raise
    except Exception as raw:
        if not _fails(bench, kind):
            raise
        message = f"{one_line(raw)} (plain transformers fails as well)"
        raise RuntimeError(message) from raw
    if error > EXACT:
        return error

    def ours(rows: Sequence[str]) -> Tensor:
        if bench.family.encodes:
            return _features(bench, hub, rows)
        return bench.ours(rows, [None] * len(rows), hub)

    rows = texts(LENGTHS)
    error = error_of(ours(rows), torch.cat([ours([text]) for text in rows]))
    if error > EXACT:
        raise WrongError(f"{error:.2g} between a row in a batch and the row alone")
    return error


def _packed_plain(bench: Bench, kind: str) -> Any:
    """Return transformers' own quantized model.

    On a CPU with AVX512-BF16 bitsandbytes would compute 4-bit products in bf16 without a gradient; like the
    package, this goes without.
    """
    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": True,
    }
    settings = transformers.BitsAndBytesConfig(
        **four if kind == "nf4" else {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    )
    model = bench.load_plain(quantization_config=settings, device_map={"": "cpu"})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _fails(bench: Bench, kind: str) -> bool:
    """Return whether plain transformers cannot run a quantized model either."""
    try:
        bench.theirs("good", _packed_plain(bench, kind))
    except Exception:
        return True
    return False


def nf4(bench: Bench) -> float:
    """Load the backbone in 4 bits."""
    return _quantized(bench, "nf4")


def int8(bench: Bench) -> float:
    """Load the backbone in 8 bits."""
    return _quantized(bench, "int8")


def joint(bench: Bench) -> float:
    """Compare two adapters that are trained in one run with each trained alone: their losses."""
    hub = bench.hub
    other = toy_task("other", flip=True) if bench.family.encodes else toy_answers("other")
    config = TrainConfig(**QUICK)
    jobs = [
        make_job(hub.backbone.tokenizer, task.name, task, config) for task in (toy_task(), other)
    ]
    together = _losses(bench, jobs)
    apart = {name: own for job in jobs for name, own in _losses(bench, [job]).items()}
    if set(together) != set(apart) or not apart:
        raise WrongError("not as many losses together as apart")
    return max(error_of(torch.tensor(together[n]), torch.tensor(apart[n])) for n in apart)


def _losses(bench: Bench, jobs: Sequence[Job]) -> dict[str, list[float]]:
    """Return what a run tells of losses, by adapter."""
    told: dict[str, list[float]] = {}
    with door():
        train(
            bench.hub.model,
            jobs,
            on_event=lambda event: told.setdefault(event.adapter, []).append(event.values["loss"]),
        )
    return told


@dataclass(frozen=True)
class Column:
    """One column: what is checked, and how much of an error is rounding."""

    check: Check
    tolerance: float = EXACT
    decoders_only: bool = False


COLUMNS = {
    "logits": Column(logits),
    "greedy": Column(greedy, decoders_only=True),
    "mixed": Column(mixed),
    "packed": Column(packed),
    "trained": Column(trained),
    "foreign": Column(foreign),
    "nf4": Column(nf4),
    "int8": Column(int8),
    "joint": Column(joint, CARRIED),
}
"""Columns by name, in the order in which they are made: a hub serves all of them."""


def cell(bench: Bench, column: Column) -> str:
    """Carry out one check; return its cell."""
    if column.decoders_only and bench.family.encodes:
        return "-"
    try:
        error = column.check(bench)
    except RefusedError as refused:
        found = f"refused: {refused}"
    except WrongError as wrong:
        found = f"wrong: {wrong}"
    except AdapterHubError as late:
        found = f"wrong: refused in use: {one_line(late)}"
    except Exception as raw:
        found = f"raw: {type(raw).__name__}: {one_line(raw)}"
    else:
        found = "right" if error <= column.tolerance else f"wrong: {error:.2g}"
    return found.replace(f"{bench.work}/", "")


def row(
    family: Family, work: Path, columns: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, float]]:
    """Return a family's cells and the seconds that each took, by column."""
    folder = work / "backbone"
    family.save(folder)
    bench = Bench(family, folder, work)
    cells, seconds = {}, {}
    for name in columns or COLUMNS:
        start = time.monotonic()
        cells[name] = cell(bench, COLUMNS[name])
        seconds[name] = time.monotonic() - start
    return cells, seconds
