"""The verbs `transfer` and `flatten`: an adapter for a target task from a source adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.cli.options import DEFAULT_HUB, HubOptions, JsonOption, with_backbone
from adapterhub_chat.cli.output import Bars, Notes, err, print_json, print_table
from adapterhub_chat.data.readers import read_rows
from adapterhub_chat.errors import UsageError
from adapterhub_chat.report.transfer import write_report
from adapterhub_chat.transfer.gate import TransferVerdict
from adapterhub_chat.transfer.methods import METHODS
from adapterhub_chat.transfer.ranking import Ranked
from adapterhub_chat.transfer.run import Transferred


@with_backbone
def transfer(
    target: Annotated[
        str,
        typer.Option(
            help="Task: a name from tasks/, a .py or .toml file, or a table (.csv, ...) with a column label."
        ),
    ],
    source: Annotated[
        str | None, typer.Option(help="Adapter of the pool, or a folder.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help=f"auto, {', '.join(METHODS)}.")] = "auto",
    shots: Annotated[int, typer.Option(min=0, help="Labelled target examples to learn from.")] = 16,
    name: Annotated[
        str | None, typer.Option(help="Its name in the pool.", show_default="TARGET-from-SOURCE")
    ] = None,
    source_task: Annotated[
        str | None, typer.Option(help="The source's task.", show_default="its manifest's")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Training steps of every method.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the shots, the weights, the rows.")] = 0,
    unlabelled: Annotated[
        Path | None,
        typer.Option(
            help="Table of the target's texts without labels.",
            show_default="the target's training inputs",
        ),
    ] = None,
    level: Annotated[
        float | None,
        typer.Option(
            help="maxent: mean log-likelihood that the weighted source reaches.",
            show_default="by the effective sample size",
        ),
    ] = None,
    stack_layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks in which a stack's T acts, as a slice: 0:8 are the first.",
            show_default="all",
        ),
    ] = None,
    layer: Annotated[
        int, typer.Option(help="Block whose states adversarial and maxent compare; -1: the last.")
    ] = -1,
    report: Annotated[Path | None, typer.Option(help="Folder for a report with plots.")] = None,
    also: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Another number of shots, for the report alone; repeat it."),
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank", help="Train nothing: rank the pool's adapters as sources.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Stack on a source that hurts all the same.")] = False,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter for a target from a source: all methods with one budget, each with a verdict."""
    if source is None and not rank:
        raise UsageError("--source: name an adapter of the pool, or --rank them all as sources")
    if also and not (report or as_json):
        raise UsageError("--also is for a report alone: give --report FOLDER, or --json")
    hub = hub_options.open(Notes(quiet=as_json))
    if rank or source is None:
        _print_ranking(hub.rank_sources(target, [source] if source else None), target, as_json)
        return
    with Bars(err, show=not as_json) as bars:
        transferred = hub.transfer(
            source,
            target,
            method,
            name=name,
            shots=[shots, *(also or [])],
            source_task=source_task,
            max_steps=max_steps,
            seed=seed,
            unlabelled=None if unlabelled is None else read_rows(unlabelled),
            force=force,
            level=level,
            stack_layers=stack_layers,
            layer=layer,
            listeners=bars.listeners,
        )
    written = None if report is None else write_report(transferred, report)
    if as_json:
        print_json(_as_json(transferred))
        return
    rows = [
        (c.method, f"{c.value:.3f}", c.verdict.word, _interval(c.verdict))
        for c in transferred.outcome.candidates.values()
    ]
    title = f"{target} from {source}, {shots} shots, beside {transferred.outcome.baseline}"
    print_table(title, ("candidate", "value", "verdict", "gain (95 % interval)"), rows)
    if transferred.outcome.proxy:
        typer.echo(f"{transferred.outcome.proxy[0].upper()}{transferred.outcome.proxy[1:]}.")
    if transferred.manifest is None:
        typer.echo("Nothing is better than the backbone alone; no adapter was made.")
    else:
        typer.echo(
            f"{transferred.manifest.name} ({transferred.outcome.chosen}) is in {hub_options.pool}."
        )
    if written:
        typer.echo(f"The report is {written}.")


@with_backbone
def flatten(
    name: Annotated[str, typer.Argument(help="A stack of the pool.")],
    as_name: Annotated[
        str | None, typer.Option("--name", help="Of the plain adapter.", show_default="NAME-flat")
    ] = None,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Save a stack as one plain PEFT adapter, which does not need its source."""
    hub = hub_options.open(Notes(quiet=True))
    manifest = hub.flatten(name, as_name)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        typer.echo(f"{manifest.name} is in {hub_options.pool}.")


def _print_ranking(ranked: Sequence[Ranked], target: str, as_json: bool) -> None:
    if as_json:
        print_json({"target": target, "sources": [asdict(each) for each in ranked]})
        return
    rows = [
        (
            each.adapter,
            f"{each.logme:.4f}",
            f"{each.leep:.4f}",
            "" if each.distance is None else f"{each.distance:.2f}",
        )
        for each in ranked
    ]
    heads = ("adapter", "LogME", "LEEP", "A-distance")
    print_table(f"Sources for {target}, the most promising first", heads, rows)


def _interval(verdict: TransferVerdict) -> str:
    return f"{verdict.gain:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"


def _as_json(transferred: Transferred) -> dict[str, object]:
    weighting, discriminator = transferred.outcome.weighting, transferred.outcome.discriminator
    return {
        "chosen": transferred.outcome.chosen,
        "baseline": transferred.outcome.baseline,
        "proxy": transferred.outcome.proxy,
        "seconds": transferred.outcome.seconds,
        "effective": weighting.effective if weighting else None,
        "lam": weighting.lam if weighting else None,
        "clipped": weighting.clipped if weighting else None,
        "residual": weighting.residual if weighting else None,
        "discriminator": discriminator.recent_accuracy if discriminator else None,
        "candidates": [
            {
                "method": c.method,
                "value": c.value,
                "verdict": c.verdict.word,
                "gain": c.verdict.gain,
                "low": c.verdict.low,
                "high": c.verdict.high,
                "note": c.note,
            }
            for c in transferred.outcome.candidates.values()
        ],
        "by_shots": {
            shots: {
                c.method: {"value": c.value, "verdict": c.verdict.word}
                for c in outcome.candidates.values()
            }
            for shots, outcome in transferred.by_shots.items()
        },
        "manifest": transferred.manifest.summary() if transferred.manifest else None,
    }
