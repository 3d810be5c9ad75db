"""The Hub that tests push to: the real client is its judge, beside raw requests that no client would send."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Reply, after, fail, only
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

ROOT = Path(__file__).parents[2]
USERS = {"alice": "hf_alice", "bob": "hf_bob"}
CARD = """---
base_model: pico/llama
language: [en, zh]
library_name: peft
license: mit
pipeline_tag: text-generation
tags: [sentiment]
datasets: reviews
---
# An adapter
"""
WEIGHTS = save({"a": torch.arange(1000.0), "b": torch.zeros(8, 8)})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
WEIGHTS_FILE = "adapter_model.safetensors"
WANTED = {"oid": SHA256, "size": len(WEIGHTS)}


def api(server, user="alice"):
    return HfApi(endpoint=server.endpoint, token=USERS[user] if user else False)


def add(path, data):
    """A file in memory: the client sends those by LFS, not by Xet."""
    return CommitOperationAdd(path, io.BytesIO(data))


def push(server, files, message="push", repo="alice/x", user="alice", **options):
    """Commit {path: bytes}, None deletes; return the commit's id."""
    operations = [
        CommitOperationDelete(path) if data is None else add(path, data)
        for path, data in files.items()
    ]
    done = api(server, user).create_commit(repo, operations, commit_message=message, **options)
    return done.oid


def ask(server, method, path, body=None, token="hf_alice", **headers):
    """A request as it is written here; a body that is no bytes goes as JSON."""
    if token:
        headers["authorization"] = f"Bearer {token}"
    what = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}
    return get_session().request(
        method, path if "://" in path else server.endpoint + path, headers=headers, **what
    )


def status(error):
    return error.value.response.status_code


def refused(code, function, *arguments, **options):
    """Call; return what the server said when it refused."""
    with pytest.raises(HfHubHTTPError) as error:
        function(*arguments, **options)
    assert status(error) == code
    return error.value.server_message or ""


def download(server, path, cache, repo="alice/x", token="hf_alice", **options):
    found = hf_hub_download(
        repo, path, endpoint=server.endpoint, cache_dir=cache, token=token, **options
    )
    return Path(found).read_bytes()


def head(server, repo="alice/x", **options):
    return api(server).model_info(repo, **options).sha


def state(server, repo="alice/x"):
    """All that a change could be seen by."""
    client = api(server)
    return client.list_repo_refs(repo), list(client.list_repo_tree(repo, recursive=True))


@pytest.fixture
def server(hub_server):
    """With the repository alice/x."""
    api(hub_server).create_repo("alice/x")
    return hub_server


# ---- users and repositories ----------------------------------------------------------------------


def test_a_token_identifies_its_user(hub_server):
    assert api(hub_server).whoami()["name"] == "alice"
    assert api(hub_server, "bob").whoami()["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub_server.endpoint, token="hf_wrong").whoami()


def test_a_repository_is_made_once(hub_server):
    client = api(hub_server)
    url = client.create_repo("alice/x")
    assert (url, url.repo_id) == (f"{hub_server.endpoint}/alice/x", "alice/x")
    assert client.create_repo("alice/x", exist_ok=True) == url
    assert "already created" in refused(409, client.create_repo, "alice/x")
    assert client.create_repo("x2").repo_id == "alice/x2"
    assert client.create_repo("alice/x", repo_type="dataset").repo_type == "dataset"
    assert "namespace 'bob'" in refused(403, client.create_repo, "bob/x")
    assert not api(hub_server, "bob").repo_exists("bob/x")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../x", "a/b", "a--b", "x.git", ".x", "", "a" * 97, "a\x1b"])
def test_a_repository_has_a_plain_name(hub_server, name):
    done = ask(hub_server, "POST", "/api/repos/create", {"name": name, "organization": "alice"})
    assert done.status_code == 400


@pytest.mark.slow
def test_a_deleted_repository_is_gone(server):
    push(server, {WEIGHTS_FILE: WEIGHTS})
    assert "rights" in refused(403, api(server, "bob").delete_repo, "alice/x")
    api(server).delete_repo("alice/x")
    assert not api(server).repo_exists("alice/x")
    refused(404, api(server).delete_repo, "alice/x")
    api(server).create_repo("alice/x")
    assert api(server).list_repo_files("alice/x") == [".gitattributes"]


def test_a_private_repository_is_reported_as_missing(hub_server, tmp_path):
    api(hub_server).create_repo("alice/secret", private=True)
    push(hub_server, {"a.txt": b"a"}, repo="alice/secret")
    for user in ("bob", None):
        client = api(hub_server, user)
        for repo in ("alice/secret", "alice/nothing"):
            for call in (client.model_info, client.list_repo_refs, client.auth_check):
                with pytest.raises(RepositoryNotFoundError):
                    call(repo)
            with pytest.raises(RepositoryNotFoundError):
                download(hub_server, "a.txt", tmp_path, repo, token=client.token)
        assert list(client.list_models()) == []
    with pytest.raises(RepositoryNotFoundError):
        push(hub_server, {"b.txt": b"b"}, repo="alice/secret", user="bob")
    answers = {
        (done.status_code, done.text, done.headers["x-error-code"])
        for repo, path in itertools.product(
            ("secret", "nothing"), ("", "/tree/main", "/revision/no")
        )
        for done in [ask(hub_server, "GET", f"/api/models/alice/{repo}{path}", token="hf_bob")]
    }
    assert answers == {(404, '{"error":"Repository not found"}', "RepoNotFound")}
    assert [m.id for m in api(hub_server).list_models()] == ["alice/secret"]
    api(hub_server).update_repo_settings("alice/secret", private=False)
    assert download(hub_server, "a.txt", tmp_path, "alice/secret", token=False) == b"a"


@pytest.mark.slow
def test_a_revoked_token_is_rejected(server, tmp_path):
    server.revoke("hf_alice")
    for call in (api(server).model_info, api(server).create_repo):
        assert refused(401, call, "alice/x") == "Invalid credentials in Authorization header"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        download(server, ".gitattributes", tmp_path)
    assert download(server, ".gitattributes", tmp_path, token=False)


@pytest.mark.slow
def test_only_the_owner_may_change_a_public_repository(server):
    server.grant("alice", "hf_reader", role="read")
    reader = HfApi(endpoint=server.endpoint, token="hf_reader")
    before = state(server)
    for client, code in ((api(server, "bob"), 403), (reader, 403), (api(server, None), 401)):
        client.auth_check("alice/x")
        refused(code, client.auth_check, "alice/x", write=True)
        refused(code, client.create_tag, "alice/x", tag="v1")
        refused(code, client.create_branch, "alice/x", branch="b")
        refused(code, client.update_repo_settings, "alice/x", private=True)
        operation = [add("a.txt", b"a")]
        refused(code, client.create_commit, "alice/x", operation, commit_message="m")
    assert state(server) == before
    api(server).auth_check("alice/x", write=True)


# ---- files in and out ----------------------------------------------------------------------------


def test_downloads_equal_uploads(server, tmp_path):
    oid = push(server, {"README.md": CARD.encode(), f"es/{WEIGHTS_FILE}": WEIGHTS, "empty": b""})
    assert head(server) == oid
    (put,) = [request for request in server.requests if request.method == "PUT"]
    assert "authorization" not in put.headers
    for path, data in {"README.md": CARD.encode(), f"es/{WEIGHTS_FILE}": WEIGHTS}.items():
        assert download(server, path, tmp_path, revision="main") == data
    folder = Path(snapshot_download("alice/x", endpoint=server.endpoint, cache_dir=tmp_path))
    assert folder.name == oid
    assert (folder / "es" / WEIGHTS_FILE).read_bytes() == WEIGHTS
    assert (folder / "empty").read_bytes() == b""
    with pytest.raises(EntryNotFoundError) as error:
        download(server, "no", tmp_path)
    assert error.value.response.headers["x-repo-commit"] == oid
    with pytest.raises(RevisionNotFoundError):
        download(server, "README.md", tmp_path, revision="no")


def test_files_are_listed_with_their_sizes_and_hashes(server):
    push(server, {"README.md": CARD.encode(), f"es/{WEIGHTS_FILE}": WEIGHTS, "es/a b.txt": b"x"})
    client = api(server)
    tree = {entry.path: entry for entry in client.list_repo_tree("alice/x", recursive=True)}
    assert list(tree) == sorted(tree)
    assert {*tree} == {".gitattributes", "README.md", "es", f"es/{WEIGHTS_FILE}", "es/a b.txt"}
    weights = tree[f"es/{WEIGHTS_FILE}"]
    assert (weights.size, weights.lfs.sha256, weights.lfs.size) == (
        len(WEIGHTS),
        SHA256,
        len(WEIGHTS),
    )
    git = hashlib.sha1(b"blob %d\0" % len(CARD) + CARD.encode()).hexdigest()
    assert (tree["README.md"].blob_id, tree["README.md"].lfs) == (git, None)
    top = {entry.path for entry in client.list_repo_tree("alice/x")}
    assert top == {".gitattributes", "README.md", "es"}
    assert [e.path for e in client.list_repo_tree("alice/x", "es")] == ["es/a b.txt", weights.path]
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree("alice/x", "no"))
    found = client.get_paths_info("alice/x", ["es", weights.path, "no"])
    assert found == [tree["es"], weights]
    siblings = client.model_info("alice/x", files_metadata=True).siblings
    assert {s.rfilename: s.size for s in siblings}[weights.path] == len(WEIGHTS)
    assert {s.lfs.sha256 for s in siblings if s.lfs} == {SHA256}


def test_a_range_request_returns_only_the_range(server):
    push(server, {WEIGHTS_FILE: WEIGHTS})
    path = f"/alice/x/resolve/main/{WEIGHTS_FILE}"
    size = len(WEIGHTS)
    for text, wanted in {
        "bytes=0-9": slice(0, 10),
        "bytes=100-": slice(100, size),
        "bytes=-7": slice(size - 7, size),
        f"bytes=10-{size + 50}": slice(10, size),
    }.items():
        done = ask(server, "GET", path, range=text)
        assert (done.status_code, done.content) == (206, WEIGHTS[wanted])
        assert done.headers["content-range"] == f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
    done = ask(server, "GET", path, range="bytes=0-1,5-6")
    assert (done.status_code, done.content) == (200, WEIGHTS)
    done = ask(server, "GET", path, range=f"bytes={size}-")
    assert (done.status_code, done.headers["content-range"]) == (416, f"bytes */{size}")
    done = ask(server, "HEAD", path, range="bytes=0-9")
    assert (done.headers["content-length"], done.content) == ("10", b"")
    assert done.headers["etag"] == done.headers["x-linked-etag"] == f'"{SHA256}"'
    assert done.headers["x-linked-size"] == str(size)


@pytest.mark.slow
def test_a_safetensors_header_is_read_by_range(server):
    push(server, {WEIGHTS_FILE: WEIGHTS})
    found = api(server).parse_safetensors_file_metadata("alice/x", WEIGHTS_FILE)
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        "a": [1000],
        "b": [8, 8],
    }
    files = HfFileSystem(endpoint=server.endpoint, token="hf_alice", skip_instance_cache=True)
    assert files.cat_file(f"alice/x/{WEIGHTS_FILE}", start=20, end=40) == WEIGHTS[20:40]


@pytest.mark.slow
def test_large_objects_travel_in_parts(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, part_size=1000) as server:
        api(server).create_repo("alice/x")
        push(server, {WEIGHTS_FILE: WEIGHTS})
        puts = [r for r in server.requests if r.method == "PUT"]
        assert len(puts) == -(-len(WEIGHTS) // 1000) > 4
        assert not any("authorization" in r.headers for r in puts)
        assert download(server, WEIGHTS_FILE, tmp_path) == WEIGHTS
    assert not list((tmp_path / "hub" / "blobs" / "incoming").iterdir())


@pytest.mark.slow
def test_without_lfs_every_file_comes_in_the_commit(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, lfs_over=None) as server:
        api(server).create_repo("alice/x")
        operation = CommitOperationAdd(WEIGHTS_FILE, WEIGHTS)  # for Xet, if the server had any
        api(server).create_commit("alice/x", [operation], commit_message="m")
        assert download(server, WEIGHTS_FILE, tmp_path) == WEIGHTS
        assert not any(request.method == "PUT" for request in server.requests)


# ---- commits -------------------------------------------------------------------------------------


def test_what_has_not_changed_makes_no_commit(server):
    files = {"a.txt": b"a", WEIGHTS_FILE: WEIGHTS}
    oid = push(server, files)
    assert push(server, files) == oid
    assert push(server, {**files, "a.txt": b"b"}) != oid
    assert sum(request.method == "PUT" for request in server.requests) == 1


@pytest.mark.slow
def test_files_are_deleted_and_copied_with_others_in_one_commit(server, tmp_path):
    push(server, {"a.txt": b"a", "es/b.txt": b"b", "es/c/d.txt": b"d", WEIGHTS_FILE: WEIGHTS})
    copies = [
        CommitOperationCopy(WEIGHTS_FILE, "old/w.safetensors"),
        CommitOperationCopy("a.txt", "b"),
    ]
    deletes = [CommitOperationDelete("a.txt"), CommitOperationDelete("es/")]
    client = api(server)
    client.create_commit("alice/x", [*copies, *deletes], commit_message="tidy")
    assert {*client.list_repo_files("alice/x")} == {
        ".gitattributes",
        WEIGHTS_FILE,
        "old/w.safetensors",
        "b",
    }
    assert download(server, "old/w.safetensors", tmp_path) == WEIGHTS
    before = state(server)
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        push(server, {"new.txt": b"new", "no.txt": None})
    assert state(server) == before


def test_a_commit_on_a_parent_that_was_passed_is_refused(server):
    first = head(server)
    second = push(server, {"a.txt": b"1"}, parent_commit=first)
    before = state(server)
    said = refused(412, push, server, {"a.txt": b"2"}, parent_commit=first)
    assert (
        said == "The branch was updated since you opened this page. Please refresh and try again."
    )
    assert state(server) == before
    assert push(server, {"a.txt": b"2"}, parent_commit=second[:8]) == head(server)


@pytest.mark.slow
def test_old_commits_stay_readable(server, tmp_path):
    ids = [push(server, {"a.txt": str(n).encode()}, f"step {n}") for n in range(3)]
    commits = api(server).list_repo_commits("alice/x")
    assert [c.title for c in commits] == ["step 2", "step 1", "step 0", "initial commit"]
    assert [c.commit_id for c in commits[:3]] == ids[::-1]
    assert commits[0].authors == ["alice"]
    assert len(api(server).list_repo_commits("alice/x", revision=ids[0])) == 2
    assert [download(server, "a.txt", tmp_path, revision=i) for i in ids] == [b"0", b"1", b"2"]
    assert api(server).model_info("alice/x", revision=ids[0]).sha == ids[0]


def line(key, **value):
    return json.dumps({"key": key, "value": value}).encode() + b"\n"


def file(path, content=None, encoding="base64"):
    text = base64.b64encode(b"x").decode() if content is None else content
    return line("file", path=path, content=text, encoding=encoding)


HEADER = line("header", summary="m", description="")
LINK = {"path": "w.safetensors", "algo": "sha256", "oid": "ab" * 32}
BAD_HEADERS = {
    "nothing": b"",
    "no header": file("a"),
    "two headers": HEADER + HEADER,
    "header without summary": line("header", description=""),
    "empty summary": line("header", summary=""),
    "parent that is no id": line("header", summary="m", parentCommit="main"),
}
BAD_OPERATIONS = {
    "garbage": b"\xff\x00 no json\n",
    "half a line": file("a")[:-9],
    "a list": b"[1]\n",
    "NaN": b'{"key": "file", "value": NaN}\n',
    "half a character": file("\ud800"),
    "unknown key": line("chmod", path="a"),
    "no path": line("deletedFile"),
    "bad base64": file("a", "!!!!"),
    "base64 with a hole": file("a", "YQ=\n="),
    "content that is no text": file("a", 7),
    "other encoding": file("a", encoding="utf-8"),
    "up": file("../a"),
    "up within": file("a/../../b"),
    "dot": file("./a"),
    "absolute": file("/etc/passwd"),
    "empty path": file(""),
    "empty name": file("a//b"),
    "git's folder": file(".git/hooks/post-checkout"),
    "backslash": file("..\\a"),
    "NUL": file("a\0b"),
    "escape": file("a\x1b[2J"),
    "long name": file("a" * 256),
    "file under a file": file("a.txt/b"),
    "file over a folder": file("es"),
    "object that was not uploaded": line("lfsFile", **LINK),
    "other algorithm": line("lfsFile", **{**LINK, "algo": "md5"}),
    "oid that is no sha256": line("lfsFile", **{**LINK, "oid": "../../x"}),
    "card with a list": file("README.md", base64.b64encode(b"---\n- a\n---\n").decode()),
}
GOOD = HEADER + file("good.txt")
BAD_COMMITS = BAD_HEADERS | {name: GOOD + text for name, text in BAD_OPERATIONS.items()}


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A server for many requests that change nothing."""
    with (
        pytest.MonkeyPatch.context() as patch,
        HubServer(tmp_path_factory.mktemp("hub"), USERS) as server,
    ):
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        api(server).create_repo("alice/x")
        push(server, {"a.txt": b"a", "es/b.txt": b"b", WEIGHTS_FILE: WEIGHTS})
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("body", BAD_COMMITS.values(), ids=BAD_COMMITS)
def test_a_bad_commit_changes_no_branch(standing, body):
    before = state(standing)
    done = ask(standing, "POST", "/api/models/alice/x/commit/main", body)
    assert done.status_code == 400, done.text
    assert done.json()["error"]
    assert state(standing) == before


@pytest.mark.slow
def test_a_commit_goes_to_a_branch_only(standing):
    before = state(standing)
    for revision in ("no", head(standing), "refs%2Fpr%2F1", "..%2F..%2Fx", "a" * 300):
        path = f"/api/models/alice/x/commit/{revision}"
        done = ask(standing, "POST", path, HEADER + file("a"))
        assert (done.status_code, done.headers["x-error-code"]) == (404, "RevisionNotFound")
    assert state(standing) == before


@pytest.mark.slow
def test_a_card_is_checked(server):
    deep = f"a: {'[' * 500}{']' * 500}"
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
    for text in (bomb, "[1, 2]", "a: [", "a: !!python/object:os.system x", deep, "a: .nan"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            push(server, {"README.md": f"---\n{text}\n---\n".encode()})
        server.plant("alice/x", {"README.md": f"---\n{text}\n---\n".encode()})
        assert api(server).model_info("alice/x").tags == []
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(server, {"README.md": b"# Nothing\n"})


@pytest.mark.slow
def test_concurrent_pushes_lose_no_commit(server):
    """Read, add a line, push on what was read; when that was passed, again."""

    def add_lines(worker):
        for name in (f"{worker}.0", f"{worker}.1"):
            while not add_line(name):
                pass

    def add_line(name):
        parent = head(server)
        lines = ask(server, "GET", f"/alice/x/resolve/{parent}/lines.txt").content
        files = {"lines.txt": lines + f"{name}\n".encode(), name: WEIGHTS + name.encode()}
        try:
            return push(server, files, parent_commit=parent)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise

    push(server, {"lines.txt": b""})
    with ThreadPoolExecutor(10) as executor:
        list(executor.map(add_lines, range(10)))
    names = {f"{worker}.{turn}" for worker in range(10) for turn in range(2)}
    assert sorted(ask(server, "GET", "/alice/x/resolve/main/lines.txt").text.split()) == sorted(
        names
    )
    assert names <= {*api(server).list_repo_files("alice/x")}
    assert len(api(server).list_repo_commits("alice/x")) == 22


def test_one_of_twenty_pushes_on_one_parent_succeeds(server):
    parent = head(server)
    body = line("header", summary="m", parentCommit=parent) + file("a.txt")
    path = "/api/models/alice/x/commit/main"
    with ThreadPoolExecutor(20) as executor:
        codes = list(executor.map(lambda _: ask(server, "POST", path, body).status_code, range(20)))
    assert sorted(codes) == [200, *[412] * 19]
    assert len(api(server).list_repo_commits("alice/x")) == 2


@pytest.mark.slow
def test_a_busy_hub_accepts_one_commit_at_a_time(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, patient=False, commit_seconds=0.5) as server:
        for repo in ("alice/x", "alice/y"):
            api(server).create_repo(repo)
        path = "/api/models/alice/{}/commit/main"
        with ThreadPoolExecutor(3) as executor:
            tasks = [
                executor.submit(ask, server, "POST", path.format(repo), HEADER + file("a.txt"))
                for repo in ("x", "x", "y")
            ]
            done = [task.result() for task in tasks]
        assert sorted(answer.status_code for answer in done) == [200, 200, 409]
        (busy,) = [answer for answer in done if answer.status_code == 409]
        assert busy.json()["error"] == (
            "Another commit operation is in progress for this repository. Please try again later."
        )


# ---- branches and tags ---------------------------------------------------------------------------


def test_a_tag_is_given_once(server, tmp_path):
    client = api(server)
    first = push(server, {"a.txt": b"1"})
    client.create_tag("alice/x", tag="v1", tag_message="the first")
    push(server, {"a.txt": b"2"})
    refused(409, client.create_tag, "alice/x", tag="v1")
    client.create_tag("alice/x", tag="v1", exist_ok=True)
    client.create_tag("alice/x", tag="exp/e+1", revision=first)
    tags = client.list_repo_refs("alice/x").tags
    assert [(t.name, t.ref, t.target_commit) for t in tags] == [
        ("v1", "refs/tags/v1", first),
        ("exp/e+1", "refs/tags/exp/e+1", first),
    ]
    assert download(server, "a.txt", tmp_path, revision="v1") == b"1"
    assert download(server, "a.txt", tmp_path, revision="exp/e+1") == b"1"
    client.delete_tag("alice/x", tag="exp/e+1")
    with pytest.raises(RevisionNotFoundError):
        client.delete_tag("alice/x", tag="exp/e+1")
    with pytest.raises(RevisionNotFoundError):
        client.create_tag("alice/x", tag="v2", revision="no")
    assert [t.name for t in client.list_repo_refs("alice/x").tags] == ["v1"]


@pytest.mark.slow
def test_branches_are_independent(server, tmp_path):
    client = api(server)
    first = push(server, {"a.txt": b"1"})
    second = push(server, {"a.txt": b"2"})
    client.create_branch("alice/x", branch="feat/x", revision=first)
    refused(409, client.create_branch, "alice/x", branch="feat/x")
    client.create_branch("alice/x", branch="feat/x", exist_ok=True)
    third = push(server, {"a.txt": b"3"}, revision="feat/x", parent_commit=first)
    targets = {b.name: b.target_commit for b in client.list_repo_refs("alice/x").branches}
    assert targets == {"main": second, "feat/x": third}
    assert download(server, "a.txt", tmp_path, revision="feat/x") == b"3"
    assert client.file_exists("alice/x", "a.txt", revision="feat/x")
    client.delete_branch("alice/x", branch="feat/x")
    refused(400, client.delete_branch, "alice/x", branch="main")
    assert [b.name for b in client.list_repo_refs("alice/x").branches] == ["main"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["../x", "a..b", "a//b", "/a", "-a", "a b", "a.lock", "ab" * 20, "refs/x", ""]
)
def test_a_ref_has_a_plain_name(standing, name):
    before = state(standing)
    assert ask(standing, "POST", "/api/models/alice/x/tag/main", {"tag": name}).status_code == 400
    assert state(standing) == before


# ---- search --------------------------------------------------------------------------------------


def test_models_are_found_by_what_their_cards_say(server):
    push(server, {"README.md": CARD.encode()})
    api(server, "bob").create_repo("bob/y")
    client = api(server)

    def found(**options):
        return [model.id for model in client.list_models(**options)]

    assert found() == ["bob/y", "alice/x"]
    tags = "base_model:pico/llama base_model:adapter:pico/llama license:mit peft text-generation"
    for tag in [*tags.split(), "en", "zh", "sentiment", "dataset:reviews"]:
        assert found(filter=tag) == ["alice/x"]
    assert found(filter=["license:mit", "zh"]) == ["alice/x"]
    assert found(filter=["license:mit", "fr"]) == []
    assert found(author="bob") == found(search="B/Y") == ["bob/y"]
    assert found(pipeline_tag="text-generation") == ["alice/x"]
    assert found(sort="last_modified") == ["bob/y", "alice/x"]
    push(server, {"a.txt": b"a"})
    assert found(sort="last_modified") == ["alice/x", "bob/y"]
    assert found(limit=1) == ["bob/y"]
    (plain,) = client.list_models(author="alice")
    assert (plain.card_data, plain.siblings, plain.sha) == (None, None, None)
    (full,) = client.list_models(author="alice", full=True, cardData=True)
    assert (full.card_data.license, full.sha) == ("mit", head(server))
    assert {s.rfilename for s in full.siblings} == {".gitattributes", "README.md", "a.txt"}
    (some,) = client.list_models(author="alice", expand=["sha", "author"])
    assert (some.author, some.tags) == ("alice", None)


@pytest.mark.slow
def test_long_lists_come_in_pages(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, page_size=3) as server:
        names = [f"alice/m{n}" for n in range(7)]
        for name in names:
            api(server).create_repo(name)
        assert [m.id for m in api(server).list_models(search="m")] == names[::-1]
        assert [m.id for m in api(server).list_models(limit=5)] == names[:1:-1]
        files = {f"{n}/a b.txt": b"x" for n in range(5)}
        push(server, files, repo=names[0])
        pages = sum("/tree/" in request.path for request in server.requests)
        tree = list(api(server).list_repo_tree(names[0], recursive=True))
        assert len(tree) == 11
        assert sum("/tree/" in request.path for request in server.requests) == pages + 4


# ---- LFS objects that should not come in ---------------------------------------------------------


def announce(server, data=WEIGHTS, repo="alice/x", token="hf_alice", size=None):
    """Say that an object will come; return what the server says to do."""
    wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data) if size is None else size}
    body = {"operation": "upload", "transfers": ["basic"], "objects": [wanted]}
    done = ask(server, "POST", f"/{repo}.git/info/lfs/objects/batch", body, token)
    assert done.status_code == 200, done.text
    return done.json()["objects"][0]


def put(server, url, data=WEIGHTS):
    return ask(server, "PUT", url, data, token=None)


def link(server, repo="alice/x", token="hf_alice"):
    """Commit WEIGHTS by its sha256 alone."""
    body = HEADER + line("lfsFile", path="w.safetensors", algo="sha256", oid=SHA256)
    return ask(server, "POST", f"/api/models/{repo}/commit/main", body, token)


def test_an_upload_is_what_was_announced(server):
    actions = announce(server)["actions"]
    url = actions["upload"]["href"]
    for data in (WEIGHTS[:-1], WEIGHTS + b"x", WEIGHTS[:-1] + b"x", b""):
        assert put(server, url, data).status_code == 400
        assert link(server).status_code == 400
        assert ask(server, "POST", actions["verify"]["href"], WANTED).status_code == 400
    assert put(server, url).status_code == 200
    assert ask(server, "POST", actions["verify"]["href"], WANTED).status_code == 200
    assert "actions" not in announce(server)
    assert announce(server, size=7)["error"]["code"] == 422
    assert link(server).status_code == 200


@pytest.mark.slow
def test_an_upload_url_is_valid_for_one_object(server):
    url = announce(server)["actions"]["upload"]["href"]
    other = WEIGHTS[:-1] + b"x"
    forged = [
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.replace(SHA256, hashlib.sha256(other).hexdigest()),
        url.replace(f"/{len(WEIGHTS)}/", f"/{len(WEIGHTS) + 1}/"),
        re.sub("/lfs/[0-9]+/", "/lfs/2/", url),
        re.sub("/0[?]", "/1?", url),
        re.sub("expires=[^&]+", "expires=99999999999", url),
        re.sub("expires=[^&]+", "expires=nan", url),
        url.partition("?")[0],
    ]
    assert url not in forged
    for wrong, data in itertools.product(forged, (WEIGHTS, other)):
        assert put(server, wrong, data).status_code == 403
    assert ask(server, "POST", url, {"oid": SHA256, "parts": []}, None).status_code == 403
    assert link(server).status_code == 400


@pytest.mark.slow
def test_an_upload_url_expires(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, url_seconds=-1) as server:
        api(server).create_repo("alice/x")
        done = put(server, announce(server)["actions"]["upload"]["href"])
        assert (done.status_code, done.json()["error"]) == (403, "This URL has expired.")


@pytest.mark.slow
def test_an_upload_url_is_invalid_after_its_repository_is_deleted(server):
    url = announce(server)["actions"]["upload"]["href"]
    api(server).delete_repo("alice/x")
    api(server).create_repo("alice/x")
    assert put(server, url).status_code == 404
    assert link(server).status_code == 400


@pytest.mark.slow
def test_an_object_of_another_repository_cannot_be_used(server):
    api(server).update_repo_settings("alice/x", private=True)
    push(server, {WEIGHTS_FILE: WEIGHTS})
    api(server, "bob").create_repo("bob/y")
    assert link(server, "bob/y", "hf_bob").status_code == 400
    upload = announce(server, repo="bob/y", token="hf_bob")["actions"]["upload"]
    assert put(server, upload["href"]).status_code == 200  # who has it may bring it
    assert link(server, "bob/y", "hf_bob").status_code == 200
    body = {"operation": "upload", "objects": [WANTED]}
    path = "/alice/x.git/info/lfs/objects/batch"
    assert ask(server, "POST", path, body, "hf_bob").status_code == 404


@pytest.mark.slow
def test_parts_are_joined_as_they_were_uploaded(tmp_path, online):
    with HubServer(tmp_path / "hub", USERS, part_size=2000) as server:
        api(server).create_repo("alice/x")
        body = {"operation": "upload", "transfers": ["multipart"], "objects": [WANTED]}
        done = ask(server, "POST", "/alice/x.git/info/lfs/objects/batch", body)
        upload = done.json()["objects"][0]["actions"]["upload"]
        urls = [upload["header"][str(n)] for n in (1, 2, 3)]
        chunks = [WEIGHTS[n : n + 2000] for n in (0, 2000, 4000)]
        assert put(server, urls[0], chunks[0] + b"x").status_code == 400
        assert put(server, urls[2], chunks[0]).status_code == 400
        tags = [put(server, url, c).headers["etag"] for url, c in zip(urls, chunks, strict=True)]
        parts = [{"partNumber": n, "etag": tag} for n, tag in enumerate(tags, 1)]
        wrong = [parts[:2], parts[::-1], [{**parts[0], "etag": "x"}, *parts[1:]]]
        for chosen in wrong:
            body = {"oid": SHA256, "parts": chosen}
            assert ask(server, "POST", upload["href"], body, None).status_code == 400
        body = {"oid": SHA256, "parts": parts}
        for _ in range(2):  # the answer may have been lost
            assert ask(server, "POST", upload["href"], body, None).status_code == 200
        assert link(server).status_code == 200


# ---- what outlives a server ----------------------------------------------------------------------


def start_by_hand(folder):
    command = [sys.executable, "-m", "tests.hub_server", "--port", "0", "--folder", str(folder)]
    command += ["--user", "alice=hf_alice", "--user", "bob=hf_bob"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    return process, re.search(r"http://[\d.:]+", first)[0]


@pytest.mark.slow
def test_a_killed_server_keeps_its_state(tmp_path, online):
    process, endpoint = start_by_hand(tmp_path / "hub")
    client = HfApi(endpoint=endpoint, token="hf_alice")
    client.create_repo("alice/x", private=True)
    client.create_commit("alice/x", [add(WEIGHTS_FILE, WEIGHTS)], commit_message="m")
    client.create_tag("alice/x", tag="v1")
    before = (client.model_info("alice/x"), client.list_repo_refs("alice/x"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with HubServer(tmp_path / "hub", USERS) as server:
        client = api(server)
        assert (client.model_info("alice/x"), client.list_repo_refs("alice/x")) == before
        assert download(server, WEIGHTS_FILE, tmp_path, revision="v1") == WEIGHTS
        assert link(server).status_code == 200
        with pytest.raises(RepositoryNotFoundError):
            api(server, "bob").model_info("alice/x")


# ---- mischief ------------------------------------------------------------------------------------


def test_requests_are_recorded_as_they_came(server):
    api(server).create_branch("alice/x", branch="feat/x")
    seen = server.requests[-1]
    assert (seen.method, seen.path) == ("POST", "/api/models/alice/x/branch/feat%2Fx")
    assert seen.headers["authorization"] == "Bearer hf_alice"
    assert server.endpoint == f"http://{seen.host}"


def test_mischief_can_falsify_headers_and_json(server, tmp_path):
    push(server, {"a.txt": b"a"})
    etag = f'"{tmp_path}/outside"'
    server.mischief = only("/resolve/", after(lambda reply: reply.headers.update(etag=etag)))
    download(server, "a.txt", tmp_path / "cache")
    assert (tmp_path / "outside").read_bytes() == b"a"  # the client believes it

    def other_sha(seen, answer):
        reply = answer()
        if seen.path.startswith("/api/models/"):
            reply.json = {**reply.json, "sha": "../.."}
        return reply

    server.mischief = other_sha
    assert head(server) == "../.."
    server.mischief = None
    assert len(head(server)) == 40


@pytest.mark.slow
def test_mischief_can_falsify_bodies(server, tmp_path):
    push(server, {"a.txt": b"good"})

    def body(data, **headers):
        def change(reply):
            reply.headers.update({k.replace("_", "-"): v for k, v in headers.items()})
            reply.body = data

        return only("GET .*/resolve/", after(change))

    def cut(reply):
        reply.cut = 2

    server.mischief = body(b"evil")
    assert download(server, "a.txt", tmp_path / "1") == b"evil"
    for lie in (body(b"longer"), body(gzip.compress(bytes(10**7)), content_encoding="gzip")):
        server.mischief = lie
        with pytest.raises(OSError, match="Consistency check failed"):
            download(server, "a.txt", tmp_path / "2")
    server.mischief = after(cut)
    with pytest.raises(Exception, match="peer closed connection"):
        ask(server, "GET", "/alice/x/resolve/main/a.txt")
    server.mischief = body(iter([b"go", b"od"]))
    assert download(server, "a.txt", tmp_path / "3") == b"good"


@pytest.mark.slow
def test_an_endless_body_ends_when_its_reader_closes(server):
    sent = []

    def drip():
        while True:
            sent.append(time.monotonic())
            yield b"x"
            time.sleep(0.01)

    server.mischief = lambda seen, answer: Reply(200, {}, drip())
    with get_session().stream("GET", f"{server.endpoint}/x") as response:
        assert next(response.iter_raw()) == b"x"
    patience = time.monotonic() + 20
    while time.monotonic() - sent[-1] < 0.2:
        assert time.monotonic() < patience
        time.sleep(0.05)


def test_a_request_may_fail_before_or_after_it_is_done(server):
    server.mischief = only("/commit/", fail(1, 409, "Another commit operation is in progress"))
    assert "in progress" in refused(409, push, server, {"a.txt": b"1"})
    assert api(server).list_repo_files("alice/x") == [".gitattributes"]
    push(server, {"a.txt": b"1"})
    server.mischief = only("POST .*/commit/", fail(1, 503, done=True))
    refused(503, push, server, {"a.txt": b"2"})
    server.mischief = None
    assert [c.title for c in api(server).list_repo_commits("alice/x")][:2] == ["push", "push"]
    assert ask(server, "GET", "/alice/x/resolve/main/a.txt").text == "2"


@pytest.mark.slow
def test_a_redirect_may_lead_elsewhere(server, tmp_path, monkeypatch):
    push(server, {"a.txt": b"good"})
    with HubServer(tmp_path / "other") as other:
        place = f"{other.endpoint}/alice/x/resolve/main/a.txt"
        other.plant("alice/x", {"a.txt": b"evil"})
        redirect = Reply(302, {"location": place})
        server.mischief = only("GET .*/resolve/", lambda seen, answer: redirect)
        assert download(server, "a.txt", tmp_path / "cache") == b"evil"
        assert other.requests
        assert not any("authorization" in request.headers for request in other.requests)
    server.mischief = lambda seen, answer: Reply(302, {"location": seen.target})
    with pytest.raises(Exception, match=r"(?i)redirects"):
        ask(server, "GET", "/alice/x/resolve/main/a.txt")
    server.mischief = lambda seen, answer: Reply(302, {"location": "file:///etc/hostname"})
    with pytest.raises(Exception, match="file://"):
        ask(server, "GET", "/alice/x/resolve/main/a.txt")


@pytest.mark.slow
def test_a_test_can_plant_files_that_no_client_can_push(hub_server):
    names = [
        "../evil",
        "/etc/evil",
        ".git/hooks/post-checkout",
        "a\x1b[2J",
        "a\\b",
        "a.txt",
        "A.txt",
    ]
    sha = hub_server.plant("alice/evil", {**dict.fromkeys(names, b"x"), WEIGHTS_FILE: WEIGHTS})
    assert head(hub_server, "alice/evil") == sha
    files = api(hub_server).list_repo_files("alice/evil")
    assert {*files} == {".gitattributes", WEIGHTS_FILE, *names}
    (weights,) = api(hub_server).get_paths_info("alice/evil", WEIGHTS_FILE)
    assert weights.lfs.sha256 == SHA256


# ---- PEFT ----------------------------------------------------------------------------------------

CHILD = """
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]
ids = torch.arange(12)[None]


def base():
    return AutoModelForCausalLM.from_pretrained(folder)


torch.manual_seed(0)
adapter = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
adapter.eval().push_to_hub("alice/pushed", private=True)
pulled = PeftModel.from_pretrained(base(), "alice/pushed").eval()
adapter.save_pretrained(out)
local = PeftModel.from_pretrained(base(), out).eval()
with torch.no_grad():
    plain, *logits = [m(ids).logits for m in (base().eval(), adapter, pulled, local)]
assert torch.equal(logits[1], logits[2])
assert torch.equal(logits[0], logits[1])
assert not torch.equal(logits[0], plain)
"""


@pytest.mark.slow
def test_peft_pushes_and_pulls(hub_server, pico_folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": hub_server.endpoint,
        "HF_TOKEN": "hf_alice",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", CHILD, str(pico_folder), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert api(hub_server).model_info("alice/pushed").private
    assert any(request.method == "PUT" for request in hub_server.requests)
