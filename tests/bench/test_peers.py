"""Other engines beside this project: finding them, their servers' lives, and the rows that they add.

`engine` stands in for an installed one: a real server process on the loopback address that speaks the same
routes. Tests marked `peers` run the real ones, out of ADAPTERHUB_PEERS.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adapterhub_chat.artifact.folder import read_folder
from adapterhub_chat.bench import mixed as mixed_bench
from adapterhub_chat.bench import peer_workers as peers_bench
from adapterhub_chat.bench import peers
from adapterhub_chat.bench.harness import Worker
from adapterhub_chat.bench.peers import Server, free_port
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.likelihood import next_token_logits
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import as_mix

ENGINE = """
import json, os, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

args = sys.argv[1:]
if "--fail" in args:
    sys.exit("the engine has no such model")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("PIDS", "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")


def leave(*_):
    open("LEFT", "w").close()
    os._exit(0)


signal.signal(signal.SIGTERM, leave)
gate, lock = threading.Event(), threading.Lock()
waiting = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("ASKED", "a") as file:
            file.write(json.dumps([self.path, body]) + "\\n")
        if body.get("model") == "nobody":
            return self.answer(404, {"error": "there is no nobody here"})
        if rows := body.get("together"):  # answer when so many stand at the gate, else never
            with lock:
                waiting.append(1)
                if len(waiting) == rows:
                    gate.set()
            if not gate.wait(20):
                return self.answer(500, {"error": f"only {len(waiting)} came"})
        self.answer(200, {"usage": {"completion_tokens": body["max_tokens"]}})

    def answer(self, code, found):
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


port = int(args[args.index("--port") + 1])
ThreadingHTTPServer.request_queue_size = 64
server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
server.serve_forever()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(ENGINE)
    return path


@pytest.fixture
def start(script, tmp_path):
    """start(*arguments) -> a Server that runs the engine."""
    servers = []

    def run(*arguments):
        port = free_port()
        command = [sys.executable, str(script), "--port", str(port), *arguments]
        servers.append(Server("engine", command, port, tmp_path, {}))
        return servers[-1]

    yield run
    for server in servers:
        server.close()


@pytest.fixture
def folder(script, tmp_path, monkeypatch):
    """A folder of environments in which `vllm` is the engine."""
    target = tmp_path / "peers" / "vllm"
    (target / "bin").mkdir(parents=True)
    python = target / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    (target / "VERSION").write_text("1.2\n")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return target.parent


def processes(where):
    """Return the ids of the engine's processes and their children, out of PIDS files below `where`."""
    return [int(pid) for path in where.rglob("PIDS") for pid in path.read_text().split()]


def state(pid):
    """Return R, S, T (stopped), Z (dead), ... or "" for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def become(pids, allowed):
    """Wait a little until all processes are in one of the states; return their states."""
    until = time.monotonic() + 10
    while not (found := {state(pid) for pid in pids}) <= allowed and time.monotonic() < until:
        time.sleep(0.02)
    return found


GONE, STOPPED = {"", "Z"}, {"T"}


# ---- finding them --------------------------------------------------------------------------------


def test_only_complete_environments_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv(peers.FOLDER_VARIABLE, raising=False)
    assert peers.installed() == {}
    (tmp_path / "vllm" / "bin").mkdir(parents=True)  # its installation was cut off
    (tmp_path / "llamacpp").mkdir()
    (tmp_path / "llamacpp" / "VERSION").write_text("7.8\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "VERSION").write_text("9\n")
    assert peers.installed(tmp_path) == {"llamacpp": "7.8"}
    monkeypatch.setenv(peers.FOLDER_VARIABLE, str(tmp_path))
    assert peers.installed() == {"llamacpp": "7.8"}
    assert peers.python_of(None, "llamacpp") == str(tmp_path / "llamacpp" / "bin" / "python")
    assert peers.python_of("elsewhere", "vllm") == str(Path("elsewhere/vllm/bin/python").absolute())


def test_a_folder_that_is_not_there_is_an_error_with_the_cure(tmp_path):
    with pytest.raises(UsageError, match=r"is not a folder; make it with scripts/install_peers"):
        peers.installed(tmp_path / "nowhere")


def test_llama_cpp_serves_gguf_files_alone(tmp_path, pico_folder):
    for name in peers.PEER_NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "VERSION").write_text("1\n")
    assert peers.usable_peers(tmp_path, str(pico_folder)) == {"vllm": "1"}
    assert peers.usable_peers(tmp_path, str(tmp_path / "x.gguf")) == {"vllm": "1", "llamacpp": "1"}


# ---- a server's life -----------------------------------------------------------------------------


def test_a_server_answers_pauses_resumes_and_ends_with_its_children(start, tmp_path):
    server = start()
    server.wait()
    pids = processes(tmp_path)
    assert len(pids) == 2
    server.pause()
    assert become(pids, STOPPED) == STOPPED
    server.resume()
    answer = server.ask("/v1/completions", {"max_tokens": 3})
    assert answer == {"usage": {"completion_tokens": 3}}
    server.pause()
    assert become(pids, STOPPED) == STOPPED
    server.close()  # stopped ones end, too, and by themselves
    assert (tmp_path / "LEFT").exists()
    assert become(pids, GONE) <= GONE
    server.close()


def test_it_ends_when_the_block_is_left_by_an_error(start, tmp_path):
    def fail():
        with start() as server:
            server.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert become(processes(tmp_path), GONE) <= GONE


def test_a_server_that_does_not_start_says_why(start):
    with pytest.raises(RuntimeError, match=r"engine server ended(?s:.)*has no such model"):
        start("--fail").wait()


def test_a_server_that_is_never_ready_is_given_up(start, monkeypatch):
    monkeypatch.setattr(peers, "READY_SECONDS", 0)
    with pytest.raises(RuntimeError, match="was not ready in 0 s"):
        start().wait()


def test_a_refusal_and_a_lost_server_are_sentences(start):
    server = start()
    server.wait()
    with pytest.raises(RuntimeError, match=r"engine server refused: 404.*no nobody here"):
        server.ask("/v1/completions", {"model": "nobody"})
    server.close()
    with pytest.raises(RuntimeError, match="engine server gave no answer"):
        server.ask("/v1/completions", {"max_tokens": 1})


def test_python_variables_are_not_passed_to_other_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("KEPT", "kept")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    with Server("shown", [sys.executable, "-c", show], 1, tmp_path, {"GIVEN": "given"}) as server:
        server._process.wait(20)
        seen = json.loads(server.log.read_text())
    assert "PYTHONPATH" not in seen
    assert (seen["KEPT"], seen["GIVEN"]) == ("kept", "given")


# ---- asking --------------------------------------------------------------------------------------


def peer_of(kind, folder, **changed):
    settings = {"kind": kind, "peers": "peers", "tokens": 3, "rows": 4, "rank": 4, **changed}
    return peers_bench.PEERS[kind](folder, settings)


class Together(peers_bench.VLLM):
    """Asks the engine to answer only when 4 requests are there."""

    def body(self, prompt, adapter, tokens):
        return {**super().body(prompt, adapter, tokens), "together": 4}


class Short(peers_bench.VLLM):
    """Asks for a token less than it should."""

    def body(self, prompt, adapter, tokens):
        return super().body(prompt, adapter, tokens - 1)


def test_all_rows_are_requested_at_once_each_with_its_adapter(start, tmp_path):
    server = start()
    server.wait()
    settings = {"kind": "vllm", "peers": "peers", "tokens": 3, "rows": 4, "rank": 4}
    peer = Together(tmp_path, settings)
    assert peers_bench.ask_all(server, peer, [[n, 7] for n in range(4)], 3, 3) > 0
    asked = [json.loads(line) for line in (tmp_path / "ASKED").read_text().splitlines()]
    assert {(route, body["model"], *body["prompt"]) for route, body in asked} == {
        ("/v1/completions", "a0", 0, 7),
        ("/v1/completions", "a1", 1, 7),
        ("/v1/completions", "a2", 2, 7),
        ("/v1/completions", "a0", 3, 7),
    }
    assert {(body["max_tokens"], body["temperature"], body["ignore_eos"]) for _, body in asked} == {
        (3, 0, True)
    }
    with pytest.raises(RuntimeError, match="made 2 tokens instead of 3"):
        peers_bench.ask_all(server, Short(tmp_path, settings), [[1]], 0, 3)


def test_llama_cpp_requests_scale_other_adapters_to_0(tmp_path):
    peer = peer_of("llamacpp", tmp_path)
    assert peer.body([1], None, 3)["lora"] == [{"id": 0, "scale": 0.0}]
    assert peer.body([1], 2, 3)["lora"] == [{"id": 2, "scale": 1.0}]
    assert peer.count({"tokens_predicted": 3}) == 3


def test_command_lines_name_the_adapters_or_none(tmp_path):
    vllm, llamacpp = peer_of("vllm", tmp_path), peer_of("llamacpp", tmp_path)
    assert "--enable-lora" not in vllm.command(1, 0)
    assert vllm.command(1, 2)[-3:] == ["--lora-modules", "a0=a0", "a1=a1"]
    llamacpp.model = Path("m.gguf")
    settings = json.loads(llamacpp.command(1, 2)[-1])
    assert settings["adapters"] == ["a0.gguf", "a1.gguf"]
    assert settings["cells"] >= 4 * (mixed_bench.PROMPT_TOKENS + 3)


def test_vllm_reads_what_is_written(tmp_path, pico_folder):
    peer = peer_of("vllm", tmp_path)
    backbone = load_backbone(str(pico_folder), dtype="bf16", device="cpu")
    weights = mixed_bench.random_adapter(AdapterModel(backbone), 4, 0)
    peer.write_backbone(backbone)
    peer.write_adapter(0, weights, backbone)
    again = load_backbone(str(tmp_path / "backbone"), dtype="bf16", device="cpu")
    assert again.fingerprint == backbone.fingerprint
    read, *_ = read_folder(tmp_path / "a0")
    assert read.alphas == weights.alphas
    for module, (a, b) in weights.to(torch.bfloat16).factors.items():
        assert read.factors[module][0].equal(a)
        assert read.factors[module][1].equal(b)


# ---- the workers ---------------------------------------------------------------------------------


def settings_of(pico_folder, folder):
    return {
        "backbone": str(pico_folder),
        "rank": 4,
        "tokens": 3,
        "adapters": 2,
        "rows": 4,
        "peers": str(folder),
    }


def test_servers_run_only_while_they_are_measured_and_end_with_the_worker(
    folder, pico_folder, tmp_path
):
    worker = Worker(mixed_bench.PEER_WORKERS, "vllm", settings_of(pico_folder, folder))
    try:
        assert worker.ready == {"version": "1.2"}
        pids = processes(tmp_path)
        assert len(pids) == 4  # two servers, a child each
        for case in ([4, 0], [4, 2]):
            assert become(pids, STOPPED) == STOPPED
            assert worker.measure(json.dumps(case))["seconds"] > 0
        assert become(pids, STOPPED) == STOPPED
    finally:
        worker.close()
    assert become(pids, GONE) <= GONE
    assert not list(tmp_path.glob("adapterhub-peer-*"))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_servers_end_when_their_worker_gets_a_signal(folder, pico_folder, tmp_path, number):
    command = [sys.executable, "-m", mixed_bench.PEER_WORKERS, "vllm"]
    worker = subprocess.Popen(
        [*command, json.dumps(settings_of(pico_folder, folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert json.loads(worker.stdout.readline()) == {"version": "1.2"}
        pids = processes(tmp_path)
        worker.send_signal(number)
        assert worker.wait(40) != 0
    finally:
        worker.kill()
        worker.communicate()
    assert become(pids, GONE) <= GONE


@pytest.mark.slow
def test_the_table_has_the_peers_rows_and_ratios(folder, pico_folder, tmp_path):
    found = mixed_bench.bench_mixed(
        backbone=str(pico_folder),
        rank=4,
        tokens=3,
        repeats=1,
        cases=((1, 0), (16, 0), (16, 8)),
        peers=folder,
    )
    assert found["peers"] == {"vllm": "1.2"}
    speeds = {(r["kind"], r["rows"], r["adapters"]): r["tokens_per_second"] for r in found["rows"]}
    ratios = found["ratios"]
    for name, case in (("mixed8", (16, 8)), ("backbone", (16, 0)), ("single", (1, 0))):
        expected = speeds["here", *case] / speeds["vllm", *case]
        assert ratios[f"{name}_over_vllm"] == pytest.approx(expected)
        assert ratios[f"{name}_over_llamacpp"] is None
    assert become(processes(tmp_path), GONE) <= GONE


# ---- the real ones -------------------------------------------------------------------------------

REAL = peers.installed() if Path(os.environ.get(peers.FOLDER_VARIABLE, "")).is_dir() else {}


@pytest.mark.peers
@pytest.mark.parametrize("kind", peers.PEER_NAMES)
def test_the_engine_computes_what_we_compute(kind, tmp_path):
    """Its likeliest next tokens have our probabilities, for the backbone and for each adapter."""
    if kind not in REAL:
        pytest.skip(f"{kind} is not installed in ${peers.FOLDER_VARIABLE}")
    peer = peer_of(kind, tmp_path, peers=os.environ[peers.FOLDER_VARIABLE], rank=8)
    peer.write_backbone(load_backbone("smollm2-135m", dtype="bf16", device="cpu"))
    backbone = load_backbone("smollm2-135m", dtype="fp32", device="cpu")
    model = AdapterModel(backbone)
    for n in range(2):
        start = mixed_bench.random_adapter(model, 8, n)
        weights = start.with_factors({m: (a, 5 * b) for m, (a, b) in start.factors.items()})
        peer.write_adapter(n, weights, backbone)
        model.load(f"a{n}", weights)
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany"
    prompt = backbone.tokenizer(text).input_ids[: mixed_bench.PROMPT_TOKENS]
    names = (None, "a0", "a1")
    requests = [Request(tuple(prompt), as_mix(name)) for name in names]
    ours = next_token_logits(model, requests).log_softmax(-1)
    port = free_port()
    with Server(kind, peer.command(port, 2), port, tmp_path, peer.variables) as server:
        server.wait()
        for row, adapter in enumerate((None, 0, 1)):
            theirs = likeliest(server, peer, prompt, adapter)
            ids, values = torch.tensor(list(theirs)), torch.tensor(list(theirs.values()))
            apart = (ours[:, ids] - values).abs().mean(1)
            others = [float(apart[n]) for n in range(3) if n != row]
            assert apart[row] < 0.25, apart
            assert min(others) > 2 * apart[row], apart


def likeliest(server, peer, prompt, adapter):
    """Return the log-probabilities of the 20 likeliest next tokens by token id."""
    body = peer.body(prompt, adapter, 1)
    if peer.route == "/completion":
        answer = server.ask(peer.route, {**body, "n_probs": 20})
        found = answer["completion_probabilities"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in found}
    more = {"logprobs": 20, "return_tokens_as_token_ids": True}
    answer = server.ask(peer.route, {**body, **more})
    found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): value for token, value in found.items()}


@pytest.mark.peers
@pytest.mark.parametrize("kind", peers.PEER_NAMES)
def test_the_engine_is_measured(kind):
    if kind not in REAL:
        pytest.skip(f"{kind} is not installed in ${peers.FOLDER_VARIABLE}")
    settings = {"backbone": "smollm2-135m", "rank": 8, "tokens": 4, "adapters": 2, "rows": 4}
    worker = Worker(mixed_bench.PEER_WORKERS, kind, {**settings, "peers": None})
    try:
        for case in ([1, 0], [4, 0], [4, 2]):
            assert worker.measure(json.dumps(case))["seconds"] > 0
    finally:
        worker.close()
