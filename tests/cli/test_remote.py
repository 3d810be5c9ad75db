"""The verbs that speak with a Hub, as a user types them, against a real one on the loopback address."""

import json
import shutil
from pathlib import Path

import pytest
from pico import snapshot

REPO = "alice/critic"


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path, run):
    """The same, with a Hub and alice's token in the environment."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    return run


def scored(name, value):
    """Give a pool member a score beside a backbone's 0.5: two steps of training say nothing."""
    path = Path("adapters", name, "adapterhub.json")
    values = json.loads(path.read_text())
    for score in values["scores"]:
        score |= {"value": value, "backbone_value": 0.5}
    path.write_text(json.dumps(values))


def kept(folder):
    """Return the files of a pool, without those that it keeps for itself."""
    return {p: data for p, data in snapshot(Path(folder)).items() if not str(p).startswith(".")}


def test_push_search_pull_and_pull_again(hub):
    scored("sentiment", 0.9)
    pushed = hub("push", "sentiment", REPO, "--json", backbone=False).json
    assert (pushed["repo"], pushed["version"]) == (REPO, "v1")
    assert hub("search", "--json").json["adapters"][0]["repo"] == REPO
    pulled = hub("pull", REPO, "--revision", "v1", "--name", "critic", "--pool", "mine", "--json")
    assert pulled.code == 0
    (one,) = pulled.json["pulled"]
    assert (one["name"], one["commit"], one["status"], one["changed"]) == (
        "critic", pushed["commit"], "exact", True,
    )  # fmt: skip
    assert "critic: there already" in hub("pull", "--locked", "--pool", "mine").out
    before = kept("mine")
    shutil.rmtree("mine/critic")
    assert "critic: pulled" in hub("pull", "--locked", "--pool", "mine").out
    assert kept("mine") == before
    assert hub("verify", "critic", "--pool", "mine").code == 0


def test_a_signed_adapter(hub, tmp_path):
    scored("sentiment", 0.9)
    key = hub("keygen", "key.pem", "--json", backbone=False).json["public_key"]
    assert hub("keygen", "key.pem", backbone=False).code == 2  # never over another
    hub("push", "sentiment", REPO, "--sign", "key.pem", backbone=False)
    shown = hub("pull", REPO, "--pool", "mine", "--require-signature", key)
    assert f"signed by {key}" in shown.out
    wrong = hub("pull", REPO, "--pool", "other", "--require-signature", "ed25519:" + "A" * 43 + "=")
    assert wrong.code == 2
    assert "not by ed25519:" in wrong.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("pull",), "either user/name, or --locked"),
        (("pull", REPO, "--locked"), "either user/name, or --locked"),
        (("pull", "--locked", "--revision", "v1"), "either user/name, or --locked"),
        (("pull", "--locked"), "has no adapters.lock.json"),
        (("pull", "no-slash"), "is no repository"),
        (("pull", "alice/none"), "404"),
        (("pull", REPO, "--endpoint", "http://example.com"), "is no endpoint"),
    ],
)
def test_what_does_not_fit_is_a_sentence(hub, words, reason):
    shown = hub(*words)
    assert shown.code == 2
    assert reason in " ".join(shown.err.split())


def test_a_loser_is_not_pushed_unless_forced(hub):
    scored("qa", 0.1)
    refused = hub("push", "qa", "alice/qa", backbone=False)
    assert refused.code == 2
    assert "worse than the backbone" in " ".join(refused.err.split())
    assert hub("push", "qa", "alice/qa", "--force", "--private", backbone=False).code == 0
    assert "worse than the backbone" in hub("show", "qa", backbone=False).out


def test_adopt_measures_what_peft_made(hub):
    shutil.copytree("adapters/sentiment", "theirs")
    Path("theirs", "adapterhub.json").unlink()
    shown = hub("adopt", "theirs", "--task", "sentiment", "--name", "adopted", "--json")
    assert shown.code == 0
    assert shown.json["training"]["how"] == "foreign"
    assert [score["task"] for score in shown.json["scores"]] == ["sentiment"]
    assert hub("verify", "adopted").code == 0
    again = hub("adopt", "adopted", "--task", "sentiment")
    assert again.code == 2
    assert "has a manifest already" in again.err
