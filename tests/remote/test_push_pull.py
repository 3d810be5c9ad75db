"""push and pull against a real Hub on the loopback address: round trips, tags, races, keys, the lock."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from hub_server import after, only
from pico import keep_adapter as keep
from pico import toy_task

from adapterhub_chat import AdapterHub
from adapterhub_chat.artifact.manifest import MANIFEST, read_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, HubError, PoolError, UsageError
from adapterhub_chat.files import file_sha256
from adapterhub_chat.pool.lockfile import read_lock
from adapterhub_chat.remote import signing
from adapterhub_chat.remote.client import HubClient, RemoteFile, Snapshot

REPO = "alice/toy"
PROMPTS = ["good film", "a bad one"]


@pytest.fixture
def speak(hub_server, monkeypatch, tmp_path):
    """The endpoint and token of alice."""
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    return {"endpoint": hub_server.endpoint, "token": "hf_alice"}


@pytest.fixture
def made(hub, make_weights):
    return keep(hub, make_weights())


@pytest.fixture
def other(pico_folder, tmp_path):
    """Somebody else's hub, with an empty pool."""
    return AdapterHub(str(pico_folder), tmp_path / "other pool", dtype="fp32", device="cpu")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def everything(root):
    """Return all files under a folder, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_what_is_pushed_is_what_is_pulled(made, speak, pico_folder, tmp_path):
    done = made.push("toy", REPO, **speak)
    assert done.version == "v1"
    wanted = made.next_token_logits(PROMPTS, ["toy", "toy"])
    for place in ("one", "two"):
        other = AdapterHub(str(pico_folder), tmp_path / place, dtype="fp32", device="cpu")
        pulled = other.pull(REPO, **speak)
        assert (pulled.commit, pulled.status, pulled.changed) == (done.commit, "exact", True)
        assert torch.equal(other.next_token_logits(PROMPTS, ["toy", "toy"]), wanted)
        assert files(other.pool.root / "toy") == files(made.pool.root / "toy")
        assert not [p for p in other.pool.root.iterdir() if p.name.startswith((".tmp", ".inc"))]


PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, repo, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(model, repo).eval()
with torch.no_grad():
    rows = [model(torch.tensor([tokenizer(p).input_ids])).logits[0, -1].tolist() for p in prompts]
print(json.dumps(rows))
"""


def test_peft_loads_it_off_the_same_hub(made, speak, pico_folder, tmp_path):
    made.push("toy", REPO, **speak)
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": speak["endpoint"],
        "HF_TOKEN": speak["token"],
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", PEFT, str(pico_folder), REPO, json.dumps(PROMPTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(
        rows, made.next_token_logits(PROMPTS, ["toy", "toy"]), atol=1e-4, rtol=1e-4
    )


def test_only_the_files_of_an_adapter_are_published(made, speak, hub_server):
    folder = made.pool.root / "toy"
    (folder / ".env").write_text("SECRET=1")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "link").symlink_to("/etc/hostname")
    made.push("toy", REPO, **speak)
    names = set(HubClient(**speak).snapshot(REPO).files) - {".gitattributes"}
    assert names == {CONFIG, WEIGHTS, MANIFEST, "README.md"}


@pytest.mark.filterwarnings("default:.*:UserWarning")  # other tests assert the warnings
def test_a_plain_peft_repository_is_pulled_as_unverified(made, other, speak):
    hub, folder = HubClient(**speak), made.pool.root / "toy"
    config = json.loads((folder / CONFIG).read_text()) | {
        "lora_dropout": 0.1,
        "inference_mode": False,
    }
    hub.create(REPO, private=False)
    plain = {CONFIG: json.dumps(config).encode(), WEIGHTS: (folder / WEIGHTS).read_bytes()}
    hub.commit(REPO, plain | {"README.md": b"<script>x</script>", "tokenizer.json": b"{}"}, "plain")
    pulled = other.pull(REPO, **speak)
    assert pulled.status == "unverified"
    assert set(files(other.pool.root / "toy")) == {CONFIG, WEIGHTS}
    with pytest.warns(UserWarning, match="unverified"):
        got = other.next_token_logits(PROMPTS, ["toy", "toy"])
    assert torch.equal(got, made.next_token_logits(PROMPTS, ["toy", "toy"]))
    with pytest.raises(AdapterError, match=r"has no manifest.*adopt toy --task"):
        other.push("toy", "alice/again", **speak)
    manifest = other.adopt("toy", toy_task())
    assert manifest.training.how == "foreign"
    assert [s.task for s in manifest.scores] == ["toy"]
    assert other.verify("toy").status == "exact"


def test_a_measured_winner_is_published_and_others_are_refused(hub, make_weights, speak):
    keep(hub, make_weights(), "unmeasured", None)
    keep(hub, make_weights(), "loser", 0.4)
    with pytest.raises(AdapterError, match=r"'unmeasured' was never measured.*--force"):
        hub.push("unmeasured", REPO, **speak)
    with pytest.raises(
        AdapterError, match=r"worse than the backbone.*accuracy 0.400, backbone 0.500"
    ):
        hub.push("loser", REPO, **speak)
    with pytest.raises(HubError, match="404"):
        HubClient(**speak).snapshot(REPO)  # not even the repository was made
    hub.push("loser", REPO, force=True, **speak)
    assert (
        "worse than the backbone without it on toy"
        in (hub.pool.root / "loser" / "README.md").read_text()
    )
    hub.push("unmeasured", "alice/un", force=True, **speak)
    assert (
        "without having been measured" in (hub.pool.root / "unmeasured" / "README.md").read_text()
    )


def test_versions_are_counted_and_never_move(made, speak, make_weights):
    first = made.push("toy", REPO, **speak)
    assert made.push("toy", REPO, **speak) == first  # nothing was new
    keep(made, make_weights(seed=2))
    second = made.push("toy", REPO, **speak)
    keep(made, make_weights(seed=3))
    with pytest.raises(HubError, match="has a version 'v1' already"):
        made.push("toy", REPO, version="v1", **speak)
    named = made.push("toy", REPO, version="spring", **speak)
    assert (first.version, second.version, named.version) == ("v1", "v2", "spring")
    tags = HubClient(**speak).tags(REPO)
    assert tags == {"v1": first.commit, "v2": second.commit, "spring": named.commit}


def test_a_tag_and_a_commit_are_pulled_as_they_were(made, other, speak, make_weights):
    first = made.push("toy", REPO, **speak)
    keep(made, make_weights(seed=2))
    made.push("toy", REPO, **speak)
    assert other.pull(REPO, "v1", name="by-tag", **speak).commit == first.commit
    assert other.pull(REPO, first.commit, name="by-commit", **speak).commit == first.commit
    newest = other.pull(REPO, name="newest", **speak).commit
    assert newest != first.commit
    old, new = (other.pool.manifest(n).sha256 for n in ("by-tag", "newest"))
    assert old != new


def test_concurrent_pushes_lose_no_commit(pico_folder, speak, make_weights, tmp_path):
    weights = [make_weights(seed=seed) for seed in range(2)]
    hubs = [
        keep(AdapterHub(str(pico_folder), tmp_path / f"p{n}", dtype="fp32", device="cpu"), w)
        for n, w in enumerate(weights)
    ]
    HubClient(**speak).create(REPO, private=False)

    def many(hub):
        return [
            hub.push("toy", REPO, version=f"{hub.pool.root.name}-{n}", **speak) for n in range(20)
        ]

    with ThreadPoolExecutor(2) as threads:
        done = [one for each in threads.map(many, hubs) for one in each]
    tags = HubClient(**speak).tags(REPO)
    assert tags == {one.version: one.commit for one in done}
    assert len(tags) == 40
    for one in done[::10]:
        snapshot = HubClient(**speak).snapshot(REPO, one.version)
        assert {CONFIG, WEIGHTS, MANIFEST, "README.md"} <= set(snapshot.files)


def test_a_private_repository_needs_its_token(made, other, speak):
    made.push("toy", REPO, private=True, **speak)
    for token in (None, "hf_bob", "hf_wrong"):
        with pytest.raises(HubError, match=r"40[14]"):
            other.pull(REPO, endpoint=speak["endpoint"], token=token)
    assert other.pull(REPO, **speak).changed
    with pytest.raises(HubError, match=r"40[134]"):
        made.push("toy", REPO, endpoint=speak["endpoint"], token="hf_bob")


# ---- signatures ----------------------------------------------------------------------------------


def test_pull_reports_the_signer(made, other, speak, tmp_path):
    key, stranger = (signing.make_key(tmp_path / n) for n in ("a.pem", "b.pem"))
    assert (tmp_path / "a.pem").stat().st_mode & 0o777 == 0o600
    made.push("toy", REPO, **speak)
    with pytest.raises(AdapterError, match="signed by nobody, not by ed25519:"):
        other.pull(REPO, require_signature=key, **speak)
    made.push("toy", REPO, sign=tmp_path / "a.pem", **speak)
    with pytest.raises(AdapterError, match="not by"):
        other.pull(REPO, require_signature=stranger, **speak)
    assert other.pool.names() == []
    assert other.pull(REPO, require_signature=key, **speak).signed_by == key
    made.push("toy", REPO, sign=tmp_path / "b.pem", **speak)
    with pytest.raises(AdapterError, match="was signed by"):
        other.pull(REPO, **speak)
    assert other.pull(REPO, require_signature=stranger, **speak).signed_by == stranger


@pytest.mark.parametrize("what", [CONFIG, WEIGHTS, MANIFEST, "signature", "key"])
def test_a_signature_covers_every_file(made, other, speak, tmp_path, what):
    key = signing.make_key(tmp_path / "a.pem")
    made.push("toy", REPO, sign=tmp_path / "a.pem", **speak)
    hub = HubClient(**speak)
    snapshot = hub.snapshot(REPO)
    for name in (CONFIG, WEIGHTS, MANIFEST, signing.SIGNATURE_FILE):
        hub.download(snapshot, name, tmp_path / name, 2**20)
    content = {
        n: (tmp_path / n).read_bytes() for n in (CONFIG, WEIGHTS, MANIFEST, signing.SIGNATURE_FILE)
    }
    if what in content:
        content[what] += b" "
    else:
        signature = json.loads(content[signing.SIGNATURE_FILE])
        other_key = signing.make_key(tmp_path / "b.pem")
        signature |= {"key": other_key} if what == "key" else {"signature": "AAAA"}
        content[signing.SIGNATURE_FILE] = json.dumps(signature).encode()
    hub.commit(REPO, content, "tampered")
    with pytest.raises(AdapterError, match=signing.SIGNATURE_FILE.replace(".", r"\.")):
        other.pull(REPO, **speak)
    assert other.pool.names() == []
    assert key


# ---- the lock ------------------------------------------------------------------------------------


def test_the_lock_brings_a_pool_back_to_the_byte_and_offline(
    made, other, speak, monkeypatch, hub_server
):
    made.push("toy", REPO, **speak)
    pulled = other.pull(REPO, "v1", **speak)
    pinned = read_lock(other.pool.root).adapters["toy"]
    assert (pinned.repo, pinned.revision, pinned.commit) == (REPO, "v1", pulled.commit)
    assert set(pinned.files) == {CONFIG, WEIGHTS, MANIFEST}
    before = files(other.pool.root / "toy")
    seen = len(hub_server.requests)
    assert [one.changed for one in other.pull_locked()] == [False]
    (other.pool.root / "toy" / WEIGHTS).write_bytes(b"broken")
    assert [one.changed for one in other.pull_locked()] == [True]
    assert len(hub_server.requests) == seen  # from what was kept
    assert files(other.pool.root / "toy") == before


def test_the_lock_brings_a_pool_to_another_machine(
    made, other, speak, pico_folder, tmp_path, monkeypatch
):
    made.push("toy", REPO, **speak)
    other.pull(REPO, "v1", **speak)
    elsewhere = AdapterHub(str(pico_folder), tmp_path / "third", dtype="fp32", device="cpu")
    elsewhere.pool.root.mkdir()
    lock = (other.pool.root / "adapters.lock.json").read_bytes()
    (elsewhere.pool.root / "adapters.lock.json").write_bytes(lock)
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "another cache"))
    assert [one.changed for one in elsewhere.pull_locked(speak["token"])] == [True]
    assert files(elsewhere.pool.root / "toy") == files(other.pool.root / "toy")
    assert (elsewhere.pool.root / "adapters.lock.json").read_bytes() == lock


def test_a_name_is_not_taken_over(made, other, speak, make_weights):
    made.push("toy", REPO, **speak)
    made.push("toy", "alice/other-toy", **speak)
    keep(other, make_weights(seed=5))
    with pytest.raises(UsageError, match=r"has an adapter 'toy', and it was not pulled.*--name"):
        other.pull(REPO, **speak)
    other.pull(REPO, replace=True, **speak)
    with pytest.raises(UsageError, match=f"came from {REPO} at"):
        other.pull("alice/other-toy", name="toy", **speak)


def test_a_tag_that_moved_is_seen(made, other, speak, make_weights):
    hub = HubClient(**speak)
    made.push("toy", REPO, **speak)
    other.pull(REPO, "v1", **speak)
    before = everything(other.pool.root)
    keep(made, make_weights(seed=2))
    newer = made.push("toy", REPO, **speak)
    hub._api.delete_tag(REPO, tag="v1")
    hub.tag(REPO, "v1", newer.commit)
    with pytest.raises(HubError, match=r"the tag 'v1'.*tags are not to move.*--replace"):
        other.pull(REPO, "v1", **speak)
    assert everything(other.pool.root) == before
    assert other.pull(REPO, "v1", replace=True, **speak).commit == newer.commit


def test_a_repository_that_was_made_anew_is_seen(made, other, speak, make_weights):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    HubClient(**speak)._api.delete_repo(REPO)
    keep(made, make_weights(seed=2))
    made.push("toy", REPO, **speak)
    with pytest.raises(HubError, match="rewritten, or somebody else has the name"):
        other.pull(REPO, **speak)


def test_other_weights_under_a_pulled_name_end_its_pin(made, other, speak, make_weights):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    keep(other, make_weights(seed=9))
    assert read_lock(other.pool.root).adapters == {}
    other.pull(REPO, replace=True, **speak)
    other.pool.delete("toy")
    assert read_lock(other.pool.root).adapters == {}


def test_search_ranks_adapters_by_fit(made, speak, other_folder, make_weights, tmp_path):
    made.push("toy", REPO, **speak)
    stranger = AdapterHub(str(other_folder), tmp_path / "stranger", dtype="fp32", device="cpu")
    keep(stranger, make_weights())
    stranger.push("toy", "bob/stranger", endpoint=speak["endpoint"], token="hf_bob")
    found = made.search(**speak)
    assert [(one.repo, one.fit, one.tasks) for one in found] == [(REPO, "exact", ("toy",))]
    assert found[0].scores == (("toy", "accuracy", 0.9),)
    assert made.search("nothing", **speak) == []
    assert [one.repo for one in stranger.search(**speak)] == ["bob/stranger"]


# ---- tokens and hosts ----------------------------------------------------------------------------


def test_a_token_is_sent_only_to_its_endpoint(speak, monkeypatch, hub_server, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    with pytest.raises(HubError):
        HubClient(speak["endpoint"]).snapshot("alice/none")
    assert all("authorization" not in seen.headers for seen in hub_server.requests)
    monkeypatch.setenv("HF_ENDPOINT", speak["endpoint"])
    with pytest.raises(HubError) as caught:
        HubClient().snapshot("alice/none")
    assert "hf_secret" not in repr(caught.value) + repr(HubClient())
    assert hub_server.requests[-1].headers["authorization"] == "Bearer hf_secret"


def test_offline_mode_is_an_error(other, speak, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        other.pull(REPO, **speak)


def test_a_lock_sends_no_token_to_the_hub_that_it_names(
    made, other, speak, hub_server, monkeypatch
):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    (other.pool.root / "toy" / WEIGHTS).write_bytes(b"broken")
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(other.pool.root.parent / "another cache"))
    hub_server.requests.clear()
    assert other.pull_locked("hf_secret")[0].changed
    assert hub_server.requests
    assert all("authorization" not in seen.headers for seen in hub_server.requests)


def test_a_lock_without_weights_is_refused(made, other, speak):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    path = other.pool.root / "adapters.lock.json"
    lock = json.loads(path.read_text())
    del lock["adapters"]["toy"]["installed"][WEIGHTS]
    path.write_text(json.dumps(lock))
    (other.pool.root / "toy" / WEIGHTS).write_bytes(b"other")
    assert other.pull_locked()[0].changed


def test_a_recreated_client_keeps_the_bounds(made, speak, monkeypatch):
    """The library throws its client away after a broken connection."""

    def ask():
        huggingface_hub.close_session()
        return huggingface_hub.get_session().get("http://localhost:9/x")

    with pytest.raises(HubError, match="is another host"):
        HubClient(**speak)._call("trying", ask)


def test_a_commit_whose_files_have_changed_is_seen(made, other, speak, make_weights):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    path = other.pool.root / "adapters.lock.json"
    lock = json.loads(path.read_text())
    lock["adapters"]["toy"]["files"][WEIGHTS] = "0" * 64  # as if the Hub had given others then
    path.write_text(json.dumps(lock))
    with pytest.raises(HubError, match="a commit does not change"):
        other.pull(REPO, **speak)


def test_a_pinned_name_whose_folder_is_gone_is_not_taken_over(made, other, speak):
    made.push("toy", REPO, **speak)
    made.push("toy", "alice/other-toy", **speak)
    other.pull(REPO, **speak)
    shutil.rmtree(other.pool.root / "toy")
    with pytest.raises(UsageError, match=f"came from {REPO}"):
        other.pull("alice/other-toy", name="toy", **speak)
    other.pull("alice/other-toy", name="toy", replace=True, **speak)
    assert read_lock(other.pool.root).adapters["toy"].repo == "alice/other-toy"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["training"].update(peak_bytes=10**400), "peak_bytes"),
        (lambda m: m["scores"][0].update(value="X"), "value"),
    ],
)
def test_numbers_beyond_all_bounds_are_refused(made, other, speak, change, words):
    folder, hub = made.pool.root / "toy", HubClient(**speak)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    files = {n: (folder / n).read_bytes() for n in (CONFIG, WEIGHTS)}
    hub.create(REPO, private=False)
    hub.commit(REPO, files | {MANIFEST: json.dumps(manifest).encode()}, "bad")
    with pytest.raises(AdapterError, match=words):
        other.pull(REPO, **speak)


def test_a_number_too_large_for_json_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text('{"scores": [1e999]}')
    with pytest.raises(AdapterError, match="too large for a number"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("bad", ["\u00e9", "AA", "=" * 88])
def test_a_signature_that_is_none_is_refused(tmp_path, bad):
    signing.make_key(tmp_path / "k")
    hashes = {"a": "0" * 64}
    values = json.loads(signing.sign(tmp_path / "k", hashes)) | {"signature": bad}
    with pytest.raises(AdapterError, match="is not the signature"):
        signing.signer_of(json.dumps(values).encode(), hashes)


# ---- locks, signatures and moments that cannot be trusted ----------------------------------------


def relock(hub, change):
    """Change what a pool's lock says of `toy`."""
    path = hub.pool.root / "adapters.lock.json"
    lock = json.loads(path.read_text())
    change(lock["adapters"]["toy"])
    path.write_text(json.dumps(lock))


def test_a_lock_cannot_claim_a_signature(made, other, speak, tmp_path):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    key = signing.make_key(tmp_path / "k.pem")
    relock(other, lambda pinned: pinned.update(signed_by=key))
    with pytest.raises(AdapterError, match="signed by nobody"):
        other.pull_locked()
    shutil.rmtree(other.pool.root / "toy")
    with pytest.raises(AdapterError, match="signed by nobody"):
        other.pull_locked()


def test_a_lock_whose_two_halves_differ_is_followed_in_what_was_pulled(
    made, other, speak, make_weights
):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    wanted = read_lock(other.pool.root).adapters["toy"].files[WEIGHTS]
    keep(made, make_weights(seed=9))
    for name in (WEIGHTS, MANIFEST, "README.md"):
        shutil.copyfile(made.pool.root / "toy" / name, other.pool.root / "toy" / name)
    folder = other.pool.root / "toy"
    hashes = {n: file_sha256(folder / n) for n in (CONFIG, WEIGHTS, MANIFEST, "README.md")}
    relock(other, lambda pinned: pinned.update(installed=hashes))
    assert other.pull_locked()[0].changed
    assert file_sha256(folder / WEIGHTS) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda pinned: pinned.update(installed={"x" * 5000: "0" * 64}),
        lambda pinned: pinned.update(installed={"../../etc/passwd": "0" * 64}),
        lambda pinned: pinned.update(files={"a\0b": "0" * 64}),
        lambda pinned: pinned.update(signed_by="\x1b[2J"),
        lambda pinned: pinned.update(commit="main"),
    ],
)
def test_a_lock_that_names_what_cannot_be_is_refused(made, other, speak, change):
    made.push("toy", REPO, **speak)
    other.pull(REPO, **speak)
    relock(other, change)
    with pytest.raises(PoolError, match=r"adapters\.lock\.json"):
        other.pull_locked()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"adapters": [' + "0," * 400_000 + "0]}", " " * 2**21]
)
def test_a_lock_that_is_none_is_refused_at_once(other, text):
    other.pool.root.mkdir()
    (other.pool.root / "adapters.lock.json").write_text(text)
    with pytest.raises(PoolError, match=r"adapters\.lock\.json") as refused:
        other.pull_locked()
    assert len(str(refused.value)) < 2000


def test_files_that_were_signed_for_another_repository_are_refused(made, other, speak, tmp_path):
    key = signing.make_key(tmp_path / "k.pem")
    made.push("toy", REPO, sign=tmp_path / "k.pem", **speak)
    hub, names = HubClient(**speak), (CONFIG, WEIGHTS, MANIFEST, signing.SIGNATURE_FILE)
    snapshot = hub.snapshot(REPO)
    for name in names:
        hub.download(snapshot, name, tmp_path / name, 2**20)
    hub.create("alice/copy", private=False)
    hub.commit("alice/copy", {n: (tmp_path / n).read_bytes() for n in names}, "borrowed")
    with pytest.raises(AdapterError, match=f"were signed for '{REPO}'"):
        other.pull("alice/copy", require_signature=key, **speak)
    assert other.pool.names() == []


def test_an_adapter_saved_during_a_download_is_not_replaced(
    made, other, speak, make_weights, hub_server
):
    made.push("toy", REPO, **speak)

    def save_first(reply):
        if "toy" not in other.pool:
            keep(other, make_weights(seed=5))

    hub_server.mischief = only("resolve/.*safetensors", after(save_first))
    with pytest.raises(UsageError, match="was not pulled"):
        other.pull(REPO, **speak)
    assert other.pool.load("toy").weights.factors.keys() == make_weights(seed=5).factors.keys()
    assert read_lock(other.pool.root).adapters == {}
    assert not list(other.pool.root.glob(".[nt]*"))


def test_concurrent_pulls_succeed(made, speak, pico_folder, tmp_path):
    made.push("toy", REPO, **speak)
    other = AdapterHub(str(pico_folder), tmp_path / "many", dtype="fp32", device="cpu")
    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda n: other.pull(REPO, name=f"toy{n}", **speak), range(16)))
    assert [one.name for one in done] == [f"toy{n}" for n in range(16)]
    assert set(read_lock(other.pool.root).adapters) == {f"toy{n}" for n in range(16)}


def test_an_unwritable_cache_is_ignored(made, other, speak, tmp_path, monkeypatch):
    made.push("toy", REPO, **speak)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "file"))
    assert other.pull(REPO, **speak).changed


def test_a_full_disk_is_a_sentence_and_leaves_the_pool_as_it_was(made, other, speak, monkeypatch):
    made.push("toy", REPO, **speak)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("adapterhub_chat.remote.client.HubClient._stream", full)
    monkeypatch.setattr("adapterhub_chat.remote.client.HubClient.snapshot", lambda *_: snapshot)
    snapshot = Snapshot(
        REPO, "a" * 40, {n: RemoteFile(n, 10, blob="0" * 40) for n in (CONFIG, WEIGHTS)}
    )
    with pytest.raises(PoolError, match="the disk is full"):
        other.pull(REPO, **speak)
    assert other.pool.names() == []
    assert not list(other.pool.root.glob(".incoming*"))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("/refs", {"tags": 5}),
        ("/refs", {"tags": [{"name": []}]}),
        ("repos/create", []),
        ("repos/create", {"url": 5}),
        ("preupload", []),
        ("objects/batch", []),
        ("/commit/", {}),
        ("/commit/", {"commitOid": 5, "commitUrl": 5}),
    ],
)
def test_odd_answers_to_a_push_are_hub_errors(made, speak, hub_server, pattern, said):
    def odd(reply):
        reply.json, reply.status = said, 200

    hub_server.mischief = only(pattern, after(odd))
    message = ""
    try:
        made.push("toy", REPO, **speak)
    except HubError as error:  # any other error is a bug
        message = str(error)
    assert "hf_alice" not in message


HUGE = {"task": {"name": "t"}, "metrics": [{"type": "m", "value": 10**400}]}


@pytest.mark.parametrize(
    "entry",
    [
        {"id": ["a"]},
        {"id": "alice/x", "tags": 5},
        {"id": "alice/x", "downloads": "many", "cardData": []},
        {"id": "alice/x", "cardData": {"model-index": [{"results": [HUGE]}]}},
    ],
)
def test_malformed_search_results_are_skipped(made, speak, hub_server, entry):
    made.push("toy", REPO, **speak)

    def odd(reply):
        reply.json = [entry, *reply.json]

    hub_server.mischief = only("GET /api/models", after(odd))
    assert REPO in [one.repo for one in made.search(**speak)]


@pytest.mark.parametrize("source", ["x" * 5000, "~nosuchuser/x", "a\0b", "x/" * 3000])
def test_what_cannot_be_a_folder_is_a_sentence(other, source):
    with pytest.raises(UsageError):
        other.load(source)
