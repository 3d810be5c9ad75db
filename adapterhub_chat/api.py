"""AdapterHub: the Python face. Short methods over the parts; what they do is said where it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.backbone import Quantize, load_backbone
from adapterhub_chat.engine import Engine
from adapterhub_chat.errors import UsageError
from adapterhub_chat.generate import Request, Sampling, check_writes, engine_of
from adapterhub_chat.generate import generate as decode
from adapterhub_chat.generate import next_token_logits as logits_after
from adapterhub_chat.inputs import asked, listed, text
from adapterhub_chat.making import Making
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.ordering import order_of
from adapterhub_chat.pool import Pool
from adapterhub_chat.predict import Prediction, check_labels, choices, predictions, replies
from adapterhub_chat.publish import Published
from adapterhub_chat.pull import Pulled
from adapterhub_chat.ram import RAM_BYTES
from adapterhub_chat.route import Route
from adapterhub_chat.router import Router, describe_routes
from adapterhub_chat.search import Found
from adapterhub_chat.sharing import Sharing
from adapterhub_chat.shelf import AdapterInfo, Shelf
from adapterhub_chat.task import Task, as_task
from adapterhub_chat.trust import Verdict
from adapterhub_chat.types import AUTO, NO_ADAPTER, AdapterChoice, Mix, Score, Turn
from adapterhub_chat.workshop import SILENT, Listeners, judge_task, make_adapters, own_tasks


class AdapterHub(Making, Sharing):
    """One frozen backbone, a pool of adapters, and every way to use them together.

    `backbone` is a packaged name, a local folder, a `.gguf` file or a Hub id; `pool` the folder that keeps
    adapters; `quantize` None, "nf4" or "int8"; `dtype` None takes the best that the hardware computes
    natively; `device` None takes CUDA when there is one. `adapter_bytes` bounds the memory of loaded
    adapters: the least recently used make room, and are loaded again when they are asked for (None: no
    bound). `ram_bytes` bounds what is kept of read adapters in the host's memory, from where they are
    loaded without the disk (None: 1 GiB for a GPU; none for a CPU, whose loaded adapters are in that memory
    already). `graphs` records decoding steps as CUDA graphs (on a CPU torch.compile makes them, and slower
    ones); a swap records nothing anew. Methods may be called from several threads. Wherever an adapter may
    be named, weights by name ({"qa": 0.5, "generation": 0.5}) make a mixture and None or "backbone" means
    no adapter; in the rows of `chat`, `generate` and `next_token_logits`, "auto" chooses by the row's
    message.
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
        ram_bytes: int | None = None,
        graphs: bool = False,
    ) -> None:
        """Load the backbone and open the pool."""
        self.pool = Pool(pool)
        self.backbone = load_backbone(backbone, dtype=dtype, device=device, quantize=quantize)
        self.model = AdapterModel(self.backbone, budget=adapter_bytes)
        self.model.graphs = graphs
        if ram_bytes is None:
            ram_bytes = 0 if self.backbone.device.type == "cpu" else RAM_BYTES
        self._shelf = Shelf(self.model, self.pool, ram_bytes)
        self._router = Router(self._shelf)
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
        return self._shelf.overview()

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
        contract's own. On an encoder, an answer is the words of the label that the row's adapter chooses.
        """
        rows = listed(conversations, "conversations")
        mixes = self._mixes(adapters, [asked(row) for row in rows])
        contracts = [self._shelf.contract(mix) for mix in mixes]
        changes = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        given = {name: value for name, value in changes.items() if value is not None}
        requests = replies(self.model, rows, mixes, contracts, seed, given)
        if self.backbone.encodes:
            return choices(self.model, requests, contracts, on_text)
        return decode(self.model, requests, on_text=on_text)

    def route(
        self,
        text: str,
        *,
        top: int = 1,
        previous: str | None = None,
        among: Sequence[str] | None = None,
    ) -> Route:
        """Return whom a message is for: an adapter or a mix of up to `top`, how sure that is, and why.

        The message is what a user types, before any contract's template. It is compared with what each
        adapter's manifest says of its own messages; where no adapter is close the router abstains, and the
        mix is empty: the backbone. `previous` is the adapter of the conversation's last turn, which stays
        unless another is clearly better. `among` are the adapters to choose from (None: all of the pool,
        and what is loaded). In `chat` and `generate` the choice "auto" does this row by row.
        """
        return self.routes([text], top=top, previous=previous, among=among)[0]

    def routes(
        self,
        texts: Sequence[str],
        *,
        top: int = 1,
        previous: str | None = None,
        among: Sequence[str] | None = None,
    ) -> list[Route]:
        """Return whom each of several messages is for, in one batch; see `route`."""
        return self._router.route(listed(texts, "texts"), top=top, previous=previous, among=among)

    def learn_routes(
        self, names: Sequence[str] | None = None, tasks: Sequence[str | Path | Task] | None = None
    ) -> dict[str, Manifest]:
        """Learn what the messages of pool members look like, and keep it in their manifests; return those.

        Training, transfer and adoption do this on their own. `names` None are all of the pool; `tasks` None
        those that each says it was trained on. Raises UsageError for all whose messages cannot be had.
        """
        chosen = self.pool.names() if names is None else listed(names, "names")
        given = None if tasks is None else [as_task(task) for task in listed(tasks, "tasks")]
        return describe_routes(self._shelf, chosen, given)

    def generate(  # noqa: PLR0913 - the options of every engine, by their usual names
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
    ) -> list[str]:
        """Continue raw prompts (no chat template) in one mixed batch; return the new texts.

        Row i does not depend on the other rows, sampled or not: equal prompts under one `seed` give
        equal texts. `stop` texts end an answer and are no part of it; the other options are `Sampling`'s.
        Log-probabilities, deadlines and cancelling are asked of `engine`.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(
            max_new_tokens,
            temperature,
            top_p,
            stops,
            ignore_eos,
            seed,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
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
        own = self._shelf.contract(mix)
        contract = own if task is None else as_task(task).contract
        if contract is None:
            raise UsageError(
                f"adapter {str(mix)!r} has no prompt contract; name a task: predict(..., task='qa')"
            )
        check_labels(self.model, own, contract)
        told = partial(listeners.on_judged, str(mix))
        return predictions(self.model, contract, mix, listed(inputs, "inputs"), told)

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
        order = order_of(tasks, {"how": how, **shared}, names, settings or {})
        folder = None if run_dir is None else Path(run_dir)
        order = replace(
            order, sweeps=sweep or {}, save_dtype=save_dtype, run_dir=folder, resume=resume
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
        if tasks is None:
            pairs = own_tasks(self._shelf, named)
        else:
            pairs = [(as_task(task), named) for task in listed(tasks, "tasks")]
        for task, mixes in pairs:
            for _, mix in mixes:
                check_labels(self.model, self._shelf.contract(mix), task.contract)
        judged = [judge_task(self.model, task, group, limit, listeners) for task, group in pairs]
        scores = [score for group in judged for score in group]
        if save:
            self._shelf.record(scores)
        return scores

    # -- inside ------------------------------------------------------------------------------------

    def _mixes(
        self, adapters: Sequence[AdapterChoice] | None, rows: Sequence[Sequence[str]]
    ) -> list[Mix]:
        """Return one mix a row, by what its user has said for "auto"; without `adapters`, the default."""
        if adapters is None:
            return self._shelf.ready([self._default.get()]) * len(rows)
        choices = listed(adapters, "adapters")
        if len(choices) != len(rows):
            raise UsageError(f"{len(rows)} rows but {len(choices)} adapters: give one per row")
        if auto := [i for i, choice in enumerate(choices) if choice == AUTO]:
            found = self._router.conversations([rows[i] for i in auto])
            for i, route in zip(auto, found, strict=True):
                choices[i] = route.mix
        return self._shelf.ready(choices)

    def _raw(
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None,
        sampling: Sampling,
    ) -> list[Request]:
        check_writes(self.model)
        texts = [text(p, f"prompt {i}") for i, p in enumerate(listed(prompts, "prompts"))]
        mixes = self._mixes(adapters, [[text] for text in texts])
        ids = self.backbone.tokenizer(texts).input_ids if texts else []
        return [Request(tuple(i), mix, sampling) for i, mix in zip(ids, mixes, strict=True)]


__all__ = ["AdapterHub", "AdapterInfo", "Found", "Prediction", "Published", "Pulled", "Verdict"]
