"""A terminal conversation as plain state: lines go in, text comes out through `write`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import typer

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.cli.options import DEFAULT_HUB, HubOptions, with_backbone, with_engine
from adapterhub_chat.cli.output import Notes
from adapterhub_chat.errors import AdapterHubError, UsageError
from adapterhub_chat.types import AUTO, BACKBONE, Message, Mix, as_mix

HELP = """\
/use NAME           answer with one adapter ('backbone': none, 'auto': chosen for each message)
/mix a=0.5 b=0.5    answer with a weighted mixture
/list               the adapters of the pool
/reset              forget the conversation
/quit               leave
"""


class ChatSession:
    """A conversation whose adapter can change between turns; Ctrl-C ends an answer, not the session."""

    def __init__(self, hub: AdapterHub, *, write: Callable[[str], None]) -> None:
        """Start with the bare backbone and no history."""
        self.hub, self.write = hub, write
        self.mix, self.history, self.ended = Mix(), list[Message](), False
        self.auto = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/use": self.use,
            "/mix": self.blend,
            "/list": self.list,
            "/reset": self.reset,
            "/help": self.help,
            "/quit": self.quit,
            "/exit": self.quit,
        }

    def handle(self, line: str) -> None:
        """Run a command or answer a message; errors are written, not raised."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        try:
            if word.startswith("/"):
                if word not in self._commands:
                    raise UsageError(f"unknown command {word}; known: {', '.join(self._commands)}")
                self._commands[word](rest.strip())
            elif line:
                self.answer(line)
        except AdapterHubError as error:
            self.write(f"error: {error}\n")
        except KeyboardInterrupt:
            self.write("\n(stopped; this turn is forgotten)\n")

    def answer(self, text: str) -> str:
        """Stream the reply to `text` and append both to the history."""
        turns = [*self.history, Message("user", text)]
        mix = self.choose(text) if self.auto else self.mix
        (reply,) = self.hub.chat(
            [turns], adapters=[mix], on_text=lambda _row, piece: self.write(piece)
        )
        self.write("\n")
        self.mix, self.history = mix, [*turns, Message("assistant", reply)]
        return reply

    def choose(self, text: str) -> Mix:
        """Route a message; the previous adapter is kept unless another is clearly better."""
        previous = self.mix.names[0] if self.mix.names else None
        route = self.hub.route(text, previous=previous)
        self.write(f"[{route.adapter}: {route.reason}]\n")
        return route.mix

    def use(self, name: str) -> None:
        """Answer further messages with an adapter of the pool or a folder, or with 'auto' by routing."""
        if not name:
            raise UsageError("/use needs a name, as in /use qa")
        self.mix = Mix() if name == AUTO else as_mix(self._loaded(name))
        self.auto = name == AUTO

    def blend(self, text: str) -> None:
        """Answer with a weighted mixture, written `a=0.5 b=0.5`."""
        weights = dict(map(_weight, text.split()))
        if not weights:
            raise UsageError("/mix needs weights, as in /mix qa=0.5 generation=0.5")
        self.mix = as_mix({self._loaded(name): weight for name, weight in weights.items()})
        self.auto = False

    def list(self, _: str = "") -> None:
        """Show the adapters of the pool and the loaded ones; `*` marks the current one."""
        for name in (BACKBONE, *(adapter.name for adapter in self.hub.adapters())):
            self.write(f"{'*' if name in (self.mix.names or (BACKBONE,)) else ' '} {name}\n")

    def reset(self, _: str = "") -> None:
        """Forget the conversation and, with "auto", the last adapter."""
        self.history = []
        if self.auto:
            self.mix = Mix()

    def help(self, _: str = "") -> None:
        """Show the commands."""
        self.write(HELP)

    def quit(self, _: str = "") -> None:
        """End the session."""
        self.ended = True

    def _loaded(self, name: str) -> str:
        known = name == BACKBONE or name in self.hub.model.names
        return name if known else self.hub.load(name)


def _weight(part: str) -> tuple[str, float]:
    name, _, weight = part.partition("=")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (name and math.isfinite(value)):
        raise UsageError(f"{part!r} is not NAME=WEIGHT, as in qa=0.5")
    return name, value


@with_backbone
@with_engine
def chat(
    adapter: Annotated[
        str, typer.Option(help="First adapter, or 'auto'; /use NAME changes it.")
    ] = BACKBONE,
    hub_options: HubOptions = DEFAULT_HUB,
) -> None:
    """Talk in the terminal: /use NAME, /mix a=0.5 b=0.5, /list, /reset, /quit."""
    hub = hub_options.open(Notes(quiet=False))
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
