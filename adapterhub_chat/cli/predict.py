"""`predict`: JSON lines in, answers out, in the same order."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub_chat.cli.json_lines import open_output, read_lines
from adapterhub_chat.cli.options import DEFAULT_HUB, HubOptions, with_backbone, with_engine
from adapterhub_chat.cli.output import Bars, Notes, err


@with_backbone
@with_engine
def predict(
    adapter: Annotated[str, typer.Option(help="Adapter, or 'backbone'.")],
    input_: Annotated[str, typer.Option("--input", help="JSON lines; - is standard input.")] = "-",
    output: Annotated[str, typer.Option(help="JSON lines; - is standard output.")] = "-",
    task: Annotated[
        str | None, typer.Option(help="Prompt and judge by this task, not by the adapter's own.")
    ] = None,
    hub_options: HubOptions = DEFAULT_HUB,
) -> None:
    """Answer JSON lines {"text": ...} (or the task's own fields), in the same order."""
    rows = read_lines(input_)
    hub = hub_options.open(Notes(quiet=True))
    with open_output(output) as file, Bars(err, show=err.is_terminal) as bars:
        for prediction in hub.predict(adapter, rows, task=task, listeners=bars.listeners):
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
