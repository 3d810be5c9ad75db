"""A server that a test starts and stops."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn

from .access import Caller, Hub
from .app import make_app
from .blobs import Tree, lfs_entry
from .capability import Signer
from .mischief import Mischief, RecordedRequest
from .settings import Settings
from .store import Change, Store
from .uploads import is_lfs
from .wire import Wire

PATIENCE = 10


def _listen(port: int) -> socket.socket:
    # Said to be TCP, or asyncio leaves Nagle's delay on, and every answer takes 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(100)
    return listening


class HubServer:
    """A Hub at `endpoint` while it is entered; what it holds stays in the folder.

        with HubServer(folder, users={"alice": "hf_alice"}) as server:
            HfApi(endpoint=server.endpoint, token="hf_alice").create_repo("alice/x")

    `requests` lists all that were seen; `mischief` may be set at any time, None ends it. More keyword
    arguments are the fields of `Settings`.
    """

    def __init__(
        self, folder: Path | str, users: Mapping[str, str] = {}, *, port: int = 0, **settings: Any
    ) -> None:
        self.requests: list[RecordedRequest] = []
        self.mischief: Mischief | None = None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._socket = _listen(port)
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        how = Settings(**settings)
        self._hub = Hub(self.endpoint, Store(folder, how), how, Signer(how.url_seconds))
        for user, token in users.items():
            self.grant(user, token)
        app = Wire(make_app(self._hub), self.requests.append, lambda: self.mischief)
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", loop="asyncio", http="h11", ws="none",
            access_log=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        run = {"sockets": [self._socket]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self._socket.close()
        self._hub.store.close()

    def grant(self, user: str, token: str, role: str = "write") -> None:
        """Let a token speak for a user; role is write or read."""
        self._hub.tokens[token] = Caller(user, role)

    def revoke(self, token: str) -> None:
        """Let a token be unknown from now on."""
        del self._hub.tokens[token]

    def plant(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> str:
        """Put files on main as they are, whatever their names and contents; return the commit's id.

        The repository is made if there is none. No client could push some of what a hostile server may hold.
        """
        namespace, name = repo_id.split("/")
        store = self._hub.store
        repo = store.create("models", namespace, name, private)
        repo = repo or store.repo("models", namespace, name)
        assert repo is not None
        planted: Tree = {}
        for path, data in files.items():
            entry = store.blobs.add(data)
            if is_lfs(self._hub.settings.lfs_over, path, entry.size, data[:512]):
                store.add_object(repo.id, entry.sha256, entry.size)
                entry = lfs_entry(entry.sha256, entry.size)
            planted[path] = entry
        change = Change(lambda tree: {**tree, **planted}, namespace, "plant")
        return store.advance(repo, "main", change).oid
