"""`bench train`: several adapters at once, beside plain `peft` one after another, and beside the floor.

here: K adapters jointly. one: one adapter with the same rows a step. floor: the same forward on the same
packed tokens and the backward to the inputs, with no adapters. peft: `peft` and a plain, competent loop:
the same examples in the same steps, padded to the longest of each, one adapter after another.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapterhub_chat.backbone import load_backbone, peak_memory
from adapterhub_chat.batches import epochs, pack
from adapterhub_chat.bench import Worker, interleaved, machine, median, serve
from adapterhub_chat.config import TrainConfig
from adapterhub_chat.jobs import Job, make_job
from adapterhub_chat.losses import token_losses
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.task import load_task
from adapterhub_chat.template import Encoded
from adapterhub_chat.train import Run

TASKS = ("sentiment", "qa", "generation")
PAD_STEP = 16
"""The reference's batches are padded to a multiple of this: few shapes cost a CPU less."""

Work = Callable[[], Mapping[str, Any]]


def bench_train(
    *,
    backbone: str = "smollm2-135m",
    tasks: Sequence[str] = TASKS,
    adapters: int = 4,
    rank: int = 16,
    rows_per_step: int = 2,
    row_length: int = 256,
    steps: int = 2,
    repeats: int = 3,
    flat: Sequence[int] = (1, 16),
) -> dict[str, Any]:
    """Return the table and the ratios; `flat` are the numbers of adapters whose cost is compared."""
    settings = {
        "backbone": backbone,
        "tasks": list(tasks),
        "adapters": adapters,
        "rank": rank,
        "rows_per_step": rows_per_step,
        "row_length": row_length,
        "steps": steps,
    }
    kinds = ["here", "one", "floor"] + ["peft"] * (importlib.util.find_spec("peft") is not None)
    workers = [Worker(__name__, kind, settings) for kind in kinds]
    found = interleaved(workers, repeats)
    ends = {worker.kind: worker.measure("end") for worker in workers}
    for worker in workers:
        worker.close()
    rows = [_row(kind, answers, ends[kind]) for kind, answers in found.items()]
    by = {row["kind"]: row for row in rows}
    ratios: dict[str, float | None] = {
        "speedup_over_peft": by["peft"]["seconds"] / by["here"]["seconds"]
        if "peft" in by
        else None,
        "fraction_of_floor": by["floor"]["seconds"] / by["here"]["seconds"],
        "memory_over_one": by["here"]["peak_bytes"] / by["one"]["peak_bytes"],
    }
    if len(flat) > 1:
        costs = _flat(settings, flat, repeats)
        rows += costs
        first, last = costs[0]["seconds_per_example"], costs[-1]["seconds_per_example"]
        ratios[f"cost_{flat[-1]}_over_{flat[0]}"] = last / first
    return {
        "bench": "train",
        "machine": machine(),
        "settings": {**settings, "repeats": repeats},
        "rows": rows,
        "ratios": ratios,
    }


def _row(kind: str, answers: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> dict[str, Any]:
    seconds = median(answers, "seconds")
    return {
        "kind": kind,
        "seconds": seconds,
        "tokens_per_second": median(answers, "tokens") / seconds,
        "examples_per_second": median(answers, "examples") / seconds,
        "peak_bytes": end["peak_bytes"],
        "losses": answers[-1].get("losses", {}),
        "validation": end.get("validation", {}),
    }


def _flat(settings: Mapping[str, Any], counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Return the cost of an example with so many adapters in the run.

    All learn the first task, and share out the same number of rows: only the number of adapters differs.
    """
    rows = max(counts)
    alike = {**settings, "tasks": settings["tasks"][:1]}
    workers = [
        Worker(__name__, "here", {**alike, "adapters": n, "rows_per_step": rows // n})
        for n in counts
    ]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(repeats):
        for worker, own in zip(workers, times, strict=True):
            done = worker.measure()
            own.append(done["seconds"] / done["examples"])
    for worker in workers:
        worker.close()
    return [
        {"kind": f"{n} adapters", "adapters": n, "seconds_per_example": sorted(own)[len(own) // 2]}
        for n, own in zip(counts, times, strict=True)
    ]


# ---- the workers ---------------------------------------------------------------------------------


def main() -> None:
    """Be a worker of the kind that the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    backbone = load_backbone(settings["backbone"])
    work, end = KINDS[kind](backbone, settings)
    work()  # a first step sets up shapes and memory

    def told(what: str) -> Mapping[str, Any]:
        if what == "end":
            return {**end(), "peak_bytes": peak_memory(backbone.device)}
        started = time.perf_counter()
        done = work()
        return {**done, "seconds": time.perf_counter() - started}

    serve(told, {"dtype": str(backbone.dtype), "threads": torch.get_num_threads()})


def jobs_of(backbone: Any, settings: Mapping[str, Any]) -> list[Job]:
    """Return the adapters to train, the tasks in turn."""
    jobs = []
    for n in range(settings["adapters"]):
        task = load_task(settings["tasks"][n % len(settings["tasks"])])
        config = TrainConfig(
            rank=settings["rank"],
            alpha=2.0 * settings["rank"],
            rows_per_step=settings["rows_per_step"],
            row_length=settings["row_length"],
            learning_rate=5e-4,
            schedule="constant",
            warmup=0.0,
            train_examples=1000,
            eval_examples=48,
            epochs=1e6,
            seed=n,
        )
        jobs.append(make_job(backbone.tokenizer, f"{task.name}-{n}", task, config))
    return jobs


def tokens_of(examples: Sequence[Encoded]) -> dict[str, int]:
    """Return how many tokens and examples were learnt from."""
    return {"tokens": sum(e.num_inputs for e in examples), "examples": len(examples)}


def here(backbone: Any, settings: Mapping[str, Any]) -> tuple[Work, Work]:
    """Train all adapters jointly."""
    run = Run(AdapterModel(backbone), jobs_of(backbone, settings))
    return _joint(run, settings["steps"])


def one(backbone: Any, settings: Mapping[str, Any]) -> tuple[Work, Work]:
    """Train one adapter on as many rows a step as all of them have together."""
    rows = settings["rows_per_step"] * settings["adapters"]
    alone = {**settings, "adapters": 1, "rows_per_step": rows}
    run = Run(AdapterModel(backbone), jobs_of(backbone, alone))
    return _joint(run, settings["steps"])


def _joint(run: Run, steps: int) -> tuple[Work, Work]:
    learners = [learner for family in run.families for learner in family.learners]
    losses: dict[str, float] = {}
    run.on_event = lambda event: losses.update({event.adapter: event.values["loss"]})
    learnt: list[Encoded] = []
    for family in run.families:
        family.draw = _noted(family.draw, learnt)  # type: ignore[method-assign]

    def work() -> Mapping[str, Any]:
        learnt.clear()
        for _ in range(steps):
            run.step()
        return {**tokens_of(learnt), "losses": dict(losses)}

    def end() -> Mapping[str, Any]:
        return {"validation": {x.job.name: run.held_out_loss(x) for x in learners}}

    return work, end


def _noted(draw: Callable[[], Any], learnt: list[Encoded]) -> Callable[[], Any]:
    def drawn() -> Any:
        parts = draw()
        learnt.extend(e for part in parts for row in part.rows for e in row)
        return parts

    return drawn


def floor(backbone: Any, settings: Mapping[str, Any]) -> tuple[Work, Work]:
    """Run the frozen backbone forward and back to its inputs, on the same packed tokens."""
    model = AdapterModel(backbone)
    embeddings = backbone.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    streams = _streams(jobs_of(backbone, settings))

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


def peft(backbone: Any, settings: Mapping[str, Any]) -> tuple[Work, Work]:
    """Train the adapters with `peft`, one after another, each step's examples padded to the longest."""
    library: Any = importlib.import_module("peft")
    backbone.model.set_attn_implementation("sdpa")
    jobs = jobs_of(backbone, settings)
    lora = library.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=2 * settings["rank"],
        target_modules="all-linear",
    )
    model = library.get_peft_model(
        backbone.model, lora, adapter_name="0", autocast_adapter_dtype=False
    )
    for n in range(1, len(jobs)):
        model.add_adapter(str(n), lora, autocast_adapter_dtype=False)
    parts = []
    for n, (job, stream) in enumerate(zip(jobs, _streams(jobs), strict=True)):
        model.set_adapter(str(n))
        parameters = [p for p in model.parameters() if p.requires_grad]
        rate = job.config.learning_rate
        parts.append((parameters, stream, torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)))

    def moved(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = padded(examples, backbone.tokenizer.pad_token_id)
        return {name: tensor.to(backbone.device) for name, tensor in batch.items()}

    def work() -> Mapping[str, Any]:
        learnt: list[Encoded] = []
        losses = {}
        model.train()
        for n, (job, (parameters, stream, optimizer)) in enumerate(zip(jobs, parts, strict=True)):
            model.set_adapter(str(n))
            for _ in range(settings["steps"]):
                examples = [e for row in next(stream) for e in row]
                loss = model(**moved(examples)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, job.config.clip)
                optimizer.step()
                optimizer.zero_grad()
                learnt += examples
            losses[job.name] = float(loss.detach())
        return {**tokens_of(learnt), "losses": losses}

    @torch.no_grad()
    def end() -> Mapping[str, Any]:
        model.eval()
        found = {}
        for n, job in enumerate(jobs):
            model.set_adapter(str(n))
            total = count = 0.0
            for start in range(0, len(job.validation), 16):
                examples = job.validation[start : start + 16]
                tokens = sum(len(e.continuations[0]) for e in examples)
                total += float(model(**moved(examples)).loss) * tokens
                count += tokens
            found[job.name] = total / count
        return {"validation": found}

    return work, end


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


def _streams(jobs: Sequence[Job]) -> list[Any]:
    return [
        epochs(
            job.train,
            num_rows=job.config.rows_per_step,
            length=job.config.row_length,
            seed=job.config.seed,
        )
        for job in jobs
    ]


KINDS: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[Work, Work]]] = {
    "here": here,
    "one": one,
    "floor": floor,
    "peft": peft,
}

if __name__ == "__main__":
    main()
