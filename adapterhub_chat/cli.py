"""The command line: `adapterhub-chat VERB`. Thin: every verb calls one method and prints the result."""

from __future__ import annotations

import inspect
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.chat import ChatSession
from adapterhub_chat.config import TrainConfig, read_run
from adapterhub_chat.demo import run_demo
from adapterhub_chat.errors import AdapterHubError, DataError, UsageError
from adapterhub_chat.kernels_bench import bench_kernels
from adapterhub_chat.pool import Pool
from adapterhub_chat.progress import Bars
from adapterhub_chat.types import BACKBONE, Score

app = typer.Typer(
    help="One frozen backbone, many skills: train, mix, measure and publish LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

BackboneOption = Annotated[
    str, typer.Option(help="Packaged name, local folder, .gguf file or Hub id.")
]
PoolOption = Annotated[Path, typer.Option(help="Folder that keeps the adapters.")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="Keep the backbone in nf4 or int8 (bitsandbytes).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32; default: the best that is native here.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA when there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
LimitOption = Annotated[int, typer.Option(min=0, help="Test items per task; 0 takes all.")]


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_handler()])
    logging.getLogger("adapterhub_chat").setLevel(logging.INFO)
    warnings.showwarning = _warn
    try:
        app()
    except AdapterHubError as error:
        err.print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per TrainConfig field; those that were set arrive as `settings`."""
    options = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _option_type(field.annotation) | None,
                typer.Option(
                    help=f"{field.description} [default: {field.default}]",
                    rich_help_panel="Training settings",
                    show_default=False,
                ),
            ],
        )
        for name, field in TrainConfig.model_fields.items()
    }

    def run(**given: Any) -> None:
        settings = {n: v for n in options if (v := given.pop(n)) is not None}
        command(**given, settings=settings)

    own = inspect.signature(command, eval_str=True).parameters
    kept = [p for name, p in own.items() if name != "settings"]
    run.__signature__ = inspect.Signature([*kept, *options.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*kept, *options.values())}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _option_type(annotation: Any) -> Any:
    return annotation if annotation in (int, float, bool, str) else str


@app.command()
def demo(
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("runs/demo"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train qa, generation and sentiment jointly, judge them, swap them, mix them in one batch."""
    say = _Say(quiet=as_json)
    say(
        "The main job, small: three adapters trained jointly on one frozen backbone. "
        "A few minutes of training; the adapters shipped in adapters/ had a larger budget."
    )
    hub = _hub(backbone, pool, None, dtype, device, say)
    with Bars(err, show=not as_json) as bars:
        result = run_demo(hub, listeners=bars.listeners)
    if as_json:
        _print_json({**result.as_json(), **_precision(hub)})
        return
    scores = [s for m in result.manifests.values() for s in m.scores]
    out.print(_score_table("Trained jointly, measured on held-out items", scores))
    for title, rows in (
        ("Hot swap: one question, one adapter after another", result.swapped),
        ("One mixed batch: four rows, four skills, one forward", result.mixed_batch),
    ):
        table = Table("adapter", "prompt", "output", title=title)
        for row in rows:
            table.add_row(row.adapter, _escaped(row.prompt), _escaped(row.output))
        out.print(table)
    out.print(f"Done in {result.seconds:.0f} s. The adapters are in {pool}; talk to one:")
    out.print(f"  adapterhub-chat chat --pool {pool} --adapter qa", highlight=False)


@with_settings
def train(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Names from tasks/, or paths of .py or .toml files.")
    ] = None,
    how: Annotated[str | None, typer.Option(help="joint or sequence. [default: joint]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML of a run: [settings] and [adapters.NAME] tables.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Adapter names, one per task (repeat the option).")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="[default: smollm2-135m]")] = None,
    pool: Annotated[Path | None, typer.Option(help="[default: adapters]")] = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    test_examples: Annotated[
        int | None, typer.Option(min=0, help="Test items measured per task. [default: 200]")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run log. [default: runs/<time>]")
    ] = None,
    as_json: JsonOption = False,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Train one adapter per task, jointly or one after another; save and measure them."""
    say = _Say(quiet=as_json)
    flags = {
        "how": how,
        "backbone": backbone,
        "pool": str(pool) if pool else None,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
        "test_examples": test_examples,
    }
    run = read_run(config, tasks or [], name or [], flags, settings)
    hub = _hub(run.backbone, Path(run.pool), run.quantize, run.dtype, run.device, say)
    folder = run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    with Bars(err, show=not as_json) as bars:
        manifests = hub.train(
            [entry["task"] for entry in run.adapters.values()],
            how=run.how,
            names=list(run.adapters),
            settings={
                n: {k: v for k, v in e.items() if k != "task"} for n, e in run.adapters.items()
            },
            test_examples=run.test_examples,
            run_dir=folder,
            listeners=bars.listeners,
            **run.settings,
        )
    if as_json:
        _print_json({n: m.model_dump(mode="json") for n, m in manifests.items()})
        return
    for title, manifest in manifests.items():
        t = manifest.training
        say(f"{title}: {t.steps} steps, best at {t.best_step}, {t.stopped}; saved to {run.pool}")
        if t.stopped == "interrupted":
            say("  interrupted: what was best so far is kept, and it was not measured")
    say(f"run log: {folder / 'metrics.jsonl'}")
    scores = [s for m in manifests.values() for s in m.scores]
    if scores:
        out.print(_score_table("Test split, beside the backbone", scores))


app.command("train")(train)


@app.command("eval")
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
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("adapters"),
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score adapters on test splits, with 95 % intervals and the backbone on the same items."""
    hub = _hub(backbone, pool, quantize, dtype, device, _Say(quiet=as_json))
    with Bars(err, show=not as_json) as bars:
        scores = hub.evaluate(adapter or None, task or None, limit=limit, listeners=bars.listeners)
    if as_json:
        _print_json({"scores": [asdict(s) for s in scores]})
    else:
        out.print(_score_table("Test split", scores))


@app.command()
def predict(
    adapter: Annotated[str, typer.Option(help="Adapter, or 'backbone'.")],
    input_: Annotated[str, typer.Option("--input", help="JSON lines; - is standard input.")] = "-",
    output: Annotated[str, typer.Option(help="JSON lines; - is standard output.")] = "-",
    task: Annotated[
        str | None, typer.Option(help="Prompt and judge by this task, not by the adapter's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Lines per batch.")] = 64,
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("adapters"),
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Answer JSON lines {"text": ...} (or the task's own fields), in the same order."""
    rows = _read_lines(input_)
    hub = _hub(backbone, pool, quantize, dtype, device, _Say(quiet=True))
    with ExitStack() as stack:
        sink: TextIO = sys.stdout
        partial = Path(f"{output}.part")
        if output != "-":
            sink = stack.enter_context(partial.open("w", encoding="utf-8"))
        for start in range(0, len(rows), batch):
            for found in hub.predict(adapter, rows[start : start + batch], task=task):
                sink.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
            sink.flush()
    if output != "-":
        partial.replace(output)


@app.command()
def chat(
    adapter: Annotated[
        str, typer.Option(help="Who answers first; /use NAME changes it.")
    ] = BACKBONE,
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("adapters"),
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk in the terminal: /use NAME, /mix a=0.5 b=0.5, /list, /reset, /quit."""
    hub = _hub(backbone, pool, quantize, dtype, device, _Say(quiet=False))
    session = ChatSession(hub, write=lambda text: print(text, end="", flush=True))  # noqa: T201
    session.use(adapter)
    out.print("Type a message; /help lists the commands.")
    while not session.ended:
        try:
            line = input(f"{session.mix}> ")
        except EOFError:
            break
        session.handle(line)


@app.command("list")
def list_adapters(pool: PoolOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the adapters of the pool with their scores."""
    folder = Pool(pool)
    manifests = {name: folder.manifest(name) for name in folder.names()}
    if as_json:
        dumped = {n: m.model_dump(mode="json") if m else None for n, m in manifests.items()}
        _print_json({"adapters": dumped})
        return
    table = Table("adapter", "task", "metric", "score", "backbone", "made on", title=str(pool))
    for name, manifest in manifests.items():
        if manifest is None:
            table.add_row(name, "", "", "", "", "unverified (no manifest)")
            continue
        score = manifest.scores[0] if manifest.scores else None
        table.add_row(
            name,
            ", ".join(manifest.training.tasks),
            manifest.metric,
            f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else "not measured",
            _number(score.backbone_value if score else None),
            manifest.backbone,
        )
    out.print(table)


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
        _print_json(manifest.model_dump(mode="json") if manifest else {"status": "unverified"})
    elif manifest is None:
        out.print(f"{path}: no adapterhub.json; made by plain PEFT, nothing about it is verified")
    else:
        out.print((path / "README.md").read_text(encoding="utf-8"), markup=False, highlight=False)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Adapter of the pool, or a folder.")],
    backbone: BackboneOption = "smollm2-135m",
    pool: PoolOption = Path("adapters"),
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter against the backbone: bytes, shapes, fingerprint, probe. Exit 0 only when ok."""
    hub = _hub(backbone, pool, quantize, dtype, device, _Say(quiet=True))
    verdict = hub.verify(path)
    if as_json:
        _print_json(asdict(verdict))
    else:
        out.print(f"{path}: {verdict.status}")
        for problem in verdict.problems:
            out.print(f"  - {_escaped(problem)}", highlight=False)
    raise typer.Exit(0 if verdict.ok else 1)


@app.command()
def bench(
    kind: Annotated[str, typer.Argument(help="kernels")],
    repeats: Annotated[
        int, typer.Option(min=1, help="Interleaved repeats; medians are shown.")
    ] = 15,
    as_json: JsonOption = False,
) -> None:
    """Measure this project, in one interleaved run."""
    if kind != "kernels":
        raise UsageError(f"bench {kind!r}: allowed is kernels")
    result = bench_kernels(repeats=repeats)
    if as_json:
        _print_json(result)
        return
    forms = ("linear", "batched", "ragged", "dense")
    table = Table("case", *forms, title="Microseconds, median; the linear layer beside the forms")
    for row in result["rows"]:
        table.add_row(row["case"], *(f"{row[form]:.0f}" for form in forms))
    out.print(table)


class _Say:
    """Prints notes for a person to standard error, unless quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            err.print(text, highlight=False)


def _hub(
    backbone: str, pool: Path, quantize: Any, dtype: str | None, device: str | None, say: _Say
) -> AdapterHub:
    hub = AdapterHub(backbone, pool, quantize=quantize, dtype=dtype, device=device)
    shown = _precision(hub)
    kind = shown["quantize"] or shown["dtype"]
    say(f"{backbone} in {kind} on {shown['device']} (change with --dtype, --quantize, --device)")
    return hub


def _precision(hub: AdapterHub) -> dict[str, Any]:
    backbone = hub.backbone
    return {
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "quantize": backbone.quantize,
    }


def _score_table(title: str, scores: Iterable[Score]) -> Table:
    table = Table(
        "adapter", "task", "metric", "score", "95 % interval", "backbone", "n", title=title
    )
    for s in scores:
        interval = f"{s.low:.3f} to {s.high:.3f}"
        row = (s.adapter, s.task, s.metric, f"{s.value:.3f}", interval, _number(s.backbone_value))
        table.add_row(*row, str(s.n))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _read_lines(source: str) -> list[dict[str, Any]]:
    """Return the JSON objects of `source`; raise DataError naming every line that is none."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--input {source}: {error.strerror or error}") from error
    rows, bad = [], []
    for number, line in _numbered(text):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(str(number))
    if bad:
        raise DataError(
            f'{source}: line {", ".join(bad[:10])} is not a JSON object like {{"text": ...}}'
        )
    return rows


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _handler() -> logging.Handler:
    return RichHandler(console=err, show_time=False, show_level=False, show_path=False)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]note:[/] {_escaped(str(message))}", highlight=False)


__all__ = ["app", "main"]
