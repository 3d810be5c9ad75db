"""Operations of a commit: JSON lines, validated, and applied to a tree all together or not at all."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from .blobs import Entry, Tree
from .card import read_card
from .errors import HubError, entry_not_found

MOST_PATH, MOST_NAME = 1000, 255


def check_path(path: str) -> str:
    """Return a normalised path of a tree; ValueError for one that leads out of it."""
    names = path.rstrip("/").split("/")
    if any(name in {"", ".", ".."} or name.lower() == ".git" for name in names):
        raise ValueError(f"{path!r} is no path within a repository")
    if "\\" in path or not path.isprintable():
        raise ValueError(f"{path!r} holds characters that no path may hold")
    if len(path) > MOST_PATH or max(map(len, names)) > MOST_NAME:
        raise ValueError(f"{path[:40]!r}... is too long")
    return "/".join(names)


def _decode(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("content is no text")
    return base64.b64decode(text, validate=True)


RepoPath = Annotated[str, AfterValidator(check_path)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Content = Annotated[bytes, BeforeValidator(_decode)]


class Header(BaseModel):
    """The first line."""

    summary: str = Field(min_length=1)
    description: str = ""
    parentCommit: str | None = Field(None, pattern="^[0-9a-f]{5,40}$")


class File(BaseModel):
    """A file with its content in the commit."""

    path: RepoPath
    content: Content
    encoding: Literal["base64"]


class LfsFile(BaseModel):
    """A file whose content was uploaded before."""

    path: RepoPath
    algo: Literal["sha256"]
    oid: Sha256
    size: int | None = Field(None, ge=0)


class DeletedFile(BaseModel):
    """A file to remove."""

    path: RepoPath


class DeletedFolder(BaseModel):
    """A folder to remove with its content."""

    path: RepoPath


class Line(BaseModel):
    """One line of a commit."""

    key: Literal["header", "file", "lfsFile", "deletedFile", "deletedFolder"]
    value: dict[str, object]


Operation = File | LfsFile | DeletedFile | DeletedFolder
KINDS: dict[str, type[Header] | type[Operation]] = {
    "header": Header,
    "file": File,
    "lfsFile": LfsFile,
    "deletedFile": DeletedFile,
    "deletedFolder": DeletedFolder,
}


@dataclass(frozen=True)
class Changes:
    """A well-formed commit; conflicts with its branch are found when it is applied."""

    header: Header
    operations: tuple[Operation, ...]


def read_changes(body: bytes) -> Changes:
    """Return the operations of the lines; the first invalid line is an error."""
    header, *rest = [
        _read_line(number, line)
        for number, line in enumerate(body.split(b"\n"), 1)
        if line.strip() or number == 1
    ]
    operations = tuple(line for line in rest if not isinstance(line, Header))
    if not isinstance(header, Header) or len(operations) < len(rest):
        raise HubError(400, "A commit is one header and then its operations.")
    return Changes(header, operations)


def _read_line(number: int, text: bytes) -> Header | Operation:
    try:
        line = Line.model_validate_json(text)
        return KINDS[line.key].model_validate(line.value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HubError(400, f"Line {number} of the commit: {where}: {first['msg']}") from None


def changed(
    tree: Tree,
    operations: tuple[Operation, ...],
    add: Callable[[bytes], Entry],
    link: Callable[[str, int | None], Entry],
) -> Tree:
    """Return the tree after the operations, in their order; `add` keeps contents, `link` finds objects."""
    tree = dict(tree)
    for operation in operations:
        if isinstance(operation, File):
            _check_card(operation)
            tree[operation.path] = add(operation.content)
        elif isinstance(operation, LfsFile):
            tree[operation.path] = link(operation.oid, operation.size)
        else:
            _remove(tree, operation)
    _check_clashes(tree)
    return tree


def _remove(tree: Tree, operation: DeletedFile | DeletedFolder) -> None:
    path = operation.path
    folder = isinstance(operation, DeletedFolder)
    gone = [p for p in tree if (p.startswith(f"{path}/") if folder else p == path)]
    if not gone:
        kind = "folder" if folder else "file"
        raise entry_not_found(f"A {kind} with this name doesn't exist: {path}")
    for name in gone:
        del tree[name]


def _check_card(file: File) -> None:
    try:
        if file.path == "README.md":
            read_card(file.content.decode())
    except ValueError as error:
        raise HubError(400, f"Invalid metadata in README.md. {error}") from error


def _check_clashes(tree: Tree) -> None:
    folders = {str(parent) for path in tree for parent in PurePosixPath(path).parents}
    if clash := sorted(folders & tree.keys()):
        raise HubError(400, f"{json.dumps(clash[0])} is both a file and a folder.")
