"""`bench KIND`: measure this project and the installed peers in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.bench.table import BENCHES, format_rows
from adapterhub_chat.cli.options import DtypeOption, JsonOption
from adapterhub_chat.cli.output import print_json
from adapterhub_chat.errors import UsageError


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
    options = {"repeats": repeats, "peers": peers, "dtype": dtype, "graphs": graphs}
    result = BENCHES[kind](**{name: value for name, value in options.items() if value})
    if as_json:
        print_json(result)
        return
    for line in format_rows(result):
        typer.echo(line)
