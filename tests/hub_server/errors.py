"""Error replies: a status, a message, and a code that selects the client's exception."""

from __future__ import annotations

from typing import Any

STALE = "The branch was updated since you opened this page. Please refresh and try again."
BUSY = "Another commit operation is in progress for this repository. Please try again later."


class HubError(Exception):
    """An answer of 400 or more; `body` adds to its JSON, `headers` to its headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **(body or {})}
        line = " ".join(message.encode("ascii", "replace").decode().split())
        self.headers = {"X-Error-Message": line, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


def repo_not_found() -> HubError:
    """The same error for a missing repository and for one that the caller may not read."""
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(message: str, commit: str = "") -> HubError:
    headers = {"X-Repo-Commit": commit} if commit else None
    return HubError(404, message, "EntryNotFound", headers=headers)
