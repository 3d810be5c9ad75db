"""The one door to a Hub: every request goes to the endpoint that was named, within limits.

`huggingface_hub` speaks the protocol. What is read from a Hub is read here, with own bounds: its downloader
takes file names, hashes and sizes on the server's word. Requests that would leave the endpoint's hosts are
refused before they are sent, redirects among them; a token goes with no other request.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from adapterhub_chat.errors import HubError, UsageError
from adapterhub_chat.remote.limits import Bounds, within
from adapterhub_chat.remote.names import COMMIT, PUBLIC, check_endpoint, check_repo, check_revision

ANSWER_BYTES = 4 * 2**20
"""Most bytes of a JSON answer."""
PATIENCE, SLOWEST = 30.0, 50_000
"""Seconds in which something must come, and bytes a second that a file must come at after those."""
TRIES, WAIT = 40, 0.05
"""How often a commit that met another one is tried again, and the seconds before the second try."""
CODES = {
    401: "the token is missing or not valid",
    403: "the token does not give the right to do this",
}

HOPS = 5
"""Redirects that are followed."""
SHA256, GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, as its Hub describes it."""

    name: str
    size: int
    sha256: str = ""
    """Of its content, where it is a large file."""
    blob: str = ""
    """Git's hash of its content, where it is a small one."""


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Fetched:
    """A file that was downloaded, with what its bytes really hash to."""

    size: int
    sha256: str


class HubClient:
    """A Hub at one endpoint, asked with one token or none."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        """Take HF_ENDPOINT, else huggingface.co, without an `endpoint`.

        Without a `token`, HF_TOKEN (or the one that `hf auth login` kept) is used, but only at the endpoint
        that is the user's default. Raises UsageError for what is no endpoint.
        """
        default = os.environ.get("HF_ENDPOINT") or PUBLIC
        self.endpoint, self._allowed = check_endpoint(endpoint or default)
        if token is None and self.endpoint == default.rstrip("/"):
            token = huggingface_hub.get_token() if self.endpoint == PUBLIC else _token_of_user()
        self._token: str | Literal[False] = token or False
        self._api = HfApi(endpoint=self.endpoint, token=self._token, library_name="adapterhub-chat")

    def __repr__(self) -> str:
        """Return the endpoint; the token is shown nowhere."""
        return f"Hub({self.endpoint!r})"

    # -- reading -----------------------------------------------------------------------------------

    def snapshot(self, repo: str, revision: str | None = None) -> Snapshot:
        """Resolve a branch, tag or commit (None: main) to a commit and its files.

        Raises HubError for what is not there, UsageError for what cannot be the name of anything.
        """
        check_repo(repo)
        wanted = check_revision(revision or "main")
        found = self._json(f"/api/models/{repo}/revision/{quote(wanted, safe='')}?blobs=true", repo)
        commit, files = found.get("sha"), found.get("siblings")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise HubError(
                f"{self.endpoint} names no commit for {repo} at {wanted!r}: {commit!r:.80}"
            )
        if COMMIT.fullmatch(wanted) and commit != wanted:
            raise HubError(f"{self.endpoint} answers for {repo} with {commit}, not with {wanted}")
        if not isinstance(files, list):
            raise HubError(f"{self.endpoint} lists no files of {repo} at {wanted!r}")
        return Snapshot(
            repo, commit, {f.name: f for f in map(_remote_file, files) if f is not None}
        )

    def download(self, snapshot: Snapshot, name: str, target: Path, limit: int) -> Fetched:
        """Write one file of a snapshot to `target`, which must not exist; return its size and sha256.

        At most `limit` bytes are read. What comes must have the size and the hash that the snapshot names.
        """
        file = snapshot.files[name]
        where = f"{name} of {snapshot.repo}"
        if file.size > limit:
            raise HubError(f"{where} has {file.size:,} bytes; at most {limit:,} are taken")
        path = f"/{snapshot.repo}/resolve/{snapshot.commit}/{quote(name)}"

        def write() -> tuple[int, str, str]:
            sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size)
            size = 0
            with target.open("xb") as out:
                for piece in self._pieces(path, where):
                    size += out.write(piece)
                    sha256.update(piece)
                    blob.update(piece)
            return size, sha256.hexdigest(), blob.hexdigest()

        size, sha256, blob = self._ask(f"reading {where}", write, file.size, file.size)
        if size != file.size:
            raise HubError(f"{where} ended after {size:,} of {file.size:,} bytes")
        wrong = [
            f"the {kind} {own}, not {wanted}"
            for kind, own, wanted in (
                ("sha256", sha256, file.sha256),
                ("git hash", blob, file.blob),
            )
            if wanted and wanted != own
        ]
        if wrong:
            raise HubError(f"{where} has {' and '.join(wrong)}")
        return Fetched(size, sha256)

    def find(
        self, tags: Sequence[str], text: str = "", author: str = "", limit: int = 20
    ) -> list[Any]:
        """Return what the Hub says of the newest models that have all the tags, as JSON objects."""
        asked = [("filter", tag) for tag in tags] + [("limit", str(limit)), ("full", "true")]
        asked += [(k, v) for k, v in (("search", text), ("author", author)) if v]
        query = urlencode([*asked, ("sort", "lastModified"), ("cardData", "true")])
        found = self._json(f"/api/models?{query}", "the search", list)
        return [entry for entry in found[:limit] if isinstance(entry, dict)]

    def tags(self, repo: str) -> dict[str, str]:
        """Return a repository's tags, each with its commit."""
        found = self._json(f"/api/models/{check_repo(repo)}/refs", repo).get("tags")
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        return {str(e.get("name")): str(e.get("targetCommit")) for e in entries}

    # -- writing -----------------------------------------------------------------------------------

    def create(self, repo: str, *, private: bool) -> None:
        """Have a repository; one that is there stays as it is."""
        check_repo(repo)
        self._ask(
            f"creating {repo}",
            lambda: self._api.create_repo(repo, private=private or None, exist_ok=True),
        )

    def commit(self, repo: str, files: Mapping[str, bytes], message: str) -> str:
        """Put all files into one commit on main; return it.

        When another commit comes first it is tried again on top of that one. Raises HubError.
        """
        size = sum(map(len, files.values()))
        for attempt in range(TRIES):
            head = self.snapshot(repo).commit

            def push(head: str = head) -> str | None:
                return self._commit_on(head, repo, files, message)

            if (commit := self._ask(f"pushing to {repo}", push, size)) is not None:
                return commit
            time.sleep(random.uniform(0.5, 1.5) * min(WAIT * 2**attempt, 2.0))
        raise HubError(
            f"{repo} is committed to all the time; {TRIES} tries met another commit each"
        )

    def _commit_on(
        self, head: str, repo: str, files: Mapping[str, bytes], message: str
    ) -> str | None:
        """Return the new commit on top of `head`, None when another one came first."""
        # as streams: the client sends those as plain large files, where it would need Xet's own servers
        added = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
        try:
            with _quiet("huggingface_hub._commit_api"):
                for one in added:  # one by one: several are sent by threads that know no bounds
                    self._api.preupload_lfs_files(repo, [one], num_threads=1, free_memory=False)
                done = self._api.create_commit(
                    repo, added, commit_message=message, parent_commit=head, num_threads=1
                )
        except HfHubHTTPError as error:
            if _status(error) in (409, 412):
                return None
            raise
        if not isinstance(done.oid, str) or not COMMIT.fullmatch(done.oid):
            raise HubError(f"{self.endpoint} names no commit after pushing to {repo}")
        return done.oid

    def tag(self, repo: str, name: str, commit: str) -> bool:
        """Give a commit a tag; return False, with nothing changed, when there is one of that name."""
        check_revision(name)

        def create() -> bool:
            try:
                self._api.create_tag(repo, tag=name, revision=commit)
            except HfHubHTTPError as error:
                if _status(error) != 409:
                    raise
                return False
            return True

        return self._ask(f"tagging {repo} as {name}", create)

    # -- inside ------------------------------------------------------------------------------------

    def _json(self, path: str, what: str, kind: type = dict) -> Any:
        data = self._ask(f"reading {what}", lambda: b"".join(self._pieces(path, what)))
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HubError(f"{self.endpoint} answers about {what} with no JSON") from error
        if not isinstance(found, kind):
            raise HubError(f"{self.endpoint} answers about {what} with JSON of another form")
        return found

    def _pieces(self, path: str, what: str) -> Iterator[bytes]:
        """Yield the bytes that stand at a path; redirects are looked at before anything of them is read."""
        client = get_session()
        headers = build_hf_headers(token=self._token, library_name="adapterhub-chat")
        request = client.build_request("GET", self.endpoint + path, headers=headers)
        for _ in range(HOPS):
            answer = client.send(request, stream=True, follow_redirects=False)
            with closing(answer):
                if answer.next_request is None:
                    if answer.status_code >= 300:
                        raise HubError(f"{self._reason(answer)}: {what} at {self.endpoint}")
                    yield from answer.iter_raw()
                    return
                request = answer.next_request
        raise HubError(f"{self.endpoint} sends on for {what} more than {HOPS} times")

    def _ask(
        self, what: str, work: Callable[[], _T], size: int = 0, most: int = ANSWER_BYTES
    ) -> _T:
        """Return what `work` returns, which asks the endpoint alone, for `most` bytes, in time for `size`.

        Whatever goes wrong is a HubError about `what`.
        """
        end = time.monotonic() + PATIENCE + size / SLOWEST
        try:
            return within(Bounds(self._allowed, most, end), what, work)
        except (HubError, UsageError):
            raise
        except Exception as error:
            if (found := self._explained(error, what)) is None:
                raise
            raise found from None  # what stands behind may show headers

    def _explained(self, error: Exception, what: str) -> HubError | None:
        """Return what the client's or the network's error means; None for a mistake of our own."""
        chain = [error, *filter(None, (error.__cause__, error.__context__))]
        for one in chain:
            if isinstance(one, HubError):
                return one
            if isinstance(one, OfflineModeIsEnabled):
                return HubError(f"{what} needs {self.endpoint}, and HF_HUB_OFFLINE is set")
            if isinstance(one, HfHubHTTPError):
                return HubError(f"{what} failed: {self._reason(one.response)} at {self.endpoint}")
            lost = isinstance(one, ConnectionError | TimeoutError)
            if lost or type(one).__module__.startswith("httpx"):
                kind = type(one).__name__
                return HubError(f"{what} failed: {self.endpoint} cannot be reached ({kind})")
        wrong = ValueError | KeyError | TypeError | AttributeError | IndexError
        if isinstance(error, wrong):  # the client met an answer it cannot read
            said = self._plain(error)
            return HubError(f"{what} failed: {self.endpoint} gave a wrong answer ({said})")
        return None

    def _reason(self, answer: Any) -> str:
        """Return why a Hub refused, in its own words where it has some."""
        status = answer.status_code
        said = answer.headers.get("X-Error-Message") or CODES.get(status) or ""
        if status == 404 and not said:
            said = "not found (or private, and the token does not give access)"
        if status == 416 or status >= 500:
            said = said or "the server failed"
        return f"HTTP {status} {self._plain(said)}".rstrip()

    def _plain(self, text: object) -> str:
        """Return what a Hub says as one short line, without the token, should it echo that."""
        said = str(text)
        return plain(said.replace(self._token, "<token>") if self._token else said)


def _token_of_user() -> str | None:
    """Return the token in the environment: the one that is kept on disk belongs to huggingface.co."""
    return os.environ.get("HF_TOKEN") or None


def _remote_file(entry: Any) -> RemoteFile | None:
    """Return a file as a Hub lists it, None for one of which too little is said to check it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
        return None
    lfs = entry.get("lfs") if isinstance(entry.get("lfs"), dict) else {}
    size = (lfs or {}).get("size", entry.get("size"))
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        return None
    sha256, blob = (lfs or {}).get("sha256"), entry.get("blobId")
    if isinstance(sha256, str) and SHA256.fullmatch(sha256):
        return RemoteFile(entry["rfilename"], size, sha256=sha256)
    if not lfs and isinstance(blob, str) and GIT.fullmatch(blob):
        return RemoteFile(entry["rfilename"], size, blob=blob)
    return None  # nothing says what is in it


def plain(text: object) -> str:
    """Return a foreign text as one short line without control characters."""
    return re.sub(r"[^ -~]", " ", str(text))[:200].strip()


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep the client's advice about Xet to itself, and its bars about nothing."""
    logger, bars = logging.getLogger(name), not are_progress_bars_disabled()
    before, logger.disabled = logger.disabled, True
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.disabled = before
        if bars:
            enable_progress_bars()
