"""The client of a Hub: every request goes to the chosen endpoint, within limits of bytes and time.

`huggingface_hub` implements the protocol. Downloads are read here, with bounds of this project: the library's
downloader trusts the file names, hashes and sizes that a server sends. Requests to hosts other than the
endpoint's, redirects among them, are refused before they are sent; no other host receives the token.
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
from adapterhub_chat.remote.limits import Bounds, run_within
from adapterhub_chat.remote.names import (
    COMMIT_PATTERN,
    PUBLIC_ENDPOINT,
    check_endpoint,
    check_repo,
    check_revision,
)

MAX_ANSWER_BYTES = 4 * 2**20
"""Of a JSON response."""
BASE_TIMEOUT, MIN_BYTES_PER_SECOND = 30.0, 50_000
"""Seconds that every exchange may take, and the slowest rate of a file, which adds to them."""
MAX_COMMIT_TRIES, FIRST_RETRY_SECONDS = 40, 0.05
"""Tries of a commit that conflicts with others, and the seconds before the second try, doubled each time."""
STATUS_REASONS = {
    401: "the token is missing or not valid",
    403: "the token does not give the right to do this",
}

MAX_REDIRECTS = 5
"""Of one request."""
SHA256_PATTERN, GIT_HASH_PATTERN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, as its Hub describes it."""

    name: str
    size: int
    sha256: str = ""
    """Of its content; empty for small files."""
    blob: str = ""
    """Git's hash of its content; empty for large files."""


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class DownloadedFile:
    """The size and the computed hash of a downloaded file."""

    size: int
    sha256: str


class HubClient:
    """A client of the Hub at one endpoint, with one token or none."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        """Use HF_ENDPOINT, else huggingface.co, when `endpoint` is None.

        When `token` is None, HF_TOKEN (or the one that `hf auth login` has stored) is used, but only at the
        user's default endpoint. Raises UsageError for an invalid endpoint.
        """
        default = os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT
        self.endpoint, self._allowed = check_endpoint(endpoint or default)
        if token is None and self.endpoint == default.rstrip("/"):
            token = (
                huggingface_hub.get_token()
                if self.endpoint == PUBLIC_ENDPOINT
                else _token_of_user()
            )
        self._token: str | Literal[False] = token or False
        self._api = HfApi(endpoint=self.endpoint, token=self._token, library_name="adapterhub-chat")

    def __repr__(self) -> str:
        """Return the endpoint, without the token."""
        return f"Hub({self.endpoint!r})"

    # -- reading -----------------------------------------------------------------------------------

    def snapshot(self, repo: str, revision: str | None = None) -> Snapshot:
        """Resolve a branch, tag or commit (None: main) to a commit and its files.

        Raises HubError when it does not exist, UsageError for an invalid name.
        """
        check_repo(repo)
        revision_name = check_revision(revision or "main")
        answer = self._get_json(
            f"/api/models/{repo}/revision/{quote(revision_name, safe='')}?blobs=true", repo
        )
        commit, files = answer.get("sha"), answer.get("siblings")
        if not isinstance(commit, str) or not COMMIT_PATTERN.fullmatch(commit):
            raise HubError(
                f"{self.endpoint} names no commit for {repo} at {revision_name!r}: {commit!r:.80}"
            )
        if COMMIT_PATTERN.fullmatch(revision_name) and commit != revision_name:
            raise HubError(
                f"{self.endpoint} answers for {repo} with {commit}, not with {revision_name}"
            )
        if not isinstance(files, list):
            raise HubError(f"{self.endpoint} lists no files of {repo} at {revision_name!r}")
        return Snapshot(
            repo, commit, {f.name: f for f in map(_remote_file, files) if f is not None}
        )

    def download(self, snapshot: Snapshot, name: str, target: Path, limit: int) -> DownloadedFile:
        """Write one file of a snapshot to `target`, which must not exist; return its size and sha256.

        At most `limit` bytes are read. Raises HubError unless size and hash are those of the snapshot.
        """
        file = snapshot.files[name]
        label = f"{name} of {snapshot.repo}"
        if file.size > limit:
            raise HubError(f"{label} has {file.size:,} bytes; at most {limit:,} are taken")
        path = f"/{snapshot.repo}/resolve/{snapshot.commit}/{quote(name)}"

        def write() -> tuple[int, str, str]:
            sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size)
            size = 0
            with target.open("xb") as out:
                for piece in self._stream(path, label):
                    size += out.write(piece)
                    sha256.update(piece)
                    blob.update(piece)
            return size, sha256.hexdigest(), blob.hexdigest()

        size, sha256, blob = self._call(f"reading {label}", write, file.size, file.size)
        if size != file.size:
            raise HubError(f"{label} ended after {size:,} of {file.size:,} bytes")
        mismatches = [
            f"the {kind} {actual}, not {expected}"
            for kind, actual, expected in (
                ("sha256", sha256, file.sha256),
                ("git hash", blob, file.blob),
            )
            if expected and expected != actual
        ]
        if mismatches:
            raise HubError(f"{label} has {' and '.join(mismatches)}")
        return DownloadedFile(size, sha256)

    def list_models(
        self, tags: Sequence[str], text: str = "", author: str = "", limit: int = 20
    ) -> list[Any]:
        """Return the JSON objects of the newest models that have all the tags."""
        parameters = [("filter", tag) for tag in tags] + [("limit", str(limit)), ("full", "true")]
        parameters += [(k, v) for k, v in (("search", text), ("author", author)) if v]
        query = urlencode([*parameters, ("sort", "lastModified"), ("cardData", "true")])
        answer = self._get_json(f"/api/models?{query}", "the search", list)
        return [entry for entry in answer[:limit] if isinstance(entry, dict)]

    def tags(self, repo: str) -> dict[str, str]:
        """Return a repository's tags, each with its commit."""
        tags = self._get_json(f"/api/models/{check_repo(repo)}/refs", repo).get("tags")
        entries = [e for e in tags if isinstance(e, dict)] if isinstance(tags, list) else []
        return {str(e.get("name")): str(e.get("targetCommit")) for e in entries}

    # -- writing -----------------------------------------------------------------------------------

    def create(self, repo: str, *, private: bool) -> None:
        """Create a repository; an existing one stays as it is."""
        check_repo(repo)
        self._call(
            f"creating {repo}",
            lambda: self._api.create_repo(repo, private=private or None, exist_ok=True),
        )

    def commit(self, repo: str, files: Mapping[str, bytes], message: str) -> str:
        """Put all files into one commit on main; return the commit's id.

        After a conflict with another commit it is tried again on top of that one. Raises HubError.
        """
        size = sum(map(len, files.values()))
        for attempt in range(MAX_COMMIT_TRIES):
            head = self.snapshot(repo).commit

            def push(head: str = head) -> str | None:
                return self._commit_on(head, repo, files, message)

            if (commit := self._call(f"pushing to {repo}", push, size)) is not None:
                return commit
            time.sleep(random.uniform(0.5, 1.5) * min(FIRST_RETRY_SECONDS * 2**attempt, 2.0))
        raise HubError(
            f"{repo} is committed to all the time; {MAX_COMMIT_TRIES} tries met another commit each"
        )

    def _commit_on(
        self, head: str, repo: str, files: Mapping[str, bytes], message: str
    ) -> str | None:
        """Return the new commit on top of `head`, None when another one came first."""
        # as streams, which the client uploads as plain large files; other data would go to the Xet servers
        operations = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
        try:
            with _muted_logger("huggingface_hub._commit_api"):
                for (
                    operation
                ) in operations:  # one by one: several would be sent by threads without bounds
                    self._api.preupload_lfs_files(
                        repo, [operation], num_threads=1, free_memory=False
                    )
                result = self._api.create_commit(
                    repo, operations, commit_message=message, parent_commit=head, num_threads=1
                )
        except HfHubHTTPError as error:
            if _status(error) in (409, 412):
                return None
            raise
        if not isinstance(result.oid, str) or not COMMIT_PATTERN.fullmatch(result.oid):
            raise HubError(f"{self.endpoint} names no commit after pushing to {repo}")
        return result.oid

    def tag(self, repo: str, name: str, commit: str) -> bool:
        """Tag a commit; return False, with nothing changed, when the tag exists."""
        check_revision(name)

        def create() -> bool:
            try:
                self._api.create_tag(repo, tag=name, revision=commit)
            except HfHubHTTPError as error:
                if _status(error) != 409:
                    raise
                return False
            return True

        return self._call(f"tagging {repo} as {name}", create)

    # -- inside ------------------------------------------------------------------------------------

    def _get_json(self, path: str, what: str, kind: type = dict) -> Any:
        data = self._call(f"reading {what}", lambda: b"".join(self._stream(path, what)))
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HubError(f"{self.endpoint} answers about {what} with no JSON") from error
        if not isinstance(value, kind):
            raise HubError(f"{self.endpoint} answers about {what} with JSON of another form")
        return value

    def _stream(self, path: str, what: str) -> Iterator[bytes]:
        """Yield the bytes of the response to GET `path`; the hooks check each redirect."""
        client = get_session()
        headers = build_hf_headers(token=self._token, library_name="adapterhub-chat")
        request = client.build_request("GET", self.endpoint + path, headers=headers)
        for _ in range(MAX_REDIRECTS):
            answer = client.send(request, stream=True, follow_redirects=False)
            with closing(answer):
                if answer.next_request is None:
                    if answer.status_code >= 300:
                        raise HubError(f"{self._reason(answer)}: {what} at {self.endpoint}")
                    yield from answer.iter_raw()
                    return
                request = answer.next_request
        raise HubError(f"{self.endpoint} sends on for {what} more than {MAX_REDIRECTS} times")

    def _call(
        self, what: str, work: Callable[[], _T], size: int = 0, max_bytes: int = MAX_ANSWER_BYTES
    ) -> _T:
        """Return what `work` returns; its requests are bounded by `max_bytes` of response.

        The time limit grows with `size`, the bytes to transfer. Every failure is a HubError about `what`.
        """
        end = time.monotonic() + BASE_TIMEOUT + size / MIN_BYTES_PER_SECOND
        try:
            return run_within(Bounds(self._allowed, max_bytes, end), what, work)
        except (HubError, UsageError):
            raise
        except Exception as error:
            if (explanation := self._as_hub_error(error, what)) is None:
                raise
            raise explanation from None  # the cause may hold headers

    def _as_hub_error(self, error: Exception, what: str) -> HubError | None:
        """Return an error of the client or the network as a HubError; None for any other error."""
        chain = [error, *filter(None, (error.__cause__, error.__context__))]
        for link in chain:
            if isinstance(link, HubError):
                return link
            if isinstance(link, OfflineModeIsEnabled):
                return HubError(f"{what} needs {self.endpoint}, and HF_HUB_OFFLINE is set")
            if isinstance(link, HfHubHTTPError):
                return HubError(f"{what} failed: {self._reason(link.response)} at {self.endpoint}")
            unreachable = isinstance(link, ConnectionError | TimeoutError)
            if unreachable or type(link).__module__.startswith("httpx"):
                kind = type(link).__name__
                return HubError(f"{what} failed: {self.endpoint} cannot be reached ({kind})")
        answer_errors = ValueError | KeyError | TypeError | AttributeError | IndexError
        if isinstance(error, answer_errors):  # the client met an answer it cannot read
            message = self._printable(error)
            return HubError(f"{what} failed: {self.endpoint} gave a wrong answer ({message})")
        return None

    def _reason(self, answer: Any) -> str:
        """Return why a Hub refused: its own message, or the meaning of the status."""
        status = answer.status_code
        message = answer.headers.get("X-Error-Message") or STATUS_REASONS.get(status) or ""
        if status == 404 and not message:
            message = "not found (or private, and the token does not give access)"
        if status == 416 or status >= 500:
            message = message or "the server failed"
        return f"HTTP {status} {self._printable(message)}".rstrip()

    def _printable(self, text: object) -> str:
        """Return a Hub's text as one short line, with the token masked."""
        message = str(text)
        return printable_line(message.replace(self._token, "<token>") if self._token else message)


def _token_of_user() -> str | None:
    """Return the token in the environment; the one stored on disk is for huggingface.co alone."""
    return os.environ.get("HF_TOKEN") or None


def _remote_file(entry: Any) -> RemoteFile | None:
    """Return a file of a Hub's listing, None when its size or hash is missing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
        return None
    lfs = entry.get("lfs") if isinstance(entry.get("lfs"), dict) else {}
    size = (lfs or {}).get("size", entry.get("size"))
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        return None
    sha256, blob = (lfs or {}).get("sha256"), entry.get("blobId")
    if isinstance(sha256, str) and SHA256_PATTERN.fullmatch(sha256):
        return RemoteFile(entry["rfilename"], size, sha256=sha256)
    if not lfs and isinstance(blob, str) and GIT_HASH_PATTERN.fullmatch(blob):
        return RemoteFile(entry["rfilename"], size, blob=blob)
    return None


def printable_line(text: object) -> str:
    """Return a text from a Hub as one line of at most 200 printable ASCII characters."""
    return re.sub(r"[^ -~]", " ", str(text))[:200].strip()


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


@contextlib.contextmanager
def _muted_logger(name: str) -> Iterator[None]:
    """Disable a logger and the library's progress bars inside the block."""
    logger, bars_enabled = logging.getLogger(name), not are_progress_bars_disabled()
    was_disabled, logger.disabled = logger.disabled, True
    if bars_enabled:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.disabled = was_disabled
        if bars_enabled:
            enable_progress_bars()
