"""The command line: `adapterhub-chat VERB`. A verb's module is imported when the verb is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from adapterhub_chat.cli.output import INTERRUPTED, print_message, print_warnings_and_logs
from adapterhub_chat.errors import AdapterHubError

VERBS = {
    "demo": (
        "demo:demo",
        "Train qa, generation and sentiment jointly, measure them, swap them, mix them in one batch.",
    ),
    "train": (
        "train:train",
        "Train one adapter per task, jointly or one after another; save and measure them.",
    ),
    "eval": (
        "pool:evaluate",
        "Score adapters on test splits, with 95 % intervals and the backbone on the same items.",
    ),
    "predict": (
        "predict:predict",
        'Answer JSON lines {"text": ...} (or the task\'s own fields), in the same order.',
    ),
    "chat": (
        "chat_session:chat",
        "Talk in the terminal: /use NAME, /mix a=0.5 b=0.5, /list, /reset, /quit.",
    ),
    "list": ("pool:list_adapters", "List the adapters of the pool with their scores."),
    "show": ("pool:show", "Show an adapter's card, or with --json its manifest."),
    "rollback": (
        "rollback:rollback",
        "Restore an adapter's earlier version; a second call returns to the newer one.",
    ),
    "verify": (
        "pool:verify",
        "Check an adapter against the backbone: bytes, shapes, fingerprint, probe. Exit 0 only when ok.",
    ),
    "bench": (
        "bench:bench",
        "Measure this project, and the peers that are installed, in one interleaved run.",
    ),
    "merge": ("merge:merge", "Merge several adapters into one, and measure what it keeps of each."),
    "export": (
        "merge:export",
        "Write the backbone with an adapter merged into it, as a model folder for plain transformers.",
    ),
    "transfer": (
        "transfer:transfer",
        "Make an adapter for a target from a source: all methods with one budget, each with a verdict.",
    ),
    "flatten": (
        "transfer:flatten",
        "Save a stack as one plain PEFT adapter, which does not need its source.",
    ),
    "route": (
        "route:route",
        "Choose the adapter for each message, with confidence and reason; the backbone if none is close.",
    ),
    "push": (
        "remote:push",
        "Publish an adapter with its card, in one commit under a new version tag.",
    ),
    "pull": (
        "remote:pull",
        "Download an adapter from a Hub into the pool, after verifying it as untrusted.",
    ),
    "search": ("remote:search", "List adapters on a Hub that fit the backbone."),
    "adopt": (
        "remote:adopt",
        "Measure an adapter made by plain PEFT, and write its manifest, probe and card.",
    ),
    "keygen": (
        "remote:keygen",
        "Make a key for push --sign, and print the public key for pull --require-signature.",
    ),
}
"""Verb -> module and function, and the first sentence of the function's docstring."""


class VerbGroup(TyperGroup):
    """Verbs by name and sentence; the called verb is replaced by the command of its function."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` begin with, its module imported."""
        if args and args[0] in VERBS:
            self.commands[args[0]] = load_verb(args[0])
        return super().resolve_command(ctx, args)


def load_verb(name: str) -> Any:
    """Import a verb's module; return its command (a click command as typer makes it)."""
    module, _, function = VERBS[name][0].partition(":")
    verb = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    verb.command(name)(getattr(importlib.import_module(f"adapterhub_chat.cli.{module}"), function))
    return typer.main.get_command(verb)


app = typer.Typer(
    cls=VerbGroup,
    help="One frozen backbone, many skills: train, mix, measure and publish LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb, (_, sentence) in VERBS.items():
    app.command(verb, help=sentence)(lambda: None)


def main() -> None:
    """Run the command line; an AdapterHubError is printed as a message with exit code 2."""
    print_warnings_and_logs()
    try:
        app()
    except AdapterHubError as error:
        print_message("error", str(error))
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print_message("interrupted", "what was saved by then is kept")
        raise
