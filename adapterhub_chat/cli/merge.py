"""The verbs `merge` and `export`: several adapters into one, and an adapter into a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.cli.options import DEFAULT_HUB, HubOptions, JsonOption, with_backbone
from adapterhub_chat.cli.output import Bars, Notes, err, number, out, print_json, print_table
from adapterhub_chat.config import MergeOptions
from adapterhub_chat.errors import UsageError
from adapterhub_chat.export.merged_model import FORMS, MOST_DRIFT
from adapterhub_chat.merge.methods import METHODS
from adapterhub_chat.merge.spec import AUTO, LEARN

FIELDS = MergeOptions.model_fields


@with_backbone
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapters of the pool.")],
    name: Annotated[str, typer.Option(help="Name of the new adapter.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}, or {AUTO}.")] = "svd",
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"One number per adapter (0.7,0.3), or {LEARN}.", show_default="the method's own"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="What a source is judged by: ADAPTER=TASK (repeat the option)."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help=FIELDS["rank"].description)] = None,
    density: Annotated[float | None, typer.Option(help=FIELDS["density"].description)] = None,
    seed: Annotated[int, typer.Option(help=FIELDS["seed"].description)] = FIELDS["seed"].default,
    limit: Annotated[int, typer.Option(help=FIELDS["limit"].description)] = FIELDS["limit"].default,
    floor: Annotated[float, typer.Option(help=FIELDS["floor"].description)] = FIELDS[
        "floor"
    ].default,
    budget: Annotated[int, typer.Option(help=FIELDS["budget"].description)] = FIELDS[
        "budget"
    ].default,
    force: Annotated[bool, typer.Option(help=FIELDS["force"].description)] = False,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Merge several adapters into one, and measure what it keeps of each."""
    weight_list = _weights(weights)
    judged_by = dict(_adapter_and_task(text) for text in task or [])
    hub = hub_options.open(Notes(quiet=as_json))
    with Bars(err, show=not as_json) as bars:
        manifest = hub.merge(
            adapters,
            method,
            weight_list,
            name=name,
            tasks=judged_by,
            listeners=bars.listeners,
            rank=rank,
            density=density,
            seed=seed,
            limit=limit,
            floor=floor,
            budget=budget,
            force=force,
        )
    assert manifest.merge is not None
    if as_json:
        adapter_fields = {"adapter": manifest.name, "sha256": manifest.sha256}
        parents = list(manifest.training.parents)
        print_json({**adapter_fields, "parents": parents, **manifest.merge.model_dump(mode="json")})
    else:
        _print_report(manifest, hub_options.pool)


@with_backbone
def export(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    form: Annotated[
        str, typer.Option(help=f"One of {', '.join(FORMS)} (the smallest that is near enough).")
    ] = FORMS[0],
    most_drift: Annotated[
        float, typer.Option(min=0, help="How near auto asks for: nats of KL on probe prompts.")
    ] = MOST_DRIFT,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Write the backbone with an adapter merged into it, as a model folder for plain transformers."""
    hub = hub_options.open(Notes(quiet=as_json))
    exported = hub.export(adapter, folder, form=form, most_drift=most_drift)
    if as_json:
        print_json(
            {"path": str(exported.path), "form": exported.form, "drift": dict(exported.drift)}
        )
        return
    drifts = ", ".join(f"{name} {value:.4f}" for name, value in exported.drift.items())
    typer.echo(
        f"{exported.path}: {exported.form}; drift from {adapter} unmerged (KL, nats): {drifts}"
    )


def _print_report(manifest: Manifest, pool: Path) -> None:
    report = manifest.merge
    assert report is not None
    if report.tried:
        rows = [(t.method, number(t.mean), number(t.lowest)) for t in report.tried]
        print_table("Retention on validation items", ("method", "mean", "lowest"), rows)
    columns = ("source", "task", "metric", "alone", "merged", "kept", "95 % interval", "mix keeps")
    rows_of_sources = [
        (
            retention.adapter,
            retention.task,
            retention.metric,
            number(retention.single),
            number(retention.merged),
            number(retention.value),
            f"{number(retention.low)} to {number(retention.high)}",
            number(mix_retention.value),
        )
        for retention, mix_retention in zip(report.retention, report.mix, strict=True)
    ]
    print_table(f"{manifest.name}: what it keeps of its sources", columns, rows_of_sources)
    drifts = ", ".join(f"{name} {value:.4f}" for name, value in report.drift.items())
    out.print(f"method {report.method}, rank {report.rank}, energy kept {report.energy:.1%}")
    out.print(f"drift on the probe prompts (KL, nats): {drifts}")
    out.print(f"saved to {pool}; {manifest.training.note}", markup=False)


def _weights(text: str | None) -> list[float] | Literal["learn"] | None:
    if text is None:
        return None
    if text == LEARN:
        return LEARN
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--weights {text!r}: give numbers with commas between them, or {LEARN!r}"
        ) from error


def _adapter_and_task(text: str) -> tuple[str, str]:
    adapter, separator, task = text.partition("=")
    if not separator:
        raise UsageError(f"--task {text!r}: say which adapter is judged by it, ADAPTER=TASK")
    return adapter, task
