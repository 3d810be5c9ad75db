"""Servers of other engines on the loopback address: installation, start, pause and end.

`scripts/install_peers FOLDER` makes an environment for each; FOLDER is an argument, or ADAPTERHUB_PEERS. An
idle server still uses its cores (busy waiting), so it is stopped by SIGSTOP while others are measured.
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

FOLDER_VARIABLE = "ADAPTERHUB_PEERS"
"""Environment variable: the folder of `scripts/install_peers`."""
PEER_NAMES = ("vllm", "llamacpp")
READY_SECONDS, END_SECONDS, ANSWER_SECONDS = 600, 15, 600
REMOVED_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
"""Environment variables that would disturb the interpreter of another environment."""
DIRECT_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs without a proxy, whatever the environment says, since the servers are local."""


def installed(folder: str | Path | None = None) -> dict[str, str]:
    """Return name -> version of the engines installed in `folder`, else in ADAPTERHUB_PEERS."""
    root = folder or os.environ.get(FOLDER_VARIABLE)
    if not root:
        return {}
    if not Path(root).is_dir():
        raise UsageError(
            f"peers: {root} is not a folder; make it with scripts/install_peers {root}"
        )
    versions = {}
    for name in PEER_NAMES:
        version = Path(root, name, "VERSION")  # written at the end of an installation
        if version.is_file():
            versions[name] = version.read_text("utf-8").strip()
    return versions


def usable_peers(folder: str | Path | None, backbone: str) -> dict[str, str]:
    """Return name -> version of the installed engines that can serve this backbone."""
    return {
        name: version
        for name, version in installed(folder).items()
        if name != "llamacpp" or gguf_of(backbone) is not None
    }


def gguf_of(backbone: str) -> Path | None:
    """Return the GGUF file of a backbone's name, None for other formats."""
    asset = ASSETS.get(backbone)
    path = backbone_path(backbone) if asset and asset.kind == "backbone" else Path(backbone)
    return path.expanduser().absolute() if path.suffix == ".gguf" else None


def python_of(folder: str | Path | None, name: str) -> str:
    """Return the interpreter of an engine's own environment."""
    return str(Path(folder or os.environ[FOLDER_VARIABLE], name, "bin", "python").absolute())


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process and its children, in a process group; a context manager."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        folder: Path,
        variables: Mapping[str, str],
    ) -> None:
        """Start `command`, which listens on `port`, in `folder`; its output goes to a log file there."""
        self.name, self.port = name, port
        self.log = folder / f"{name}-{port}.log"
        inherited = {
            name: value for name, value in os.environ.items() if name not in REMOVED_VARIABLES
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C does not reach it, and one signal reaches the group
            )

    def wait(self) -> None:
        """Wait until it answers; raise RuntimeError with the end of its log on failure."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the {self.name} server ended while it started{self._said()}")
            try:
                with DIRECT_OPENER.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(
            f"the {self.name} server was not ready in {READY_SECONDS} s{self._said()}"
        )

    def ask(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post `body` and return the answer; raise RuntimeError with the server's error message."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            json.dumps(dict(body)).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with DIRECT_OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
                result: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise RuntimeError(f"the {self.name} server refused: {error.code} {reason}") from error
        except OSError as error:
            raise RuntimeError(
                f"the {self.name} server gave no answer: {error}{self._said()}"
            ) from error
        return result

    def pause(self) -> None:
        """Stop all of its processes (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue all of its processes (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Terminate all of its processes, and kill those that do not end in time."""
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
        with suppress(ProcessLookupError):  # the group has no process any more
            os.killpg(self._process.pid, number)

    def _said(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()[-15:]
        return "; it said last:\n" + "\n".join(lines) if lines else ""
