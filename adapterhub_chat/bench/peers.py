"""Other engines as servers on the loopback address: where they are installed, how they start, pause and end.

`scripts/install_peers FOLDER` makes an environment for each; FOLDER is given, or stands in ADAPTERHUB_PEERS.
A server spins on its cores even when nobody asks anything, so it is stopped (SIGSTOP) while others work.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.assets.fetch import backbone_path
from adapterhub_chat.errors import UsageError

FOLDER = "ADAPTERHUB_PEERS"
"""Environment variable: the folder of `scripts/install_peers`."""
NAMES = ("vllm", "llamacpp")
READY_SECONDS, END_SECONDS, ANSWER_SECONDS = 600, 15, 600
FOREIGN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
"""Variables of this environment that would lead another one's interpreter astray."""
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without a proxy, whatever the environment says: the servers are here."""


def installed(folder: str | Path | None = None) -> dict[str, str]:
    """Return the version of every engine that is installed in `folder`, else in ADAPTERHUB_PEERS, by name."""
    given = folder or os.environ.get(FOLDER)
    if not given:
        return {}
    if not Path(given).is_dir():
        raise UsageError(
            f"peers: {given} is not a folder; make it with scripts/install_peers {given}"
        )
    found = {}
    for name in NAMES:
        version = Path(given, name, "VERSION")  # written last, when all the rest is there
        if version.is_file():
            found[name] = version.read_text("utf-8").strip()
    return found


def able(folder: str | Path | None, backbone: str) -> dict[str, str]:
    """Return the versions of the installed engines that can serve this backbone, by name."""
    return {
        name: version
        for name, version in installed(folder).items()
        if name != "llamacpp" or gguf_of(backbone) is not None
    }


def gguf_of(backbone: str) -> Path | None:
    """Return the GGUF file behind a backbone's name, None where it is something else."""
    asset = ASSETS.get(backbone)
    path = backbone_path(backbone) if asset and asset.kind == "backbone" else Path(backbone)
    return path.expanduser().absolute() if path.suffix == ".gguf" else None


def python_of(folder: str | Path | None, name: str) -> str:
    """Return the interpreter of an engine's own environment."""
    return str(Path(folder or os.environ[FOLDER], name, "bin", "python").absolute())


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process and all that it starts, in a process group of their own; a context manager."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        folder: Path,
        variables: Mapping[str, str],
    ) -> None:
        """Start `command`, which listens on `port`, in `folder`; what it prints goes into a log there."""
        self.name, self.port = name, port
        self.log = folder / f"{name}-{port}.log"
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**kept, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle, and one signal reaches them all
            )

    def wait(self) -> None:
        """Wait until it answers; raise RuntimeError with the end of its log when it does not."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"the {self.name} server ended while it started{self._said()}")
            try:
                with LOCAL.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(
            f"the {self.name} server was not ready in {READY_SECONDS} s{self._said()}"
        )

    def ask(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post `body` and return the answer; raise RuntimeError with what the server says against it."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            json.dumps(dict(body)).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with LOCAL.open(request, timeout=ANSWER_SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise RuntimeError(f"the {self.name} server refused: {error.code} {said}") from error
        except OSError as error:
            raise RuntimeError(
                f"the {self.name} server gave no answer: {error}{self._said()}"
            ) from error
        return found

    def pause(self) -> None:
        """Stop all of its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End all of its processes; those that do not end by themselves are killed."""
        self._signal(signal.SIGTERM)
        self.resume()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        finally:  # also after a second Ctrl-C, and for children that outlive their parent
            self._signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Server:
        """Return the server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End it."""
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # nobody is left in the group
            os.killpg(self._process.pid, number)

    def _said(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()[-15:]
        return "; it said last:\n" + "\n".join(lines) if lines else ""
