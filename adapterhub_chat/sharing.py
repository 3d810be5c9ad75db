"""The part of the Python face by which adapters come from elsewhere and go elsewhere."""

from __future__ import annotations

from pathlib import Path

from adapterhub_chat.adopt import adopt
from adapterhub_chat.backbone import Backbone
from adapterhub_chat.hub import Hub
from adapterhub_chat.manifest import Manifest
from adapterhub_chat.pool import Pool
from adapterhub_chat.publish import Published, push
from adapterhub_chat.pull import Pulled, pull, pull_locked
from adapterhub_chat.search import Found, search
from adapterhub_chat.shelf import Shelf
from adapterhub_chat.task import Task, as_task
from adapterhub_chat.workshop import SILENT, Listeners


class Sharing:
    """What AdapterHub does with other people's adapters, and for other people."""

    pool: Pool
    backbone: Backbone
    _shelf: Shelf

    def adopt(
        self,
        source: str | Path,
        task: str | Path | Task,
        name: str | None = None,
        *,
        limit: int = 0,
        listeners: Listeners = SILENT,
    ) -> Manifest:
        """Measure an adapter that plain PEFT made, and give it a manifest, a probe and a card in the pool.

        `task` says how it is to be prompted and judged. Raises UsageError for one that has a manifest.
        """
        return adopt(
            self._shelf,
            source,
            as_task(task),
            name,
            limit,
            listeners,
        )

    def push(
        self,
        name: str,
        repo: str,
        *,
        version: str | None = None,
        private: bool = False,
        force: bool = False,
        sign: str | Path | None = None,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> Published:
        """Publish a pool member as `user/name`, in one commit, under a version that never moves.

        `version` is a new tag (None: the next of v1, v2, ...). Refused are adapters that were never
        measured or lose to the backbone, unless `force`; then the card says so. `sign` is a private key
        of `adapterhub-chat keygen`. `endpoint` None: HF_ENDPOINT, else huggingface.co; `token` None:
        HF_TOKEN at that endpoint. Raises HubError with nothing half published.
        """
        hub, key = Hub(endpoint, token), None if sign is None else Path(sign)
        done = push(
            self.pool, name, repo, hub, version=version, private=private, force=force, key=key
        )
        self._shelf.refresh(name)
        return done

    def pull(
        self,
        repo: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        require_signature: str | None = None,
        replace: bool = False,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> Pulled:
        """Bring an adapter from a Hub into the pool, checked as a stranger's, and pin it in the lock.

        `revision` is a branch, tag or commit (None: main); `name` None takes the repository's. Raises
        AdapterError, HubError or UsageError with the pool as it was: for what the guard or this backbone
        refuses, another signer than `require_signature` (a public key), a name that the pool has from
        elsewhere, a tag that moved. `replace` waives the last two.
        """
        hub = Hub(endpoint, token)
        return pull(
            self._shelf,
            repo,
            hub,
            revision=revision,
            name=name,
            key=require_signature,
            replace=replace,
        )

    def pull_locked(self, token: str | None = None) -> list[Pulled]:
        """Bring the pool to what its `adapters.lock.json` says, to the byte."""
        return pull_locked(self._shelf, token)

    def search(
        self,
        text: str = "",
        *,
        author: str = "",
        limit: int = 20,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> list[Found]:
        """Return adapters on a Hub for this backbone: those made for its very weights first."""
        return search(self.backbone, Hub(endpoint, token), text, author, limit)
