"""`bench train`: joint training of several adapters, compared with PEFT in sequence and a lower bound.

here: K adapters jointly. one: one adapter with the same number of rows a step. floor: forward and backward to
the inputs on the same packed tokens without adapters, the lower bound. peft: PEFT with a plain training loop
on the same examples in the same steps, padded to the longest of a step, one adapter after another.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from adapterhub_chat.bench.harness import Worker, interleaved, machine, median, serve
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.metrics import bootstrap_interval, mean_loss, paired_difference
from adapterhub_chat.data.packing import epochs, pack
from adapterhub_chat.data.task import load_task
from adapterhub_chat.inference.likelihood import sequence_losses, token_losses
from adapterhub_chat.lora.sites import linear_shapes
from adapterhub_chat.lora.weights import initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.devices import peak_memory, pick_dtype
from adapterhub_chat.training.job import Job, make_job
from adapterhub_chat.training.learner import schedule
from adapterhub_chat.training.loop import TrainingRun
from adapterhub_chat.types import as_mix

BENCH_TASKS = ("sentiment", "qa", "generation")
PAD_STEP = 16
"""PEFT's batches are padded to a multiple of this: few shapes are faster on a CPU."""

TrainWork = Callable[[], Mapping[str, Any]]


def bench_train(  # noqa: PLR0913 - the settings of the run
    *,
    backbone: str = "smollm2-135m",
    dtype: str | None = None,
    tasks: Sequence[str] = BENCH_TASKS,
    adapters: int = 4,
    rank: int = 16,
    rows_per_step: int = 2,
    row_length: int = 256,
    steps: int = 2,
    repeats: int = 3,
    flat: Sequence[int] = (1, 16),
) -> dict[str, Any]:
    """Return rows and ratios; `flat` are the numbers of adapters whose cost of an example is compared.

    `dtype` None is the fastest one; in "fp32" both sides should reach equal losses.
    """
    pick_dtype(dtype, torch.device("cpu"))  # raises for an unknown dtype, before any process starts
    settings = {
        "backbone": backbone,
        "dtype": dtype,
        "tasks": list(tasks),
        "adapters": adapters,
        "rank": rank,
        "rows_per_step": rows_per_step,
        "row_length": row_length,
        "steps": steps,
        "total_steps": steps * (repeats + 1),
    }
    kinds = ["here", "one", "floor"] + ["peft"] * (importlib.util.find_spec("peft") is not None)
    workers = [Worker(__name__, kind, settings) for kind in kinds]
    answers_by_kind = interleaved(workers, repeats)
    ends = {worker.kind: worker.measure("end") for worker in workers}
    for worker in workers:
        worker.close()
    rows = [_row(kind, answers, ends[kind]) for kind, answers in answers_by_kind.items()]
    row_by_kind = {row["kind"]: row for row in rows}
    our_seconds = row_by_kind["here"]["seconds"]
    ratios: dict[str, float | None] = {
        "speedup_over_peft": row_by_kind["peft"]["seconds"] / our_seconds
        if "peft" in row_by_kind
        else None,
        "fraction_of_floor": row_by_kind["floor"]["seconds"] / our_seconds,
        "memory_over_one": row_by_kind["here"]["peak_bytes"] / row_by_kind["one"]["peak_bytes"],
    }
    if len(flat) > 1:
        costs = _cost_by_count(settings, flat, repeats)
        rows += costs
        first, last = costs[0]["seconds_per_example"], costs[-1]["seconds_per_example"]
        ratios[f"cost_{flat[-1]}_over_{flat[0]}"] = last / first
    return {
        "bench": "train",
        "machine": machine(),
        "settings": {**settings, "repeats": repeats},
        "rows": rows,
        "ratios": ratios,
        "validation": _compare_losses(ends),
    }


def _compare_losses(ends: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each adapter's validation loss, here and with PEFT, and the paired difference.

    A loss is the mean over the answers' tokens; intervals of 95 % resample the examples.
    """
    if "peft" not in ends:
        return {}
    comparisons = {}
    for name, ours in ends["here"]["validation"].items():
        theirs = ends["peft"]["validation"][name]
        difference, low, high = paired_difference(ours, theirs, mean_loss)
        comparisons[name] = {
            "here": _loss(ours),
            "peft": _loss(theirs),
            "difference": {"loss": difference, "low": low, "high": high},
        }
    return comparisons


def _loss(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    low, high = bootstrap_interval(rows, mean_loss)
    return {"loss": float(mean_loss(rows)), "low": low, "high": high}


def _row(kind: str, answers: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> dict[str, Any]:
    seconds = median(answers, "seconds")
    return {
        "kind": kind,
        "seconds": seconds,
        "tokens_per_second": median(answers, "tokens") / seconds,
        "examples_per_second": median(answers, "examples") / seconds,
        "peak_bytes": end["peak_bytes"],
        "losses": answers[-1].get("losses", {}),
    }


def _cost_by_count(
    settings: Mapping[str, Any], counts: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Return the cost of an example for each number of adapters in the run.

    All learn the first task and share the same number of rows; only the number of adapters differs.
    """
    rows = max(counts)
    base_settings = {**settings, "tasks": settings["tasks"][:1]}
    settings_by_count = [
        {**base_settings, "adapters": n, "rows_per_step": rows // n} for n in counts
    ]
    workers = [Worker(__name__, "here", each) for each in settings_by_count]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(repeats):
        for worker, each in zip(workers, times, strict=True):
            done = worker.measure()
            each.append(done["seconds"] / done["examples"])
    for worker in workers:
        worker.close()
    return [
        {
            "kind": f"{n} adapters",
            "adapters": n,
            "seconds_per_example": sorted(each)[len(each) // 2],
        }
        for n, each in zip(counts, times, strict=True)
    ]


# ---- the workers ---------------------------------------------------------------------------------


def train_worker() -> None:
    """Run as the worker whose kind the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    backbone = load_backbone(settings["backbone"], dtype=settings.get("dtype"))
    work, end = TRAIN_WORKERS[kind](backbone, settings)
    work()  # a first step sets up shapes and memory

    def answer(what: str) -> Mapping[str, Any]:
        if what == "end":
            return {"peak_bytes": peak_memory(backbone.device), **end()}
        started = time.perf_counter()
        result = work()
        return {**result, "seconds": time.perf_counter() - started}

    serve(answer, {"dtype": str(backbone.dtype), "threads": torch.get_num_threads()})


def jobs_of(backbone: Any, settings: Mapping[str, Any]) -> list[Job]:
    """Return the training jobs; the tasks take turns."""
    jobs = []
    for n in range(settings["adapters"]):
        task = load_task(settings["tasks"][n % len(settings["tasks"])])
        config = TrainConfig(
            rank=settings["rank"],
            alpha=2.0 * settings["rank"],
            rows_per_step=settings["rows_per_step"],
            row_length=settings["row_length"],
            learning_rate=5e-4,
            warmup=0.25,
            train_examples=1000,
            eval_examples=48,
            eval_every=10**9,  # validation is not timed
            epochs=1e6,
            max_steps=settings["total_steps"] + 1,  # the last step would validate
            seed=n,
        )
        jobs.append(make_job(backbone.tokenizer, f"{task.name}-{n}", task, config))
    return jobs


def tokens_of(examples: Sequence[Encoded]) -> dict[str, int]:
    """Return the numbers of trained tokens and examples."""
    return {"tokens": sum(e.num_inputs for e in examples), "examples": len(examples)}


def ours_train(backbone: Any, settings: Mapping[str, Any]) -> tuple[TrainWork, TrainWork]:
    """Train all adapters jointly."""
    training_run = TrainingRun(AdapterModel(backbone), jobs_of(backbone, settings))
    return _joint(training_run, settings["steps"])


def single_train(backbone: Any, settings: Mapping[str, Any]) -> tuple[TrainWork, TrainWork]:
    """Train one adapter on as many rows a step as all adapters have together."""
    rows = settings["rows_per_step"] * settings["adapters"]
    single_settings = {**settings, "adapters": 1, "rows_per_step": rows}
    training_run = TrainingRun(AdapterModel(backbone), jobs_of(backbone, single_settings))
    return _joint(training_run, settings["steps"])


def _joint(run: TrainingRun, steps: int) -> tuple[TrainWork, TrainWork]:
    learners = [learner for family in run.families for learner in family.learners]
    losses: dict[str, float] = {}
    run.on_event = lambda event: losses.update({event.adapter: event.values["loss"]})
    learnt: list[Encoded] = []
    for family in run.families:
        family.draw = _recording_draw(family.draw, learnt)  # type: ignore[method-assign]

    def work() -> Mapping[str, Any]:
        learnt.clear()
        for _ in range(steps):
            run.step()
        return {**tokens_of(learnt), "losses": dict(losses)}

    def end() -> Mapping[str, Any]:
        rows_by_adapter = {}
        for learner in learners:
            name, examples = learner.job.name, learner.job.validation
            run.model.load(name, learner.weights())
            losses = sequence_losses(run.model, examples, as_mix(name)).flatten().tolist()
            rows_by_adapter[name] = _rows(examples, losses)
        return {"validation": rows_by_adapter}

    return work, end


def _rows(examples: Sequence[Encoded], losses: Sequence[float]) -> list[list[float]]:
    """Return each example's summed loss and how many tokens its answer has."""
    lengths = [float(len(e.continuations[0])) for e in examples]
    return [list(row) for row in zip(losses, lengths, strict=True)]


def _recording_draw(draw: Callable[[], Any], learnt: list[Encoded]) -> Callable[[], Any]:
    def drawn() -> Any:
        parts = draw()
        learnt.extend(e for part in parts for row in part.rows for e in row)
        return parts

    return drawn


def floor_train(backbone: Any, settings: Mapping[str, Any]) -> tuple[TrainWork, TrainWork]:
    """Run the frozen backbone forward and back to its inputs, on the same packed tokens."""
    model = AdapterModel(backbone)
    embeddings = backbone.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    streams = _row_streams(jobs_of(backbone, settings))

    def work() -> Mapping[str, Any]:
        learnt: list[Encoded] = []
        for _ in range(settings["steps"]):
            rows = [row for stream in streams for row in next(stream)]
            batch = pack(rows, settings["row_length"])
            targets = batch.targets.to(backbone.device)
            token_losses(model.answer_logits(batch), targets).mean().backward()
            learnt += [e for row in rows for e in row]
        return tokens_of(learnt)

    return work, dict


def peft_train(backbone: Any, settings: Mapping[str, Any]) -> tuple[TrainWork, TrainWork]:
    """Train the adapters with PEFT, one after another, each step's examples padded to the longest."""
    jobs = jobs_of(backbone, settings)
    model = _peft_model(backbone, jobs)
    parts = []
    for n, stream in enumerate(_row_streams(jobs)):
        model.set_adapter(str(n))
        parameters = [p for p in model.parameters() if p.requires_grad]
        parts.append((parameters, stream, torch.optim.AdamW(parameters, weight_decay=0.0)))

    def moved(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = padded(examples, backbone.tokenizer.pad_token_id)
        return {name: tensor.to(backbone.device) for name, tensor in batch.items()}

    steps_done = 0

    def work() -> Mapping[str, Any]:
        nonlocal steps_done
        learnt: list[Encoded] = []
        losses = {}
        model.train()
        for n, (job, (parameters, stream, optimizer)) in enumerate(zip(jobs, parts, strict=True)):
            model.set_adapter(str(n))
            for step in range(steps_done, steps_done + settings["steps"]):
                examples = [e for row in next(stream) for e in row]
                loss = model(**moved(examples)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, job.config.clip)
                part = 1 / job.config.max_steps
                share = schedule(step * part, part, job.config)
                optimizer.param_groups[0]["lr"] = share * job.config.learning_rate
                optimizer.step()
                optimizer.zero_grad()
                learnt += examples
            losses[job.name] = float(loss.detach())
        steps_done += settings["steps"]
        return {**tokens_of(learnt), "losses": losses}

    @torch.no_grad()
    def end() -> Mapping[str, Any]:
        model.eval()
        rows_by_adapter = {}
        for n, job in enumerate(jobs):
            model.set_adapter(str(n))
            losses: list[float] = []
            for start in range(0, len(job.validation), 16):
                batch = moved(job.validation[start : start + 16])
                labels = batch.pop("labels")[:, 1:]
                logits = model(**batch).logits[:, :-1].float()
                token_loss_rows = functional.cross_entropy(logits.mT, labels, reduction="none")
                losses += token_loss_rows.sum(1).tolist()
            rows_by_adapter[job.name] = _rows(job.validation, losses)
        return {"validation": rows_by_adapter}

    return work, end


def _peft_model(backbone: Any, jobs: Sequence[Job]) -> Any:
    """Return PEFT's model with an adapter for each job, with the same initial weights as here."""
    peft: Any = importlib.import_module("peft")
    backbone.model.set_attn_implementation("sdpa")
    shapes, model = linear_shapes(backbone.model), None
    for n, config in enumerate(job.config for job in jobs):
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules="all-linear",
        )
        options = {"adapter_name": str(n), "autocast_adapter_dtype": False}
        if model is None:
            model = peft.get_peft_model(backbone.model, lora, **options)
        else:
            model.add_adapter(peft_config=lora, **options)
        start = initial_weights(shapes, rank=config.rank, alpha=config.alpha, seed=config.seed)
        for module, (a, _) in start.factors.items():
            layer = model.get_base_model().get_submodule(module)
            layer.lora_A[str(n)].weight.data.copy_(a)
    return model


def padded(examples: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Return one example a row, padded on the right, with labels on the answers' tokens alone."""
    pairs = [(example.prompt, example.continuations[0]) for example in examples]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    shape = len(pairs), -(-longest // PAD_STEP) * PAD_STEP
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _row_streams(jobs: Sequence[Job]) -> list[Any]:
    return [
        epochs(
            job.train,
            num_rows=job.config.rows_per_step,
            length=job.config.row_length,
            seed=job.config.seed,
        )
        for job in jobs
    ]


TRAIN_WORKERS: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[TrainWork, TrainWork]]] = {
    "here": ours_train,
    "one": single_train,
    "floor": floor_train,
    "peft": peft_train,
}

if __name__ == "__main__":
    train_worker()
