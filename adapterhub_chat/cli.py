"""The command line: `adapterhub-chat VERB`. Thin: every verb calls one method and prints the result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_chat.benches import BENCHES, told
from adapterhub_chat.card import render_card
from adapterhub_chat.chat import ChatSession
from adapterhub_chat.cli_hub import adopt, keygen, pull, push, search
from adapterhub_chat.cli_merge import export, merge
from adapterhub_chat.cli_route import route
from adapterhub_chat.cli_transfer import flatten, transfer
from adapterhub_chat.config import RunConfig, read_run, read_sweep
from adapterhub_chat.demo import run_demo
from adapterhub_chat.errors import AdapterError, AdapterHubError, UsageError
from adapterhub_chat.lines import read_lines, sink
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.opening import HERE, Where, precision, with_backbone
from adapterhub_chat.options import (
    BackboneOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    PoolOption,
    QuantizeOption,
    with_settings,
)
from adapterhub_chat.orders import carry_out, resumed
from adapterhub_chat.pool import Pool
from adapterhub_chat.progress import Bars
from adapterhub_chat.terminal import (
    Say,
    adapter_row,
    err,
    print_finished,
    print_json,
    print_scores,
    print_table,
    tell,
    tell_warnings_and_logs,
)
from adapterhub_chat.train import first_process, leave
from adapterhub_chat.types import AUTO, BACKBONE

app = typer.Typer(
    help="One frozen backbone, many skills: train, mix, measure and publish LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
"""Exit code after Ctrl-C, typer's too."""


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit code 2."""
    tell_warnings_and_logs()
    try:
        app()
    except AdapterHubError as error:
        tell("error", str(error))
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            tell("interrupted", "what was saved by then is kept")
        raise


@app.command()
def demo(
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("runs/demo"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train qa, generation and sentiment jointly, judge them, swap them, mix them in one batch."""
    say = Say(quiet=as_json)
    say(
        "The main job, small: three adapters trained jointly on one frozen backbone. "
        "A few minutes of training; the adapters shipped in adapters/ had a larger budget."
    )
    hub = Where(backbone, pool, None, dtype, device).open(say)
    with Bars(err, show=not as_json) as bars:
        result = run_demo(hub, listeners=bars.listeners)
    if as_json:
        print_json({**result.as_json(), **precision(hub)})
        return
    scores = [s for m in result.manifests.values() for s in m.scores]
    print_scores("Trained jointly, measured on held-out items", scores)
    for title, rows in (
        ("Hot swap: one question, one adapter after another", result.swapped),
        ("One mixed batch: four rows, four skills, one forward", result.mixed_batch),
    ):
        columns = ("adapter", "prompt", "output")
        print_table(title, columns, [(row.adapter, row.prompt, row.output) for row in rows])
    first = next(iter(result.manifests), BACKBONE)
    typer.echo(f"Done in {result.seconds:.0f} s. The adapters are in {pool}; talk to one:")
    typer.echo(f"  adapterhub-chat chat --pool {pool} --adapter {first}")


@with_settings
def train(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Names from tasks/, or paths of .py or .toml files.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML of a run: [settings] and [adapters.NAME] tables.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Adapter names, one per task (repeat the option).")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Values to try, the best is kept: rank=4,8 (repeat the option)."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(show_default="smollm2-135m")] = None,
    pool: Annotated[Path | None, typer.Option(show_default="adapters")] = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of log and state.", show_default="runs/<time>")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run-dir, as it was ordered.")
    ] = False,
    as_json: JsonOption = False,
    *,
    run_options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Train one adapter per task, jointly or one after another; save and measure them."""
    say = Say(quiet=as_json or not first_process())
    flags = {
        **run_options,
        "backbone": backbone,
        "pool": str(pool) if pool else None,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
    }
    if resume:
        named = {"a task": tasks, "--config": config, "--name": name, "--sweep": sweep}
        given = [what for what, value in {**named, **flags, **settings}.items() if value]
        run = resumed(run_dir, given)
    else:
        run = read_run(config, tasks or [], name or [], flags, settings, read_sweep(sweep or []))
    folder = run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    hub = Where(run.backbone, Path(run.pool), run.quantize, run.dtype, run.device).open(say)
    with Bars(err, show=not say.quiet) as bars:
        done = carry_out(hub, run, folder, resume=resume, listeners=bars.listeners)
    first = first_process()
    leave()
    if first:
        if as_json:
            print_json({n: m.shown() for n, m in done.manifests.items()})
        else:
            print_finished(done, run.pool, folder, say)
        raise typer.Exit(_training_code(run, done.manifests))


def _training_code(run: RunConfig, manifests: Mapping[str, Manifest]) -> int:
    """Return INTERRUPTED after Ctrl-C, 1 when an adapter learnt nothing and was not saved, else 0."""
    if any(m.training.stopped == "interrupted" for m in manifests.values()):
        return INTERRUPTED
    grows = run.how == "sequence" and run.grow
    return int(len(manifests) < (1 if grows else len(run.adapters) + (run.how == "shared")))


app.command("train")(train)


@app.command("eval")
@with_backbone
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
    where: Where = HERE,
    as_json: JsonOption = False,
) -> None:
    """Score adapters on test splits, with 95 % intervals and the backbone on the same items."""
    hub = where.open(Say(quiet=as_json))
    with Bars(err, show=not as_json) as bars:
        scores = hub.evaluate(
            adapter or None, task or None, limit=limit, save=save, listeners=bars.listeners
        )
    if as_json:
        print_json({"scores": [asdict(s) for s in scores]})
    else:
        print_scores("Test split", scores)


@app.command()
@with_backbone
def predict(
    adapter: Annotated[str, typer.Option(help="Adapter, or 'backbone'.")],
    input_: Annotated[str, typer.Option("--input", help="JSON lines; - is standard input.")] = "-",
    output: Annotated[str, typer.Option(help="JSON lines; - is standard output.")] = "-",
    task: Annotated[
        str | None, typer.Option(help="Prompt and judge by this task, not by the adapter's own.")
    ] = None,
    where: Where = HERE,
) -> None:
    """Answer JSON lines {"text": ...} (or the task's own fields), in the same order."""
    rows = read_lines(input_)
    hub = where.open(Say(quiet=True))
    with sink(output) as file, Bars(err, show=err.is_terminal) as bars:
        for found in hub.predict(adapter, rows, task=task, listeners=bars.listeners):
            file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")


@app.command()
@with_backbone
def chat(
    adapter: Annotated[
        str, typer.Option(help="Who answers first, or 'auto'; /use NAME changes it.")
    ] = BACKBONE,
    where: Where = HERE,
) -> None:
    """Talk in the terminal: /use NAME, /mix a=0.5 b=0.5, /list, /reset, /quit."""
    hub = where.open(Say(quiet=False))
    session = ChatSession(hub, write=lambda text: typer.echo(text, nl=False))
    session.use(adapter)
    typer.echo("Type a message; /help lists the commands.")
    while not session.ended:
        try:
            line = input(f"{AUTO if session.auto else session.mix}> ")
        except EOFError:
            typer.echo()
            break
        session.handle(line)


@app.command("list")
def list_adapters(pool: PoolOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the adapters of the pool with their scores."""
    folder, damaged = Pool(pool), {}
    manifests: dict[str, Manifest | None] = {}
    for name in folder.names():
        try:
            manifests[name] = folder.manifest(name)
        except AdapterError as error:
            damaged[name] = str(error)
    if as_json:
        dumped = {n: m.shown() if m else None for n, m in manifests.items()}
        print_json({"adapters": dumped, "damaged": damaged})
        return
    for problem in damaged.values():
        tell("damaged", problem)
    if not manifests:
        tell("note", f"there are no adapters in {pool}", "yellow")
        return
    columns = ("adapter", "task", "metric", "score", "backbone", "made on")
    print_table(str(pool), columns, [adapter_row(n, m) for n, m in manifests.items()])


@app.command()
def show(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    pool: PoolOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's card, or with --json its manifest."""
    folder = Pool(pool)
    path = folder.path(adapter)
    manifest = folder.manifest(adapter)
    if as_json:
        print_json(manifest.shown() if manifest else {"status": "unverified"})
    elif manifest is None:
        typer.echo(f"{path}: no adapterhub.json; made by plain PEFT, nothing about it is verified")
    else:
        typer.echo(render_card(manifest))


@app.command()
def rollback(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    pool: PoolOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Put an adapter's earlier version back; once more returns to the newer one."""
    manifest = Pool(pool).rollback(adapter).manifest
    sha256, created = (manifest.sha256, manifest.created) if manifest else ("", "")
    if as_json:
        print_json({"adapter": adapter, "sha256": sha256, "created": created})
    else:
        made = f"made {created or 'at a time unknown'}, sha256 {sha256[:12] or 'unknown'}"
        typer.echo(f"{adapter}: the other version is in its place now ({made})")


@app.command()
@with_backbone
def verify(
    path: Annotated[str, typer.Argument(help="Adapter of the pool, or a folder.")],
    where: Where = HERE,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter against the backbone: bytes, shapes, fingerprint, probe. Exit 0 only when ok."""
    hub = where.open(Say(quiet=True))
    verdict = hub.verify(path)
    if as_json:
        print_json(asdict(verdict))
    else:
        typer.echo("\n  - ".join([f"{path}: {verdict.status}", *verdict.problems]))
    raise typer.Exit(0 if verdict.ok else 1)


@app.command()
def bench(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHES)}.")],
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Interleaved repeats; medians are shown.")
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="mixed: folder of scripts/install_peers.", show_default="$ADAPTERHUB_PEERS"
        ),
    ] = None,
    dtype: DtypeOption = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="mixed: also with recorded steps (compiled on a CPU).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this project, and the peers that are installed, in one interleaved run."""
    if kind not in BENCHES:
        raise UsageError(f"bench {kind!r}: allowed are {', '.join(BENCHES)}")
    if peers and kind != "mixed":
        raise UsageError("--peers: only bench mixed measures other engines; leave it out")
    if graphs and kind != "mixed":
        raise UsageError("--graphs: only bench mixed decodes; leave it out")
    if dtype and kind not in ("train", "swap"):
        raise UsageError(
            "--dtype: only bench train and bench swap take another dtype; leave it out"
        )
    given = {"repeats": repeats, "peers": peers, "dtype": dtype, "graphs": graphs}
    result = BENCHES[kind](**{name: value for name, value in given.items() if value})
    if as_json:
        print_json(result)
        return
    for line in told(result):
        typer.echo(line)


for verb in (merge, export, transfer, flatten, route, push, pull, search, adopt, keygen):
    app.command()(verb)


__all__ = ["app", "main"]
