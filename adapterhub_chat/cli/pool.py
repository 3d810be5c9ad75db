"""The verbs of the pool: list, show, eval and verify."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.artifact.card import render_card
from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.cli.options import (
    DEFAULT_HUB,
    HubOptions,
    JsonOption,
    LimitOption,
    PoolOption,
    with_backbone,
    with_engine,
)
from adapterhub_chat.cli.output import (
    Bars,
    Notes,
    adapter_row,
    err,
    print_json,
    print_message,
    print_scores,
    print_table,
)
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.pool.index import PoolIndex


@with_backbone
@with_engine
def evaluate(
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapters, or 'backbone' (repeat the option; default: all of the pool)."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Tasks (repeat the option; default: those of each adapter)."),
    ] = None,
    limit: LimitOption = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the scores in the adapters' manifests and cards.")
    ] = False,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Score adapters on test splits, with 95 % intervals and the backbone on the same items.

    Adapters that cannot be loaded here are listed with the reason, and the exit code is 1.
    """
    hub = hub_options.open(Notes(quiet=as_json))
    refused: dict[str, str] = {}
    with Bars(err, show=not as_json) as bars:
        listeners = replace(bars.listeners, on_refused=refused.__setitem__)
        scores = hub.evaluate(
            adapter or None, task or None, limit=limit, save=save, listeners=listeners
        )
    if as_json:
        print_json(
            {"scores": [asdict(s) for s in scores], **({"refused": refused} if refused else {})}
        )
    else:
        print_scores("Test split", scores)
    for reason in refused.values():
        print_message("refused", reason)
    raise typer.Exit(1 if refused else 0)


def list_adapters(pool: PoolOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the adapters of the pool with their scores."""
    pool_index, damaged = PoolIndex(pool), {}
    manifests: dict[str, Manifest | None] = {}
    for name in pool_index.names():
        try:
            manifests[name] = pool_index.manifest(name)
        except AdapterError as error:
            damaged[name] = str(error)
    if as_json:
        dumped = {n: m.summary() if m else None for n, m in manifests.items()}
        print_json({"adapters": dumped, "damaged": damaged})
        return
    for problem in damaged.values():
        print_message("damaged", problem)
    if not manifests:
        print_message("note", f"there are no adapters in {pool}", "yellow")
        return
    columns = ("adapter", "task", "metric", "score", "backbone", "made on")
    print_table(str(pool), columns, [adapter_row(n, m) for n, m in manifests.items()])


def show(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    pool: PoolOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's card, or with --json its manifest."""
    pool_index = PoolIndex(pool)
    path = pool_index.path(adapter)
    manifest = pool_index.manifest(adapter)
    if as_json:
        print_json(manifest.summary() if manifest else {"status": "unverified"})
    elif manifest is None:
        typer.echo(f"{path}: no adapterhub.json; made by plain PEFT, nothing about it is verified")
    else:
        typer.echo(render_card(manifest))


@with_backbone
def verify(
    path: Annotated[str, typer.Argument(help="Adapter of the pool, or a folder.")],
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter against the backbone: bytes, shapes, fingerprint, probe. Exit 0 only when ok."""
    hub = hub_options.open(Notes(quiet=True))
    verdict = hub.verify(path)
    if as_json:
        print_json(asdict(verdict))
    else:
        typer.echo("\n  - ".join([f"{path}: {verdict.status}", *verdict.problems]))
    raise typer.Exit(0 if verdict.ok else 1)
