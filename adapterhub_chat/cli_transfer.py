"""The verb that makes an adapter for a target out of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.opening import open_hub
from adapterhub_chat.options import (
    BackboneOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PoolOption,
    QuantizeOption,
)
from adapterhub_chat.progress import Bars
from adapterhub_chat.terminal import Say, err, print_json, print_table
from adapterhub_chat.transfer.select import Verdict
from adapterhub_chat.transferring import Transferred


def transfer(
    source: Annotated[str, typer.Option(help="Adapter of the pool, or a folder.")],
    target: Annotated[str, typer.Option(help="Task: a name from tasks/, or a .py or .toml file.")],
    method: Annotated[str, typer.Option(help="auto, target, finetune, stack or maxent.")] = "auto",
    shots: Annotated[int, typer.Option(min=0, help="Labelled target examples to learn from.")] = 16,
    name: Annotated[
        str | None, typer.Option(help="Its name in the pool.", show_default="TARGET-from-SOURCE")
    ] = None,
    source_task: Annotated[
        str | None, typer.Option(help="The source's task.", show_default="its manifest's")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Training steps of every method.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the shots, the weights, the rows.")] = 0,
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("adapters"),
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter for a target out of a source: every method, one budget, judged; never worse unsaid."""
    hub = open_hub(backbone, pool, quantize, dtype, device, Say(quiet=as_json))
    with Bars(err, show=not as_json) as bars:
        done = hub.transfer(
            source,
            target,
            method,
            name=name,
            shots=shots,
            source_task=source_task,
            max_steps=max_steps,
            seed=seed,
            listeners=bars.listeners,
        )
    if as_json:
        print_json(_as_json(done))
        return
    rows = [
        (c.method, f"{c.value:.3f}", c.verdict.word, _interval(c.verdict))
        for c in done.outcome.candidates.values()
    ]
    title = f"{target} from {source}, {shots} shots, beside {done.outcome.baseline}"
    print_table(title, ("candidate", "value", "verdict", "gain (95 % interval)"), rows)
    if done.manifest is None:
        typer.echo("Nothing is better than the backbone alone; no adapter was made.")
    else:
        typer.echo(f"{done.manifest.name} ({done.outcome.chosen}) is in {pool}.")


def _interval(verdict: Verdict) -> str:
    return f"{verdict.gain:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"


def _as_json(done: Transferred) -> dict[str, object]:
    weighting = done.outcome.weighting
    return {
        "chosen": done.outcome.chosen,
        "baseline": done.outcome.baseline,
        "seconds": done.outcome.seconds,
        "effective": weighting.effective if weighting else None,
        "candidates": [
            {
                "method": c.method,
                "value": c.value,
                "verdict": c.verdict.word,
                "gain": c.verdict.gain,
                "low": c.verdict.low,
                "high": c.verdict.high,
            }
            for c in done.outcome.candidates.values()
        ],
        "manifest": done.manifest.shown() if done.manifest else None,
    }
