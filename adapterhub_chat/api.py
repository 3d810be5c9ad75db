"""AdapterHub: the Python face. It wires the parts together and is the edge that writes files."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adapterhub_chat import evaluate as judging
from adapterhub_chat.assets import ASSETS
from adapterhub_chat.backbone import Quantize, load_backbone
from adapterhub_chat.config import TrainConfig, read_settings
from adapterhub_chat.errors import AdapterError, DataError, UsageError
from adapterhub_chat.folder import config_of
from adapterhub_chat.generate import Request, Sampling
from adapterhub_chat.generate import generate as decode
from adapterhub_chat.generate import next_token_logits as logits_after
from adapterhub_chat.manifest import Manifest, Training
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.pool import Pool, Stored, check_name, read_stored
from adapterhub_chat.runlog import RunLog
from adapterhub_chat.sequence import train_sequence
from adapterhub_chat.task import Task, load_task
from adapterhub_chat.template import (
    encode_examples,
    encode_prompts,
    messages_of,
    primary_field,
)
from adapterhub_chat.train import Event, Job, Trained, train
from adapterhub_chat.trust import (
    Status,
    Verdict,
    check_fit,
    make_probe,
    probe_problem,
    status_of,
)
from adapterhub_chat.types import (
    AdapterChoice,
    Example,
    Message,
    Mix,
    PromptContract,
    Score,
    as_mix,
)

Turn = Message | Mapping[str, str]


@dataclass(frozen=True)
class AdapterInfo:
    """What `hub.adapters()` tells of one adapter."""

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

    `backbone` is a packaged name, a local folder, a `.gguf` file or a Hub id; `pool` the folder that keeps
    adapters; `quantize` None, "nf4" or "int8"; `dtype` None takes the best that the hardware computes
    natively; `device` None takes CUDA when there is one. Methods may be called from several threads.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        pool: str | Path = "adapters",
        *,
        quantize: Quantize | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Load the backbone and open the pool."""
        self.pool = Pool(pool)
        self.backbone = load_backbone(backbone, dtype=dtype, device=device, quantize=quantize)
        self.model = AdapterModel(self.backbone)
        self._stored: dict[str, Stored] = {}
        self._default: ContextVar[Mix] = ContextVar("adapterhub_default_mix", default=Mix())

    # -- loading -------------------------------------------------------------------------------------

    def load(self, source: str | Path, name: str | None = None) -> str:
        """Load an adapter from the pool by name, or from any PEFT LoRA folder; return its name.

        Raises AdapterError, with nothing changed, when it is damaged or made for another backbone; warns
        when it is only compatible (another precision) or unverified (no manifest).
        """
        stored = self._find(source, name)
        verdict = check_fit(stored, self.model)
        if not verdict.ok:
            raise AdapterError(
                f"adapter {stored.name!r} is refused on {self.backbone.name}: "
                + "; ".join(verdict.problems)
            )
        if verdict.status != "exact":
            detail = "; ".join(verdict.problems)
            warnings.warn(f"adapter {stored.name!r} is {verdict.status}: {detail}", stacklevel=2)
        self.model.load(stored.name, stored.weights)
        self._stored[stored.name] = stored
        probe = stored.manifest.probe if stored.manifest else None
        if problem := probe_problem(self.model, stored.name, probe, verdict.status):
            self.unload(stored.name)
            raise AdapterError(f"adapter {stored.name!r} does not do what it did: {problem}")
        return stored.name

    def unload(self, name: str) -> None:
        """Free the adapter's slot; the pool keeps it."""
        self.model.unload(name)
        self._stored.pop(name, None)

    def adapters(self) -> list[AdapterInfo]:
        """Return what is in the pool and what is loaded."""
        infos = []
        for name in sorted({*self.pool.names(), *self.model.names}):
            stored = self._stored.get(name)
            manifest = stored.manifest if stored else self.pool.manifest(name)
            weights = stored.weights if stored else None
            infos.append(
                AdapterInfo(
                    name=name,
                    loaded=name in self.model.names,
                    status=status_of(manifest, self.backbone.fingerprint),
                    task=", ".join(manifest.training.tasks) if manifest else "",
                    rank=weights.max_rank if weights else 0,
                    parameters=weights.num_parameters if weights else 0,
                    scores=manifest.scores if manifest else (),
                )
            )
        return infos

    def verify(self, source: str | Path) -> Verdict:
        """Check an adapter against this backbone: bytes, shapes, fingerprint, and the recorded probe."""
        try:
            stored = self._find(source, None)
        except AdapterError as error:
            return Verdict(False, "refused", (str(error),))
        verdict = check_fit(stored, self.model)
        if not verdict.ok:
            return verdict
        scratch = replace(stored, name=f"verify-{stored.name}-{time.monotonic_ns()}")
        self.model.load(scratch.name, scratch.weights)
        try:
            probe = stored.manifest.probe if stored.manifest else None
            problem = probe_problem(self.model, scratch.name, probe, verdict.status)
        finally:
            self.model.unload(scratch.name)
        return Verdict(False, "refused", (problem,)) if problem else verdict

    @contextlib.contextmanager
    def use(self, adapter: AdapterChoice) -> Iterator[AdapterHub]:
        """Make `adapter` the default of the calling thread inside the block.

        Also reaches direct calls of `hub.backbone.model`, transformers' own object.
        """
        mix = self._ready([adapter])[0]
        token = self._default.set(mix)
        try:
            with self.model.mixing([mix]):
                yield self
        finally:
            self._default.reset(token)

    # -- using ---------------------------------------------------------------------------------------

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
        """Answer every conversation in ONE batch, row i by `adapters[i]` under its own prompt contract."""
        mixes = self._mixes(adapters, len(conversations))
        contracts = [self._contract(mix) for mix in mixes]
        turns = [
            self._conversation(c, contract)
            for c, contract in zip(conversations, contracts, strict=True)
        ]
        prompts = encode_prompts(self.backbone.tokenizer, turns)
        requests = []
        for prompt, mix, contract in zip(prompts, mixes, contracts, strict=True):
            sampling = judging.sampling_of(contract or PromptContract(), seed)
            if max_new_tokens is not None:
                sampling = replace(sampling, max_new_tokens=max_new_tokens)
            if temperature is not None:
                sampling = replace(sampling, temperature=temperature)
            requests.append(Request(prompt, mix, sampling))
        return [text.strip() for text in decode(self.model, requests, on_text=on_text)]

    def generate(
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
    ) -> list[str]:
        """Continue raw prompts (no chat template) in one mixed batch; return the new texts."""
        sampling = Sampling(
            max_new_tokens, temperature, top_p, tuple(stop), ignore_eos=ignore_eos, seed=seed
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
    ) -> list[Prediction]:
        """Run inputs through a prompt contract: the adapter's own, or that of `task`.

        Label tasks are decided by the likelihood of each label, all others by generating the answer.
        Inputs are texts, or the contract's fields by name.
        """
        mix = self._ready([adapter])[0]
        contract = load_task_or(task).contract if task is not None else self._contract(mix)
        if contract is None:
            raise UsageError(
                f"adapter {str(mix)!r} has no prompt contract; name a task: predict(..., task='qa')"
            )
        examples = [Example(_fields(contract, given, i), "") for i, given in enumerate(inputs)]
        if not contract.labels:
            texts = judging.answers(self.model, contract, examples, [mix] * len(examples))
            return [Prediction(text, str(mix)) for text in texts]
        shares = judging.label_scores(self.model, contract, examples, mix).tolist()
        labels = list(contract.labels)
        found = []
        for row in shares:
            label = labels[max(range(len(row)), key=row.__getitem__)]
            scores = dict(zip(labels, row, strict=True))
            found.append(Prediction(contract.labels[label], str(mix), label, scores))
        return found

    # -- learning ------------------------------------------------------------------------------------

    def train(
        self,
        tasks: Sequence[str | Path | Task],
        how: Literal["joint", "sequence"] = "joint",
        *,
        names: Sequence[str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        test_examples: int = 200,
        save_dtype: torch.dtype = torch.float32,
        run_dir: str | Path | None = None,
        on_event: Callable[[Event], None] = lambda _: None,
        on_judged: Callable[[str, int], None] = lambda _what, _n: None,
        **shared: Any,
    ) -> dict[str, Manifest]:
        """Train one adapter per task, save each to the pool, and load it; return the manifests.

        `how` is "joint" (all in every batch) or "sequence" (one after another). `shared` are TrainConfig
        fields for all adapters, `settings[name]` those of one. Each adapter is measured on
        `test_examples` of its task's test split beside the backbone (0: not measured). Ctrl-C keeps what
        was best so far.
        """
        if how not in ("joint", "sequence"):
            raise UsageError(f"how={how!r}: allowed are 'joint' and 'sequence'")
        loaded = [load_task_or(task) for task in tasks]
        titles = list(names) if names is not None else [task.name for task in loaded]
        if len(titles) != len(loaded):
            raise UsageError(f"{len(loaded)} tasks but {len(titles)} names: give one name per task")
        configs = _configs(titles, shared, settings or {})
        jobs = [
            self._job(check_name(name), task, config)
            for name, task, config in zip(titles, loaded, configs, strict=True)
        ]
        by_name = dict(zip(titles, loaded, strict=True))
        manifests: dict[str, Manifest] = {}
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(RunLog(Path(run_dir))) if run_dir is not None else None

            def tell(event: Event) -> None:
                on_event(event)
                if log is not None:
                    log(event)

            finished: Any = (
                train(self.model, jobs, on_event=tell).items()
                if how == "joint"
                else train_sequence(self.model, jobs, on_event=tell)
            )
            for name, trained in finished:
                job = jobs[titles.index(name)]
                beside = [t for t in titles if t != name] if how == "joint" else []
                manifests[name] = self._keep(
                    by_name[name], job, trained, how=how, beside=beside, dtype=save_dtype
                )
        if test_examples and not any(
            m.training.stopped == "interrupted" for m in manifests.values()
        ):
            for name in manifests:
                manifests[name] = self._measure(name, by_name[name], test_examples, on_judged)
        return manifests

    def evaluate(
        self,
        adapters: Sequence[AdapterChoice] | None = None,
        tasks: Sequence[str | Path | Task] | None = None,
        *,
        limit: int = 0,
        on_judged: Callable[[str, int], None] = lambda _what, _n: None,
    ) -> list[Score]:
        """Score adapters on the test splits of tasks, with intervals and the backbone's own value.

        Without `adapters`: all of the pool. Without `tasks`: each adapter on the tasks it was trained on.
        `limit` bounds the items (0: all).
        """
        chosen = list(adapters) if adapters is not None else list(self.pool.names())
        mixes = self._ready(chosen)
        named = [(str(mix), mix) for mix in mixes]
        if tasks is not None:
            pairs = [(load_task_or(task), named) for task in tasks]
        else:
            pairs = _own_tasks(named, self._stored)
        scores = []
        for task, group in pairs:
            examples = _limited(task.split("test"), limit)
            if not examples:
                raise DataError(f"task {task.name!r} has no test examples")
            scores += judging.evaluate(self.model, group, [(task, examples)], on_progress=on_judged)
        return scores

    # -- inside --------------------------------------------------------------------------------------

    def _job(self, name: str, task: Task, config: TrainConfig) -> Job:
        tokenizer = self.backbone.tokenizer
        training = task.split("train")
        if not training:
            raise DataError(f"task {task.name!r} has no training examples")
        training = _sample(training, config.train_examples, config.seed)
        held_out = _limited(task.split("validation"), config.eval_examples)
        if config.eval_examples == 0:
            held_out = ()

        def encoded(examples: Sequence[Example]) -> list[Any]:
            return encode_examples(tokenizer, task.contract, examples, max_length=config.row_length)

        return Job(name, encoded(training), encoded(held_out), config)

    def _keep(
        self,
        task: Task,
        job: Job,
        trained: Trained,
        *,
        how: Literal["joint", "sequence"],
        beside: Sequence[str],
        dtype: torch.dtype,
    ) -> Manifest:
        """Load a trained adapter, record its probe, and save it."""
        weights = trained.weights.to(dtype)
        self.model.load(job.name, weights)
        manifest = Manifest(
            name=job.name,
            about=task.about,
            language=task.language,
            licence=task.licence,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backbone=self.backbone.name,
            fingerprint=self.backbone.fingerprint,
            contract=task.contract,
            metric=task.metric,
            probe=make_probe(self.model, job.name),
            training=Training(
                how=how,
                tasks=(task.name,),
                data_sha256=(task.data_hash(),),
                beside=tuple(beside),
                settings=job.config.model_dump(),
                steps=trained.steps,
                best_step=trained.best_step,
                tokens=trained.tokens,
                seconds=round(trained.seconds, 1),
                validation_loss=trained.best_loss if trained.best_step else None,
                stopped=trained.stopped,
            ),
        )
        config = config_of(weights, _base_model(self.backbone.name), self.model.shapes)
        stored = self.pool.save(job.name, weights, config, manifest)
        assert stored.manifest is not None
        self._stored[job.name] = stored
        return stored.manifest

    def _measure(
        self, name: str, task: Task, limit: int, on_judged: Callable[[str, int], None]
    ) -> Manifest:
        """Score a pool member on its own task and write the score into its manifest and card."""
        examples = _limited(task.split("test"), limit)
        mix = as_mix(name)
        scores = judging.evaluate(
            self.model, [(name, mix)], [(task, examples)], on_progress=on_judged
        )
        stored = self._stored[name]
        assert stored.manifest is not None
        manifest = stored.manifest.with_scores(scores)
        self.pool.describe(name, manifest)
        self._stored[name] = replace(stored, manifest=manifest)
        return manifest

    def _find(self, source: str | Path, name: str | None) -> Stored:
        """Return the pool member called `source`, else the adapter in the folder `source`."""
        if isinstance(source, str) and source in self.pool:
            stored = self.pool.load(source)
            return replace(stored, name=name) if name else stored
        folder = Path(source).expanduser()
        if isinstance(source, Path) or folder.is_dir():
            return read_stored(folder, check_name(name or folder.resolve().name))
        return self.pool.load(source)  # raises, naming the adapters that are there

    def _ready(self, choices: Sequence[AdapterChoice]) -> list[Mix]:
        """Return the mixes, after loading from the pool what they name and is not loaded yet."""
        mixes = [as_mix(choice) for choice in choices]
        for name in dict.fromkeys(n for mix in mixes for n in mix.names):
            if name not in self.model.names:
                self.load(name)
        return mixes

    def _mixes(self, adapters: Sequence[AdapterChoice] | None, rows: int) -> list[Mix]:
        """Return one mix a row; without `adapters`, the thread's default for all."""
        if adapters is None:
            return [self._default.get()] * rows
        if isinstance(adapters, str):
            raise UsageError(f"adapters={adapters!r} must be a list with one entry per row")
        if len(adapters) != rows:
            raise UsageError(f"{rows} rows but {len(adapters)} adapters: give one per row")
        return self._ready(adapters)

    def _raw(
        self,
        prompts: Sequence[str],
        adapters: Sequence[AdapterChoice] | None,
        sampling: Sampling,
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list of texts, not one text")
        mixes = self._mixes(adapters, len(prompts))
        ids = self.backbone.tokenizer(list(prompts)).input_ids if prompts else []
        return [Request(tuple(i), mix, sampling) for i, mix in zip(ids, mixes, strict=True)]

    def _contract(self, mix: Mix) -> PromptContract | None:
        """Return the contract of the mix's heaviest adapter."""
        if not mix.weights:
            return None
        heaviest = max(mix.weights, key=lambda pair: abs(pair[1]))[0]
        stored = self._stored.get(heaviest)
        return stored.manifest.contract if stored and stored.manifest else None

    def _conversation(
        self, turns: Sequence[Turn], contract: PromptContract | None
    ) -> list[Message]:
        """Return the messages as the adapter was taught to see them."""
        listed = [t if isinstance(t, Message) else _message(t) for t in turns]
        if not listed or listed[-1].role != "user":
            raise UsageError("a conversation must end with a message whose role is 'user'")
        if contract is None or any(m.role == "system" for m in listed):
            return listed
        fields = {primary_field(contract.template): listed[-1].content}
        return messages_of(contract, Example(fields, "", history=tuple(listed[:-1])))


def load_task_or(task: str | Path | Task) -> Task:
    """Return `task` itself, or the task of that name or file."""
    return load_task(task) if isinstance(task, str | Path) else task


def _message(turn: Mapping[str, str]) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UsageError(
            f"message {dict(turn)!r}: it needs a role (system, user or assistant) and a text content"
        )
    return Message(role, content)  # type: ignore[arg-type]


def _fields(contract: PromptContract, given: str | Mapping[str, str], row: int) -> dict[str, str]:
    main = primary_field(contract.template)
    if isinstance(given, str):
        return {main: given}
    fields = {key: str(value) for key, value in given.items()}
    if main not in fields and "text" in fields:
        fields[main] = fields["text"]
    if main not in fields:
        raise UsageError(
            f"input {row} has {', '.join(fields) or 'no field'}; the task needs {main!r} (or 'text')"
        )
    return fields


def _configs(
    names: Sequence[str], shared: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> list[TrainConfig]:
    if unknown := [name for name in settings if name not in names]:
        raise UsageError(
            f"settings for {', '.join(unknown)}, which this run does not train; "
            f"it trains {', '.join(names)}"
        )
    return [
        read_settings(TrainConfig, {**shared, **settings.get(name, {})}, f"settings of {name!r}")
        for name in names
    ]


def _own_tasks(
    named: Sequence[tuple[str, Mix]], stored: Mapping[str, Stored]
) -> list[tuple[Task, list[tuple[str, Mix]]]]:
    groups: dict[str, list[tuple[str, Mix]]] = {}
    for name, mix in named:
        manifest = stored[name].manifest if name in stored else None
        if manifest is None or not manifest.training.tasks:
            raise UsageError(
                f"adapter {name!r} does not say what it was trained on; name the tasks"
            )
        for task in manifest.training.tasks:
            groups.setdefault(task, []).append((name, mix))
    return [(load_task(task), group) for task, group in groups.items()]


def _sample(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return `limit` examples drawn without replacement (all when 0), in their old order."""
    if not limit or limit >= len(examples):
        return list(examples)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(examples), generator=generator)[:limit]
    return [examples[i] for i in sorted(chosen.tolist())]


def _limited(examples: Sequence[Example], limit: int) -> list[Example]:
    return _sample(examples, limit, seed=0)


def _base_model(name: str) -> str:
    """Return the Hub id that plain PEFT users load: a packaged backbone's upstream, else the name."""
    asset = ASSETS.get(name)
    return getattr(asset, "upstream", "") or name


__all__ = ["AdapterHub", "AdapterInfo", "Prediction", "Verdict"]
