"""The terminal conversation: lines in, text out, on the real thing."""

from __future__ import annotations

import shutil

import pytest
from pico import toy_talk, toy_task

from adapterhub_chat import AdapterHub, Message
from adapterhub_chat.cli.chat_session import HELP, ChatSession


@pytest.fixture(scope="module")
def trained(pico_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "pool"
    hub = AdapterHub(str(pico_folder), folder, dtype="fp32", device="cpu")
    quick = {"max_steps": 2, "rows_per_step": 1, "learning_rate": 0.02, "row_length": 128}
    hub.train([toy_task(), toy_talk()], test_examples=0, **quick)
    return folder


class Talk:
    """A session with its output as one text."""

    def __init__(self, hub):
        self.hub, self.pieces = hub, []
        self.session = ChatSession(hub, write=self.pieces.append)

    def __call__(self, line):
        """Hand a line in; return what came out."""
        del self.pieces[:]
        self.session.handle(line)
        return "".join(self.pieces)


@pytest.fixture
def talk(pico_folder, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "pool")
    return Talk(AdapterHub(str(pico_folder), tmp_path / "pool", dtype="fp32", device="cpu"))


def reply(talk, turns, choice):
    return talk.hub.chat([turns], adapters=[choice])[0]


def test_a_line_is_answered_and_remembered(talk):
    first = [Message("user", "Hello film")]
    wanted = reply(talk, first, None)
    assert talk("  Hello film ") == wanted + "\n"
    assert len(talk.pieces) > 2  # it comes in pieces
    second = [*first, Message("assistant", wanted), Message("user", "And then?")]
    assert talk("And then?") == reply(talk, second, None) + "\n"
    assert [m.role for m in talk.session.history] == ["user", "assistant"] * 2


def test_use_changes_the_adapter_of_later_messages(talk):
    turns = [Message("user", "good film")]
    wanted = {n: reply(talk, turns, n) for n in ("toy", "talk", None)}
    assert len(set(wanted.values())) == 3
    for name, text in wanted.items():
        assert talk(f"/use {name or 'backbone'}") == ""
        assert str(talk.session.mix) == (name or "backbone")
        talk("/reset")
        assert talk("good film") == text + "\n"


def test_mix_answers_with_weights(talk):
    assert talk("/mix toy=0.5   talk=0.5") == ""
    assert str(talk.session.mix) == "toy=0.5 talk=0.5"
    wanted = reply(talk, [Message("user", "good film")], {"toy": 0.5, "talk": 0.5})
    assert talk("good film") == wanted + "\n"
    talk("/mix backbone=1")
    assert str(talk.session.mix) == "backbone"


def test_a_folder_can_be_used_and_is_listed(talk, tmp_path):
    shutil.copytree(talk.hub.pool.root / "toy", tmp_path / "mine")
    assert talk(f"/use {tmp_path / 'mine'}") == ""
    assert str(talk.session.mix) == "mine"
    assert "error" not in talk("good film")
    assert talk("/list") == "  backbone\n* mine\n  talk\n  toy\n"


def test_list_marks_the_current_adapter(talk):
    assert talk("/list") == "* backbone\n  talk\n  toy\n"
    talk("/mix toy=0.5 talk=0.5")
    assert talk("/list") == "  backbone\n* talk\n* toy\n"


def test_reset_forgets(talk):
    fresh = talk("Hello")
    assert talk("Hello") != fresh
    talk("/reset")
    assert talk.session.history == []
    assert talk("Hello") == fresh


@pytest.mark.parametrize("line", ["/quit", "/exit", " /quit now"])
def test_quit_ends(talk, line):
    assert not talk.session.ended
    talk(line)
    assert talk.session.ended


def test_help_names_every_command_and_empty_lines_do_nothing(talk):
    assert talk("/help") == HELP
    assert all(command in HELP for command in ("/use", "/mix", "/list", "/reset", "/quit"))
    assert talk("   ") == ""
    assert talk.session.history == []


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("/jump", "error: unknown command /jump; known: /use, /mix, /list, /reset, /help, /quit"),
        ("/use", "error: /use needs a name"),
        ("/use nobody", "error: unknown adapter 'nobody'; known: talk, toy."),
        ("/mix", "error: /mix needs weights"),
        ("/mix toy", "error: 'toy' is not NAME=WEIGHT, as in qa=0.5"),
        ("/mix toy=much", "error: 'toy=much' is not NAME=WEIGHT"),
        ("/mix toy=nan", "error: 'toy=nan' is not NAME=WEIGHT"),
        ("/mix toy=inf", "error: 'toy=inf' is not NAME=WEIGHT"),
        ("/mix =0.5", "error: '=0.5' is not NAME=WEIGHT"),
        ("/mix toy=0.5 nobody=0.5", "error: unknown adapter 'nobody'"),
    ],
)
def test_a_bad_command_writes_an_error_and_keeps_the_state(talk, line, wanted):
    talk("/use talk")
    talk("Hello")
    before = talk.session.mix, talk.session.history
    assert talk(line).startswith(wanted)
    assert (talk.session.mix, talk.session.history) == before
    assert not talk.session.ended


def test_ctrl_c_stops_an_answer_not_the_session(talk):
    talk("Hello")
    before, normal = talk.session.history, talk.session.write

    def press(text):
        talk.session.write = normal
        raise KeyboardInterrupt

    talk.session.write = press
    assert talk("good film") == "\n(stopped; this turn is forgotten)\n"
    assert talk.session.history == before
    assert "stopped" not in talk("good film")
