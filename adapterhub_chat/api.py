"""AdapterHub: the Python face. Short methods over the parts; what they do is said where it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat import evaluate as judging
from adapterhub_chat.backbone import Quantize, load_backbone
from adapterhub_chat.config import RunOptions, read_settings
from adapterhub_chat.engine import Engine
from adapterhub_chat.errors import AdapterError, UnknownNameError, UsageError
from adapterhub_chat.generate import Request, Sampling, engine_of
from adapterhub_chat.generate import generate as decode
from adapterhub_chat.generate import next_token_logits as logits_after
from adapterhub_chat.inputs import conversation, listed, text, unanswered
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pool import Pool
from adapterhub_chat.shelf import Known, Shelf
from adapterhub_chat.task import Task, load_task
from adapterhub_chat.template import encode_prompts
from adapterhub_chat.trust import Status, Verdict, status_of
from adapterhub_chat.types import (
    NO_ADAPTER,
    AdapterChoice,
    Mix,
    PromptContract,
    Score,
    Turn,
)
from adapterhub_chat.workshop import (
    SILENT,
    Listeners,
    Order,
    configs_of,
    judge_task,
    make_adapters,
)


@dataclass(frozen=True)
class AdapterInfo:
    """What `hub.adapters()` tells of one adapter; rank and parameters once it is loaded."""

    name: str
    loaded: bool
    status: Status
    task: str = ""
    rank: int = 0
    parameters: int = 0
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """One answer by a task's prompt contract; `label` and `scores` only where the task has labels."""

    output: str
    adapter: str
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class AdapterHub:
    """One frozen backbone, a pool of adapters, and every way to use them together.

    `backbone` is a packaged name, a local folder, a `.gguf` file or a Hub id; `pool` the folder that
    keeps adapters; `quantize` None, "nf4" or "int8"; `dtype` None takes the best that the hardware
    computes natively; `device` None takes CUDA when there is one. `adapter_bytes` bounds the memory of
    loaded adapters: the least recently used make room, and are loaded again when they are asked for
    (None: no bound). Methods may be called from several threads. Wherever an adapter may be named, weights
    by name ({"qa": 0.5, "generation": 0.5}) make a mixture and None or "backbone" means no adapter.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        pool: str | Path = "adapters",
        *,
        quantize: Quantize | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        adapter_bytes: int | None = None,
    ) -> None:
        """Load the backbone and open the pool."""
        self.pool = Pool(pool)
        self.backbone = load_backbone(backbone, dtype=dtype, device=device, quantize=quantize)
        self.model = AdapterModel(self.backbone, budget=adapter_bytes)
        self._shelf = Shelf(self.model, self.pool)
        self._default: ContextVar[Mix] = ContextVar("adapterhub_default_mix", default=NO_ADAPTER)

    # -- loading -----------------------------------------------------------------------------------

    def load(self, source: str | Path, name: str | None = None) -> str:
        """Load an adapter from the pool by name, or from any PEFT LoRA folder; return its name.

        Raises AdapterError, with nothing changed, when it is damaged, made for another backbone, or no
        longer answers its recorded probe; warns when it is only compatible (another precision) or
        unverified (no manifest).
        """
        return self._shelf.load(source, name)

    @property
    def engine(self) -> Engine:
        """What decodes: submit requests to it one by one, cancel them, stream, ask for log-probabilities."""
        return engine_of(self.model)

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        self._shelf.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """Return what is in the pool and what is loaded."""
        loaded = {n: h for n in self.model.names if (h := self._shelf.known(n)) is not None}
        names = sorted({*self.pool.names(), *loaded})
        return [self._info(name, loaded.get(name)) for name in names]

    def rollback(self, name: str) -> Manifest | None:
        """Put the earlier version of a pool member back; return its manifest (None: plain PEFT's).

        Saving other weights under a name keeps the version before them. The two are exchanged in one step
        on disk, so that a second call returns to the newer one; where the name is loaded, what came back
        is checked and loaded, and new requests get it. Raises UsageError when there is no earlier version
        and AdapterError when it may not be loaded here, with nothing changed.
        """
        return self._shelf.rollback(name)

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter against this backbone: bytes, shapes, fingerprint, and the recorded probe."""
        return self._shelf.verify(source)

    @contextlib.contextmanager
    def use(self, adapter: AdapterChoice) -> Iterator[AdapterHub]:
        """Make `adapter` the default of the calling thread inside the block.

        Also reaches direct calls of `hub.backbone.model`, transformers' own object.
        """
        (mix,) = self._shelf.ready([adapter])
        token = self._default.set(mix)
        try:
            with self.model.mixing([mix]):
                yield self
        finally:
            self._default.reset(token)

    # -- using -------------------------------------------------------------------------------------

    def chat(
        self,
        conversations: Sequence[Sequence[Turn]],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        on_text: Callable[[int, str], None] = lambda _row, _piece: None,
    ) -> list[str]:
        """Answer every conversation in ONE batch, row i by `adapters[i]` under its own contract.

        `on_text(row, piece)` hears of every piece of text as it comes. Options that are None are the
        contract's own.
        """
        rows = listed(conversations, "conversations")
        mixes = self._mixes(adapters, len(rows))
        contracts = [self._shelf.contract(mix) for mix in mixes]
        turns = [conversation(*row) for row in zip(rows, contracts, strict=True)]
        prompts = encode_prompts(self.backbone.tokenizer, turns)
        requests = []
        for prompt, mix, contract in zip(prompts, mixes, contracts, strict=True):
            sampling = judging.sampling_of(contract or PromptContract(), seed)
            if max_new_tokens is not None:
                sampling = replace(sampling, max_new_tokens=max_new_tokens)
            if temperature is not None:
                sampling = replace(sampling, temperature=temperature)
            requests.append(Request(prompt, mix, sampling))
        return decode(self.model, requests, on_text=on_text)

    def generate(
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
    ) -> list[str]:
        """Continue raw prompts (no chat template) in one mixed batch; return the new texts.

        Row i does not depend on the other rows, sampled or not: equal prompts under one `seed` give
        equal texts. `stop` texts end an answer and are no part of it.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(
            max_new_tokens, temperature, top_p, stops, ignore_eos=ignore_eos, seed=seed
        )
        return decode(self.model, self._raw(prompts, adapters, sampling))

    def next_token_logits(
        self, prompts: Sequence[str], adapters: Sequence[AdapterChoice] | None = None
    ) -> Tensor:
        """Return float32 logits (rows, vocab) of the token that follows each raw prompt."""
        return logits_after(self.model, self._raw(prompts, adapters, Sampling()))

    def predict(
        self,
        adapter: AdapterChoice,
        inputs: Sequence[str | Mapping[str, str]],
        *,
        task: str | Path | Task | None = None,
        listeners: Listeners = SILENT,
    ) -> list[Prediction]:
        """Run inputs through a prompt contract: the adapter's own, or that of `task`.

        Label tasks are decided by the likelihood of each label, all others by generating the answer.
        Inputs are texts, or the contract's fields by name; raises one DataError for all that do not fit.
        """
        (mix,) = self._shelf.ready([adapter])
        contract = self._shelf.contract(mix) if task is None else _task(task).contract
        if contract is None:
            raise UsageError(
                f"adapter {str(mix)!r} has no prompt contract; name a task: predict(..., task='qa')"
            )
        examples = unanswered(contract, listed(inputs, "inputs"))

        def told(n: int) -> None:
            listeners.on_judged(str(mix), n)

        if not contract.labels:
            mixes = [mix] * len(examples)
            texts = judging.answers(self.model, contract, examples, mixes, on_progress=told)
            return [Prediction(text, str(mix)) for text in texts]
        shares = judging.label_scores(self.model, contract, examples, mix, told).tolist()
        labels = list(contract.labels)
        found = []
        for row in shares:
            label = labels[max(range(len(row)), key=row.__getitem__)]
            scores = dict(zip(labels, row, strict=True))
            found.append(Prediction(contract.labels[label], str(mix), label, scores))
        return found

    # -- learning ----------------------------------------------------------------------------------

    def train(
        self,
        tasks: Sequence[str | Path | Task],
        how: str = "joint",
        *,
        names: Sequence[str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        sweep: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        save_dtype: torch.dtype = torch.float32,
        run_dir: str | Path | None = None,
        resume: bool = False,
        listeners: Listeners = SILENT,
        **shared: Any,
    ) -> dict[str, Manifest]:
        """Train one adapter per task, save each to the pool and load it; return the manifests.

        `how` is "joint" (all in every batch), "shared" (joint, with one more adapter that acts on all
        rows) or "sequence" (one after another). `shared` are fields of RunOptions, and of TrainConfig
        for all adapters; `settings[name]` are those of one, `sweep[name]` lists values to try. Each
        adapter is measured on `test_examples` of its task's test split beside the backbone (0: not
        measured). With a `run_dir` the run is logged and its state saved there, and `resume` goes on
        from it. Ctrl-C keeps what was best so far, unmeasured, and warns. An adapter that has learnt
        nothing (interrupted or diverged at once) is not saved and not in the answer.
        """
        loaded = [_task(task) for task in listed(tasks, "tasks")]
        titles = [task.name for task in loaded] if names is None else list(names)
        if len(titles) != len(loaded):
            raise UsageError(f"{len(loaded)} tasks but {len(titles)} names: give one name per task")
        if len(set(titles)) < len(titles):
            raise UsageError(f"adapter names must differ: {', '.join(titles)}")
        run = {key: value for key, value in shared.items() if key in RunOptions.model_fields}
        common = {key: value for key, value in shared.items() if key not in run}
        order = Order(
            tasks=dict(zip(titles, loaded, strict=True)),
            configs=configs_of(titles, common, settings or {}),
            options=read_settings(RunOptions, {"how": how, **run}, "the run"),
            sweeps=sweep or {},
            save_dtype=save_dtype,
            run_dir=None if run_dir is None else Path(run_dir),
            resume=resume,
        )
        return make_adapters(self._shelf, order, listeners)

    def evaluate(
        self,
        adapters: Sequence[AdapterChoice] | None = None,
        tasks: Sequence[str | Path | Task] | None = None,
        *,
        limit: int = 0,
        save: bool = False,
        listeners: Listeners = SILENT,
    ) -> list[Score]:
        """Score adapters on the test splits of tasks, with intervals and the backbone's own value.

        Without `adapters`: all of the pool. Without `tasks`: each adapter on the tasks it was trained
        on. `limit` bounds the items (0: all). With `save`, adapters of the pool keep their scores in
        manifest and card.
        """
        chosen = self.pool.names() if adapters is None else listed(adapters, "adapters")
        if not chosen:
            raise UsageError(
                f"nothing to evaluate: name adapters, or train some into {self.pool.root}"
            )
        named = [(str(mix), mix) for mix in self._shelf.ready(chosen)]
        pairs = (
            self._own_tasks(named)
            if tasks is None
            else [(_task(task), named) for task in listed(tasks, "tasks")]
        )
        scores = [
            score
            for task, group in pairs
            for score in judge_task(self.model, task, group, limit, listeners)
        ]
        if save:
            self._shelf.record(scores)
        return scores

    # -- inside ------------------------------------------------------------------------------------

    def _info(self, name: str, held: Known | None) -> AdapterInfo:
        try:
            manifest = held.manifest if held else self.pool.manifest(name)
        except AdapterError:  # its manifest cannot be read
            return AdapterInfo(name, loaded=False, status="refused")
        return AdapterInfo(
            name=name,
            loaded=held is not None,
            status=status_of(manifest, self.backbone.fingerprint),
            task=", ".join(manifest.training.tasks) if manifest else "",
            rank=held.rank if held else 0,
            parameters=held.parameters if held else 0,
            scores=manifest.scores if manifest else (),
        )

    def _own_tasks(
        self, named: Sequence[tuple[str, Mix]]
    ) -> list[tuple[Task, list[tuple[str, Mix]]]]:
        groups: dict[str, list[tuple[str, Mix]]] = {}
        for name, mix in named:
            held = self._shelf.known(name)
            trained_on = held.manifest.training.tasks if held and held.manifest else ()
            if not trained_on:
                raise UsageError(
                    f"adapter {name!r} does not say what it was trained on; name tasks"
                )
            for task in trained_on:
                groups.setdefault(task, []).append((name, mix))
        return [(_trained_task(task, group[0][0]), group) for task, group in groups.items()]

    def _mixes(self, adapters: Sequence[AdapterChoice] | None, rows: int) -> list[Mix]:
        """Return one mix a row; without `adapters`, the thread's default for all."""
        if adapters is None:
            return self._shelf.ready([self._default.get()]) * rows
        choices = listed(adapters, "adapters")
        if len(choices) != rows:
            raise UsageError(f"{rows} rows but {len(choices)} adapters: give one per row")
        return self._shelf.ready(choices)

    def _raw(
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None,
        sampling: Sampling,
    ) -> list[Request]:
        texts = [text(p, f"prompt {i}") for i, p in enumerate(listed(prompts, "prompts"))]
        mixes = self._mixes(adapters, len(texts))
        ids = self.backbone.tokenizer(texts).input_ids if texts else []
        return [Request(tuple(i), mix, sampling) for i, mix in zip(ids, mixes, strict=True)]


def _task(task: str | Path | Task) -> Task:
    return load_task(task) if isinstance(task, str | Path) else task


def _trained_task(name: str, adapter: str) -> Task:
    """Return the task that an adapter says it was trained on; a manifest keeps no paths."""
    try:
        return load_task(name)
    except UnknownNameError as error:
        raise UsageError(
            f"adapter {adapter!r} was trained on the task {name!r}, whose file is not here; give its "
            f"path: --task path/to/{name}.toml, in Python evaluate(tasks=[...])"
        ) from error


__all__ = ["AdapterHub", "AdapterInfo", "Prediction", "Verdict"]
