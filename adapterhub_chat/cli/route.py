"""`route`: choose the adapter for each message, or learn prototypes of messages."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from adapterhub_chat.cli.json_lines import open_output, read_lines
from adapterhub_chat.cli.options import DEFAULT_HUB, HubOptions, with_backbone
from adapterhub_chat.cli.output import Notes, print_json, print_table
from adapterhub_chat.errors import DataError, UsageError, join_misfits
from adapterhub_chat.route.choice import Route

MAX_SHOWN = 10
"""Maximum number of misfits in one message."""


@with_backbone
def route(
    text: Annotated[
        list[str] | None, typer.Argument(help="Messages; without any, the lines of --input.")
    ] = None,
    input_: Annotated[
        str, typer.Option("--input", help='JSON lines {"text": ...}; - is standard input.')
    ] = "-",
    output: Annotated[str, typer.Option(help="JSON lines; - is standard output.")] = "-",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Choose among these alone (repeat the option; default: all of the pool)."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most adapters that share a mix.")] = 1,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            help="Learn what this adapter's messages look like, and keep it (repeat the option)."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Learn from this task, not from the adapter's own (repeat the option)."),
    ] = None,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a message, nothing else.")
    ] = False,
) -> None:
    """Choose the adapter for each message, with confidence and reason; the backbone if none is close."""
    if task and not learn:
        raise UsageError("--task goes with --learn NAME")
    if learn and text:
        raise UsageError(
            "--learn NAME reads the tasks' messages; leave out those of the command line"
        )
    messages = [] if learn else text or _messages(input_)
    hub = hub_options.open(Notes(quiet=True))
    if learn:
        manifests = hub.learn_routes(learn, task)
        counts = {name: m.routing.count for name, m in manifests.items() if m.routing}
        if as_json:
            print_json({"learnt": counts})
        else:
            print_table("Learnt", ("adapter", "messages"), [(n, str(c)) for n, c in counts.items()])
        return
    routes = hub.routes(messages, top=top, among=adapter)
    if as_json or output != "-":
        with open_output(output) as file:
            for choice in routes:
                file.write(json.dumps(_as_json(choice), ensure_ascii=False) + "\n")
        return
    rows = [
        (message, str(choice.mix), f"{choice.confidence:.2f}", choice.reason)
        for message, choice in zip(messages, routes, strict=True)
    ]
    print_table("Routes", ("message", "mix", "confidence", "why"), rows)


def _messages(source: str) -> list[str]:
    """Return the message of each JSON line; raise one DataError for all lines without a message."""
    messages = [_message(row) for row in read_lines(source)]
    misfits = [
        f'line {number} has no text; it needs {{"text": ...}}, or a task\'s own fields as texts'
        for number, message in enumerate(messages, 1)
        if message is None
    ]
    if misfits:
        raise DataError(join_misfits(f"--input {source}", misfits, MAX_SHOWN))
    return [message for message in messages if message is not None]


def _message(row: dict[str, Any]) -> str | None:
    """Return a row's text, else its fields, a line each."""
    values = [row["text"]] if "text" in row else list(row.values())
    fits = values and all(isinstance(value, str) for value in values)
    return "\n".join(values) if fits else None


def _as_json(route: Route) -> dict[str, Any]:
    return {
        "adapter": route.adapter,
        "mix": dict(route.mix.weights),
        "confidence": route.confidence,
        "abstained": route.abstained,
        "reason": route.reason,
        "scores": route.scores,
    }
