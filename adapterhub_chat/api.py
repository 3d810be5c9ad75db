"""AdapterHub: the Python interface. Its methods are thin; the modules that they call do the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.config import EngineOptions, engine_options
from adapterhub_chat.data.inputs import as_list, checked_text, user_texts
from adapterhub_chat.data.task import Task, as_task
from adapterhub_chat.evaluation.adopt import adopt
from adapterhub_chat.evaluation.run import evaluate_adapters
from adapterhub_chat.events import SILENT, Listeners
from adapterhub_chat.export.merged_model import MOST_DRIFT, Exported, export
from adapterhub_chat.inference.contracts import (
    Prediction,
    checked_contract,
    choices,
    predictions,
    replies,
)
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.generate import check_writes, engine_of
from adapterhub_chat.inference.generate import generate as decode
from adapterhub_chat.inference.likelihood import next_token_logits as logits_after
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.merge.run import merge_adapters
from adapterhub_chat.merge.spec import merge_spec
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Quantize, load_backbone
from adapterhub_chat.pool.admission import Verdict
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.registry import AdapterInfo, Registry
from adapterhub_chat.remote.client import HubClient
from adapterhub_chat.remote.pull import Pulled, pull, pull_locked
from adapterhub_chat.remote.push import Published, push
from adapterhub_chat.remote.search import Found, search
from adapterhub_chat.report.plots import with_picture
from adapterhub_chat.route.choice import Route
from adapterhub_chat.route.router import Router, describe_routes
from adapterhub_chat.training.run import make_adapters
from adapterhub_chat.training.spec import TrainSpec
from adapterhub_chat.transfer.ranking import Ranked, rank_sources
from adapterhub_chat.transfer.run import Transferred, flatten, make_transfer
from adapterhub_chat.transfer.spec import ranked_task, transfer_spec
from adapterhub_chat.types import NO_ADAPTER, AdapterChoice, Mix, Score, Turn


class AdapterHub:
    """One frozen backbone, a pool of adapters, and every way to use them together.

    `backbone` is a packaged name, a local folder, a `.gguf` file or a Hub id; `pool` the folder that keeps
    adapters; `quantize` None, "nf4" or "int8"; `dtype` None takes the fastest that the hardware computes
    natively; `device` None takes CUDA when available. `engine` takes EngineOptions, the limits of decoding
    and of loaded adapters; each of its fields may instead be a keyword. `adapter_bytes` bounds the memory of
    loaded adapters: the least recently used are evicted, and loaded again on demand. `ram_bytes` bounds the
    cache of read adapters in host memory, from which they load without disk access. `graphs` records decoding
    steps as CUDA graphs (on a CPU with torch.compile, which is slower); swapping adapters does not record
    them again. Methods may be called from several threads. Wherever an adapter may be named, weights by name
    ({"qa": 0.5, "generation": 0.5}) make a mixture and None or "backbone" means no adapter; in the rows of
    `chat`, `generate` and `next_token_logits`, "auto" chooses by the row's message.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        pool: str | Path = "adapters",
        *,
        quantize: Quantize | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        engine: EngineOptions | None = None,
        **options: Any,
    ) -> None:
        """Load the backbone and open the pool."""
        settings = engine_options(engine, options)
        self.pool = Pool(pool)
        self.backbone = load_backbone(backbone, dtype=dtype, device=device, quantize=quantize)
        self.model = AdapterModel(self.backbone, settings)
        self._registry = Registry(self.model, self.pool)
        self._router = Router(self._registry)
        self._default: ContextVar[Mix] = ContextVar("adapterhub_default_mix", default=NO_ADAPTER)

    # -- loading -----------------------------------------------------------------------------------

    def load(self, source: str | Path, name: str | None = None) -> str:
        """Load an adapter from the pool by name, or from any PEFT LoRA folder; return its name.

        Raises AdapterError, with nothing changed, when it is damaged, made for another backbone, or does not
        reproduce its recorded probe; warns when it is only compatible (another precision) or unverified (no
        manifest).
        """
        return self._registry.load(source, name)

    @property
    def engine(self) -> Engine:
        """The decoding engine: it takes single requests, streams, cancels, and returns log-probabilities."""
        return engine_of(self.model)

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        self._registry.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """Return the adapters of the pool and those that are loaded."""
        return self._registry.overview()

    def rollback(self, name: str) -> Manifest | None:
        """Restore the earlier version of a pool member; return its manifest (None: made by plain PEFT).

        Saving new weights under a name keeps the previous version. The two are exchanged in one step on disk,
        so that a second call returns to the newer one; if the name is loaded, the restored version is checked
        and loaded, and new requests use it. Raises UsageError when there is no earlier version and
        AdapterError when it may not be loaded here, with nothing changed.
        """
        return self._registry.rollback(name)

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter against this backbone: bytes, shapes, fingerprint, and the recorded probe."""
        return self._registry.verify(source)

    @contextlib.contextmanager
    def use(self, adapter: AdapterChoice) -> Iterator[AdapterHub]:
        """Make `adapter` the default of the calling thread inside the block.

        Also reaches direct calls of `hub.backbone.model`, transformers' own object.
        """
        (mix,) = self._registry.resolve([adapter])
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
        """Answer all conversations in one batch, row i by `adapters[i]` under its own contract.

        `on_text(row, piece)` is called with each piece of text as it is decoded. Options that are None are
        the contract's. On an encoder, an answer is the words of the label that the row's adapter chooses.
        """
        rows = as_list(conversations, "conversations")
        mixes = self._mixes(adapters, [user_texts(row) for row in rows])
        contracts = [self._registry.contract(mix) for mix in mixes]
        changes = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        requests = replies(self.model, rows, mixes, contracts, seed, changes)
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
        """Return which adapter, or mix of up to `top`, should answer a message, with confidence and reason.

        The message is a user's text, before any contract's template. It is compared with the prototype of
        messages in each adapter's manifest; if no adapter is close the router abstains, and the mix is empty:
        the backbone. `previous` is the adapter of the conversation's last turn, which is kept unless another
        is clearly better. `among` are the candidates (None: all adapters of the pool, and the loaded ones).
        In `chat` and `generate` the choice "auto" does this for each row.
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
        """Route several messages in one batch; see `route`."""
        return self._router.route(as_list(texts, "texts"), top=top, previous=previous, among=among)

    def learn_routes(
        self, names: Sequence[str] | None = None, tasks: Sequence[str | Path | Task] | None = None
    ) -> dict[str, Manifest]:
        """Fit message prototypes of pool members and store them in their manifests; return those.

        Training, transfer and adoption do this automatically. `names` None takes all of the pool; `tasks`
        None those that each manifest names. Raises one UsageError for all adapters whose messages are
        unavailable.
        """
        chosen = self.pool.names() if names is None else as_list(names, "names")
        task_list = None if tasks is None else [as_task(task) for task in as_list(tasks, "tasks")]
        return describe_routes(self._registry, chosen, task_list)

    def generate(  # noqa: PLR0913 - keyword options
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
        equal texts. `stop` texts end an answer and are not part of it; the other options are `Sampling`'s.
        `engine` has log-probabilities, deadlines and cancellation.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        options = (max_new_tokens, temperature, top_p, stops, ignore_eos, seed)
        sampling = Sampling(*options, top_k=top_k, repetition_penalty=repetition_penalty)
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
        """Answer inputs under a prompt contract: the adapter's own, or that of `task`.

        For label tasks the most likely label is the answer; for other tasks it is generated. Inputs are
        texts, or the contract's fields by name; raises one DataError that lists all misfits.
        """
        (mix,) = self._registry.resolve([adapter])
        default_contract = self._registry.contract(mix)
        contract = default_contract if task is None else as_task(task).contract
        contract = checked_contract(self.model, mix, default_contract, contract)
        on_judged = partial(listeners.on_judged, str(mix))
        return predictions(self.model, contract, mix, as_list(inputs, "inputs"), on_judged)

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
        spec = TrainSpec.of_call(
            tasks,
            {"how": how, **shared},
            names,
            settings,
            sweeps=sweep or {},
            save_dtype=save_dtype,
            run_dir=None if run_dir is None else Path(run_dir),
            resume=resume,
        )
        return self.run(spec, listeners)

    def run(self, spec: TrainSpec, listeners: Listeners = SILENT) -> dict[str, Manifest]:
        """Carry out a training run that a TrainSpec describes; see `train`."""
        return make_adapters(self._registry, spec, with_picture(listeners, spec.run_dir))

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

        Without `adapters`: all of the pool that can be loaded here; `listeners.on_refused` is called for each
        of the others, and AdapterError is raised when all are refused. Without `tasks`: each adapter on the
        tasks it was trained on. `limit` bounds the items (0: all). With `save`, the scores are stored in the
        manifests and cards of pool members.
        """
        choices = None if adapters is None else as_list(adapters, "adapters")
        task_list = None if tasks is None else [as_task(task) for task in as_list(tasks, "tasks")]
        return evaluate_adapters(
            self._registry, choices, task_list, limit, save=save, listeners=listeners
        )

    def transfer(  # noqa: PLR0913 - keyword options
        self,
        source: str,
        target: str | Path | Task,
        method: str = "auto",
        *,
        name: str | None = None,
        shots: int | Sequence[int] = 16,
        source_task: str | Path | Task | None = None,
        unlabelled: Sequence[str | Mapping[str, str]] | None = None,
        force: bool = False,
        level: float | None = None,
        stack_layers: str | None = None,
        layer: int = -1,
        listeners: Listeners = SILENT,
        **settings: Any,
    ) -> Transferred:
        """Make an adapter for a target task out of a source adapter; keep it when it is not worse.

        `target` is a task, or a table (.csv, ...) with the columns of the source's task and `label`, which
        may be empty.

        `method` is target (few-shot, the baseline), finetune, stack, language, maxent, adversarial, or auto:
        the one with the best lower bound of those that help, else the baseline. `shots` labelled target
        examples are learnt from; of several numbers the first makes the adapter, the others are judged for a
        report and not kept. `unlabelled` are texts of the target (None: its other training inputs). A stack
        is kept as one, on the source by its content. A source that was judged to hurt is refused unless
        `force`.
        The verdict (helps, neutral, hurts) is judged on the target's validation examples and goes into
        manifest and card; where no example of the target has a label, it rests on a proxy, and both say so
        (`outcome.proxy`). `settings` are fields of TrainConfig, one budget for all methods. `source_task`
        None: the task that the source was trained on. `level` is the mean log-likelihood, by the few-shot
        adapter, that maxent weighs the source's examples up to (None: as far as the effective sample size
        allows); DataError names the nearest when there is none. A stack's T acts in the blocks that
        `stack_layers` slices ("0:8": the first eight; None: as `layers` says); `layer` is the block whose
        states the discriminator and the entropy balancing look at.
        """
        spec = transfer_spec(
            source,
            target,
            shots,
            settings,
            method=method,
            name=name,
            source_task=None if source_task is None else as_task(source_task),
            unlabelled=None if unlabelled is None else as_list(unlabelled, "unlabelled"),
            force=force,
            level=level,
            stack_layers=stack_layers,
            layer=layer,
        )
        return make_transfer(self._registry, spec, listeners)

    def rank_sources(
        self, target: str | Path | Task, names: Sequence[str] | None = None, *, limit: int = 100
    ) -> list[Ranked]:
        """Rank adapters of the pool as sources of a transfer, without training; the most promising first.

        Judged by LogME and LEEP on up to `limit` labelled training examples of the target, and by the proxy
        A-distance to each source whose tasks are here. `names` None: all of the pool. Raises DataError for a
        target without labels.
        """
        return rank_sources(self._registry, ranked_task(target), names, limit)

    def flatten(self, name: str, flat_name: str | None = None) -> Manifest:
        """Keep a stack as one plain PEFT adapter with equal logits, under NAME-flat or `flat_name`.

        Raises UsageError for a plain adapter, AdapterError when the stack's source is missing or has changed.
        """
        return flatten(self._registry, name, flat_name)

    def merge(
        self,
        names: Sequence[str],
        method: str = "svd",
        weights: Sequence[float] | Literal["learn"] | None = None,
        *,
        name: str,
        tasks: Mapping[str, str | Path | Task] | None = None,
        listeners: Listeners = SILENT,
        **options: Any,
    ) -> Manifest:
        """Make one new adapter of several, measured against each of them; return its manifest.

        `method` is a row of the table (docs/merging.md) or "auto": the one that keeps most of its sources'
        scores on validation items. `weights` None are the method's own; "learn" searches for them.
        `options` are fields of MergeOptions: rank, density, seed, limit, floor, budget. `tasks` says by
        name what sources are judged by, where it is not what they were trained on. Raises ConfigError for
        all that does not fit at once, AdapterError when a source alone does not come out as itself or
        "auto" finds no method that keeps the floor.
        """
        spec = merge_spec(as_list(names, "names"), method, weights, name, options)
        return merge_adapters(self._registry, spec, tasks or {}, listeners)

    def export(
        self,
        adapter: AdapterChoice,
        folder: str | Path,
        *,
        form: str = "auto",
        most_drift: float = MOST_DRIFT,
    ) -> Exported:
        """Write the backbone with an adapter (or a mixture) merged into it, as transformers' folder.

        `form`: merged, requantized (over a packed backbone: packed again), or auto, the smallest whose next
        tokens on the probe prompts are at most `most_drift` nats of KL from the adapter's as it runs. Raises
        AdapterError when none is, UsageError for a folder that exists; nothing half written is left.
        """
        (mix,) = self._registry.resolve([adapter])
        return export(self._registry, mix, Path(folder), form, most_drift)

    # -- sharing -----------------------------------------------------------------------------------

    def adopt(
        self,
        source: str | Path,
        task: str | Path | Task,
        name: str | None = None,
        *,
        limit: int = 0,
        listeners: Listeners = SILENT,
    ) -> Manifest:
        """Measure an adapter that plain PEFT made, and give it a manifest, a probe and a card in the pool.

        `task` says how it is to be prompted and judged. Raises UsageError for one that has a manifest.
        """
        return adopt(self._registry, source, as_task(task), name, limit, listeners)

    def push(
        self,
        name: str,
        repo: str,
        *,
        version: str | None = None,
        private: bool = False,
        force: bool = False,
        sign: str | Path | None = None,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> Published:
        """Publish a pool member as `user/name`, in one commit, under a new version tag.

        `version` is a new tag (None: the next of v1, v2, ...). Refused are adapters that were never
        measured or lose to the backbone, unless `force`; then the card says so. `sign` is a private key
        of `adapterhub-chat keygen`. `endpoint` None: HF_ENDPOINT, else huggingface.co; `token` None:
        HF_TOKEN at that endpoint. Raises HubError with nothing half published.
        """
        hub, key = HubClient(endpoint, token), None if sign is None else Path(sign)
        published = push(
            self.pool, name, repo, hub, version=version, private=private, force=force, key=key
        )
        self._registry.refresh(name)
        return published

    def pull(
        self,
        repo: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        require_signature: str | None = None,
        replace: bool = False,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> Pulled:
        """Download an adapter from a Hub into the pool, verified as untrusted, and pin it in the lock.

        `revision` is a branch, tag or commit (None: main); `name` None takes the repository's. Raises
        AdapterError, HubError or UsageError with the pool as it was: for what the guard or this backbone
        refuses, another signer than `require_signature` (a public key), a name that the pool has from
        elsewhere, a tag that moved. `replace` waives the last two.
        """
        hub, key = HubClient(endpoint, token), require_signature
        return pull(
            self._registry, repo, hub, revision=revision, name=name, key=key, replace=replace
        )

    def pull_locked(self, token: str | None = None) -> list[Pulled]:
        """Restore the pool to the exact files of its `adapters.lock.json`."""
        return pull_locked(self._registry, token)

    def search(
        self,
        text: str = "",
        *,
        author: str = "",
        limit: int = 20,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> list[Found]:
        """Return adapters on a Hub for this backbone; those with its exact fingerprint come first."""
        return search(self.backbone, HubClient(endpoint, token), text, author, limit)

    # -- inside ------------------------------------------------------------------------------------

    def _mixes(
        self, adapters: Sequence[AdapterChoice] | None, rows: Sequence[Sequence[str]]
    ) -> list[Mix]:
        """Return one mix a row; "auto" is routed by the row's texts. Without `adapters`: the default mix."""
        if adapters is None:
            return self._registry.resolve([self._default.get()]) * len(rows)
        return self._registry.resolve(
            self._router.resolve_auto(as_list(adapters, "adapters"), rows)
        )

    def _raw(
        self, prompts: Sequence[str], adapters: Sequence[AdapterChoice] | None, sampling: Sampling
    ) -> list[Request]:
        check_writes(self.model)
        texts = [checked_text(p, f"prompt {i}") for i, p in enumerate(as_list(prompts, "prompts"))]
        mixes = self._mixes(adapters, [[text] for text in texts])
        ids = self.backbone.tokenizer(texts).input_ids if texts else []
        return [Request(tuple(i), mix, sampling) for i, mix in zip(ids, mixes, strict=True)]
