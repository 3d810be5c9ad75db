"""A Hub that lies, against pull and push: nothing but the reason comes of it."""

import contextlib
import gzip
import hashlib
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hub_server import Reply, after, fail, only
from pico import keep_adapter

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.manifest import MANIFEST
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterHubError, HubError, UsageError
from adapterhub_chat.remote import client as door
from adapterhub_chat.remote.client import HubClient

REPO = "alice/toy"
INFO = r"GET /api/models/alice/toy/revision"
FILE = r"GET /alice/toy/resolve"


def header(name, value):
    return after(lambda reply: reply.headers.update({name: value}))


def info(change):
    """Change the JSON in which the Hub describes the repository."""

    def changed(reply):
        said = reply.json
        change(said)
        reply.json = said

    return only(INFO, after(changed))


def entry(name, **values):
    def change(said):
        for file in said["siblings"]:
            if file["rfilename"] == name:
                file.update(values)

    return info(change)


def named(change):
    def changed(said):
        for file in said["siblings"]:
            file["rfilename"] = change(file["rfilename"])

    return info(changed)


def body(change, pattern=FILE + r".*safetensors"):
    def changed(reply):
        reply.body = change(bytes(reply.body))

    return only(pattern, after(changed))


def redirect(where, pattern=FILE):
    return only(pattern, lambda _seen, _answer: Reply(302, {"location": where}))


def sent(pattern, status, body=b"", **headers):
    return only(pattern, lambda *_: Reply(status, headers, body))


def drip(_seen, _answer):
    def pieces():
        for _ in itertools.count():
            time.sleep(0.05)
            yield b"x"

    return Reply(200, {}, pieces())


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def huge(_seen, _answer):
    return Reply(
        200, {"content-type": "application/json"}, b'{"sha": "' + b"a" * (5 * 2**20) + b'"}'
    )


MANY = [{"rfilename": f"f{n}", "size": 1} for n in range(20_000)]
ECHO = {"x-error-message": "no Bearer hf_alice"}
PACKED = {"content-encoding": "gzip"}
BOMB = gzip.compress(b"\0" * 10**8)
LIES = {
    "sha with ..": (info(lambda s: s.update(sha="../../..")), "names no commit"),
    "sha of a path": (info(lambda s: s.update(sha="/etc/passwd")), "names no commit"),
    "sha missing": (info(lambda s: s.pop("sha")), "names no commit"),
    "sha a number": (info(lambda s: s.update(sha=1)), "names no commit"),
    "sha of 39 digits": (info(lambda s: s.update(sha="a" * 39)), "names no commit"),
    "sha upper case": (info(lambda s: s.update(sha="A" * 40)), "names no commit"),
    "sha of another commit": (info(lambda s: s.update(sha="a" * 40)), "404"),
    "files missing": (info(lambda s: s.pop("siblings")), "lists no files"),
    "files a number": (info(lambda s: s.update(siblings=3)), "lists no files"),
    "files are texts": (info(lambda s: s.update(siblings=["a"])), "not found"),
    "20,000 files": (info(lambda s: s.update(siblings=MANY)), "not found"),
    "no config": (named(lambda name: name.replace(CONFIG, "other.json")), "adapter_config.json not found"),
    "names with ..": (named(lambda name: f"../../{name}"), "not found"),
    "absolute names": (named(lambda name: f"/tmp/{name}"), "not found"),
    "names of folders": (named(lambda name: f".git/hooks/{name}"), "not found"),
    "names in capitals": (named(str.upper), "not found"),
    "names with escapes": (named(lambda name: f"\x1b[2J{name}\0"), "not found"),
    "names too long": (named(lambda name: name * 300), "not found"),
    "size a text": (entry(WEIGHTS, size="9", lfs={"sha256": "0" * 64, "size": "9"}), "not found"),
    "size negative": (entry(CONFIG, size=-1), "not found"),
    "size true": (entry(CONFIG, size=True), "not found"),
    "config too large": (entry(CONFIG, size=65 * 2**10), "at most 65,536"),
    "manifest too large": (entry(MANIFEST, size=2 * 2**20), "at most 1,048,576"),
    "weights too large": (entry(WEIGHTS, lfs={"sha256": "0" * 64, "size": 3 * 2**30}), "at most"),
    "another sha256": (entry(WEIGHTS, lfs={"sha256": "0" * 64, "size": 1}), "more than the 1 bytes"),
    "another git hash": (entry(CONFIG, blobId="0" * 40), "has the git hash"),
    "JSON is a list": (only(INFO, after(lambda r: setattr(r, "json", [1]))), "of another form"),
    "JSON is none": (body(lambda _: b"<html>", INFO), "no JSON"),
    "JSON is deep": (body(lambda _: b"[" * 100_000, INFO), "no JSON"),
    "JSON is huge": (only(INFO, huge), "more than the 4,194,304 bytes"),
    "other bytes of the same size": (body(flipped), "has the sha256"),
    "other config of the same size": (body(flipped, FILE + r".*config\.json"), "has the git hash"),
    "longer than announced": (body(lambda data: data + b"x" * 10**7), "more than the"),
    "shorter than announced": (body(lambda data: data[:-1]), "ended after"),
    "empty": (body(lambda _: b""), "ended after 0 of"),
    "breaks off": (only(FILE, after(lambda r: setattr(r, "cut", 100))), "cannot be reached"),
    "packed": (only(FILE, header("content-encoding", "gzip")), "packs"),
    "drips": (only(FILE, drip), "too slowly"),
    "drips JSON": (only(INFO, drip), "too slowly"),
    "says 500": (only(FILE, fail(99, 500)), "500"),
    "says 404": (only(FILE, fail(99, 404)), "404"),
    "says 416": (only(FILE, fail(99, 416)), "416"),
    "says 429": (only(INFO, fail(99, 429)), "429"),
    "error with escapes": (only(INFO, lambda *_: Reply(403, {"x-error-message": "\x1b[2J\x07gone"})), "403"),
    "redirect to another host": (redirect("http://localhost:9/x"), "is another host"),
    "redirect to a name": (redirect("https://attacker.example/x"), "is another host"),
    "redirect of the description": (redirect("http://localhost:9/x", INFO), "is another host"),
    "redirect to a file": (redirect("file:///etc/passwd"), "another host|cannot be reached"),
    "redirect loop": (redirect("/alice/toy/resolve/main/adapter_config.json"), "more than 5 times"),
    "redirect with a bomb": (sent(FILE, 302, BOMB, location="/x", **PACKED), "packs its answer"),
    "answer with a bomb": (sent(INFO, 200, BOMB, **PACKED), "packs its answer"),
    "no hash of the weights": (entry(WEIGHTS, lfs=None, blobId=None), "adapter_model.safetensors not found"),
    "a hash that is none": (entry(CONFIG, blobId="../../x"), "adapter_config.json not found"),
    "the token in an error": (sent(INFO, 403, **ECHO), "no Bearer <token>"),
    "redirect to nowhere": (redirect("http://[::1"), "HTTP 302|cannot be reached|wrong answer"),
}  # fmt: skip


@pytest.fixture
def made(hub, make_weights):
    return keep_adapter(hub, make_weights())


@pytest.fixture
def victim(pico_folder, tmp_path, monkeypatch):
    """A hub with an adapter of its own in a folder of its own, and an impatient door."""
    monkeypatch.setattr(door, "BASE_TIMEOUT", 1.0)
    home = tmp_path / "victim"
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(home / "cache"))
    return AdapterHub(str(pico_folder), home / "pool", dtype="fp32", device="cpu")


def everything(root):
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")
    }


def backbone_digest(hub):
    digest = hashlib.sha256()
    for parameter in hub.backbone.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def test_every_malformed_answer_is_refused_with_its_reason(
    made, victim, hub_server, tmp_path, make_weights
):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    made.push("toy", REPO, **access)
    keep_adapter(victim, make_weights(seed=7), "mine")
    before, numbers = everything(tmp_path / "victim"), backbone_digest(victim)
    surroundings = {p.name for p in tmp_path.iterdir()}
    failed = []
    for what, (mischief, reason) in LIES.items():
        hub_server.mischief = mischief
        started = time.monotonic()
        try:
            victim.pull(REPO, **access)
            failed.append(f"{what}: it was taken")
        except HubError as error:
            if not pytest.raises(HubError, match=reason).matches(error):
                failed.append(f"{what}: {error}")
            if any(not c.isprintable() for c in str(error)) or "hf_alice" in str(error):
                failed.append(f"{what}: told {error!r}")
        except AdapterHubError as error:
            if reason not in str(error):
                failed.append(f"{what}: {error}")
        if time.monotonic() - started > 5:
            failed.append(f"{what}: took {time.monotonic() - started:.0f} s")
        if everything(tmp_path / "victim") != before:
            failed.append(f"{what}: something was left behind")
            break
    assert not failed, "\n".join(failed)
    assert len(LIES) >= 40
    assert {p.name for p in tmp_path.iterdir()} == surroundings
    assert backbone_digest(victim) == numbers
    hub_server.mischief = None
    assert victim.pull(REPO, **access).changed  # and the truth is taken


@pytest.mark.parametrize("etag", ['"../../../../x"', '"/etc/hostname"', '"/tmp/x"'])
def test_headers_name_no_file(made, victim, hub_server, etag, tmp_path):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    made.push("toy", REPO, **access)
    surroundings = {p.name for p in tmp_path.iterdir()}
    names = {"etag": etag, "x-linked-etag": etag, "x-repo-commit": "../.."}
    hub_server.mischief = only(FILE, after(lambda reply: reply.headers.update(names)))
    assert victim.pull(REPO, **access).changed
    assert {p.name for p in tmp_path.iterdir()} - surroundings <= {"victim"}


class Stranger(BaseHTTPRequestHandler):
    """Another host, which keeps what it is sent."""

    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        self.send_response(404)
        self.end_headers()

    do_PUT = do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def stranger():
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "target", ["batch", "verify", "commit", "whoami|create", "preupload", "refs"]
)
def test_a_push_sends_no_request_to_another_host(made, hub_server, stranger, target):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    elsewhere = f"http://127.0.0.1:{stranger.server_port}"

    def sent_on(reply):
        if target in ("batch", "verify"):
            said = reply.json
            for one in said["objects"]:
                for action in one.get("actions", {}).values():
                    action["href"] = action["href"].replace(hub_server.endpoint, elsewhere)
            reply.json = said
        else:
            reply.status, reply.headers["location"] = 307, elsewhere + "/x"

    pattern = r"objects/batch" if target in ("batch", "verify") else rf"/api/.*({target})"
    hub_server.mischief = only(pattern, after(sent_on))
    with pytest.raises(HubError, match="is another host"):
        made.push("toy", REPO, **access)
    assert stranger.seen == []
    hub_server.mischief = None
    made.push("toy", REPO, **access)  # nothing stands in the way of the next one


@pytest.mark.parametrize("status", [409, 412])
def test_a_push_that_met_others_is_tried_again(made, hub_server, status):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    hub_server.mischief = only("POST .*/commit/", fail(3, status))
    assert made.push("toy", REPO, **access).version == "v1"
    hub_server.mischief = only("POST .*/commit/", fail(99, 500))
    made.pool.describe("toy", made.pool.manifest("toy").model_copy(update={"about": "Anew."}))
    with pytest.raises(HubError, match="500"):
        made.push("toy", REPO, **access)
    assert HubClient(**access).tags(REPO).keys() == {"v1"}


@pytest.mark.parametrize(
    "repo",
    [
        "../x",
        "a/b/c",
        "a--b/c",
        "a/b.git",
        "a",
        "/a/b",
        "a/",
        "a/..",
        "a/b c",
        "a/b%2f",
        "a/b\n",
        "ä/b",
        "",
        "x" * 97 + "/b",
        "a/-b",
        "a/b.",
        None,
        3,
    ],
)
def test_what_is_no_repository_is_not_asked_for(victim, hub_server, repo):
    with pytest.raises(UsageError, match="is no repository"):
        victim.pull(repo, endpoint=hub_server.endpoint)
    with pytest.raises((UsageError, HubError), match="is no repository"):
        victim.push("toy", repo, endpoint=hub_server.endpoint)
    assert not hub_server.requests


@pytest.mark.parametrize(
    "revision",
    [
        "../../x",
        "/x",
        "x/",
        "a//b",
        "a..b",
        "refs/../x",
        "x" * 300,
        "a b",
        "a?b",
        "a#b",
        "%2e%2e",
        "x\n",
        "x.lock",
        "-x",
        3,
    ],
)
def test_what_is_no_revision_is_not_asked_for(victim, hub_server, revision):
    with pytest.raises(UsageError, match="is no revision"):
        victim.pull(REPO, revision, endpoint=hub_server.endpoint)
    assert not hub_server.requests


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://example.com",
        "ftp://example.com",
        "https://",
        "https://user:pass@example.com",
        "https://example.com/path",
        "https://example.com?q=1",
        "https://exa mple.com",
        "file:///etc",
        "//x",
        "https://[::1",
        "http://127.0.0.1.evil.example:80",
        "https://example.com#x",
        "http://127.0.0.1:99999",
    ],
)
def test_what_is_no_endpoint_is_refused(victim, endpoint):
    with pytest.raises(UsageError, match=r"is no endpoint.*https://HOST"):
        victim.pull(REPO, endpoint=endpoint)


@pytest.mark.parametrize("key", ["", "ed25519:", "rsa:AAAA", "ed25519:!!!", "ed25519:" + "A" * 43])
def test_what_is_no_key_is_refused_before_anything_is_asked(victim, hub_server, key):
    with pytest.raises(AdapterHubError, match="is no public key"):
        victim.pull(REPO, require_signature=key, endpoint=hub_server.endpoint)
    assert not hub_server.requests


def test_a_pulled_regular_expression_is_replaced_by_the_names_of_the_modules(
    made, victim, hub_server
):
    """It is never compiled, neither here nor by PEFT, which reads the pool's folder."""
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    made.push("toy", REPO, **access)
    folder = made.pool.root / "toy"
    config = json.loads((folder / CONFIG).read_text())
    changed = {CONFIG: json.dumps(config | {"target_modules": "(a+)+$"}).encode()}
    files = {n: (folder / n).read_bytes() for n in (WEIGHTS, MANIFEST)}
    HubClient(**access).commit(REPO, files | changed, "a pattern")
    name = victim.pull(REPO, **access).name
    stored = json.loads((victim.pool.root / name / CONFIG).read_text())
    assert sorted(stored["target_modules"]) == sorted(victim.pool.load(name).weights.factors)


def test_a_pulled_adapter_is_verified_as_untrusted(made, victim, hub_server, tmp_path):
    """What the guard refuses in a folder it refuses in a pull, with the pool as it was."""
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    made.push("toy", REPO, **access)
    folder = made.pool.root / "toy"
    good = {n: (folder / n).read_bytes() for n in (CONFIG, WEIGHTS, MANIFEST)}
    config = json.loads(good[CONFIG])
    for bad, reason in (
        ({CONFIG: json.dumps(config | {"use_dora": True}).encode()}, "use_dora"),
        ({CONFIG: json.dumps(config | {"target_modules": ["(a+)+$"]}).encode()}, "target_modules"),
        ({CONFIG: json.dumps(config | {"r": 10**9}).encode()}, "r = 1000000000"),
        ({WEIGHTS: good[WEIGHTS][:-4]}, "safetensors"),
        ({WEIGHTS: b"\x80\x04pickle"}, "safetensors"),
        ({MANIFEST: b"[]"}, MANIFEST),
        ({MANIFEST: good[MANIFEST].replace(b'"weights": "', b'"weights": "0')}, "weights"),
    ):
        HubClient(**access).commit(REPO, {**good, **bad}, "bad")
        before = everything(victim.pool.root) if victim.pool.root.exists() else {}
        with pytest.raises(AdapterHubError, match=reason):
            victim.pull(REPO, **access)
        assert everything(victim.pool.root) == before or not victim.pool.names()
        assert not list(victim.pool.root.glob(".incoming*"))


# ---- a server that takes its time ----------------------------------------------------------------


def speak_raw(answer):
    """Serve every connection with `answer(socket)`; return the endpoint and what ends it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def one(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            answer(connection)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=listening.accept()[:1], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", listening.close


def drip_headers(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        time.sleep(0.1)
        connection.sendall(b"x-a: b\r\n")


def go_on(connection):
    while True:
        time.sleep(0.1)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def say_nothing(_connection):
    time.sleep(60)


def come_back_tomorrow(connection):
    connection.sendall(b"HTTP/1.1 429 No\r\nRetry-After: 100000\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("answer", [drip_headers, go_on, say_nothing, come_back_tomorrow])
def test_a_slow_server_does_not_block_other_requests(made, victim, online, answer, monkeypatch):
    monkeypatch.setattr(door, "BASE_TIMEOUT", 0.4)
    endpoint, end = speak_raw(answer)
    try:
        for ask in (
            lambda: victim.pull(REPO, endpoint=endpoint),
            lambda: made.push("toy", REPO, endpoint=endpoint),
        ):
            started = time.monotonic()
            with pytest.raises(HubError):
                ask()
            assert time.monotonic() - started < 5
    finally:
        end()


def test_a_push_ignores_long_retry_after_headers(made, victim, hub_server):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    hub_server.mischief = sent("preupload", 429, **{"retry-after": "100000"})
    started = time.monotonic()
    with pytest.raises(HubError, match="too slowly"):
        made.push("toy", REPO, **access)
    assert time.monotonic() - started < 5


def test_a_bomb_is_not_unpacked_for_a_push_either(made, hub_server):
    access = {"endpoint": hub_server.endpoint, "token": "hf_alice"}
    hub_server.mischief = sent("repos/create", 200, BOMB, **PACKED)
    with pytest.raises(HubError, match="packs its answer"):
        made.push("toy", REPO, **access)
