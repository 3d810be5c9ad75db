"""What callers hand in, checked at the door: lists, conversations, inputs of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterhub_chat.data.encoding import messages_of
from adapterhub_chat.data.prompts import fields_of, render_prompt
from adapterhub_chat.errors import DataError, UsageError, join_misfits
from adapterhub_chat.types import Example, Message, PromptContract, Turn, as_message

SHOWN = 10
"""Misfits listed one by one."""


def listed(values: Any, what: str) -> list[Any]:
    """Return `values` as a list; a lone text or mapping would be taken apart letter by letter."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UsageError(f"{what} must be a list, not one {type(values).__name__}: {values!r}")
    return list(values)


def text(value: Any, what: str) -> str:
    """Return `value` when it is a text that a tokenizer can read."""
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not valid Unicode: {error}") from error
    return value


def conversation(turns: Sequence[Turn], contract: PromptContract | None) -> list[Message]:
    """Return the messages as an adapter with this contract was taught to see them.

    The user's last turn goes through the template, under the contract's system turn; a conversation
    that brings a system turn of its own stays as it is.
    """
    messages = [_message(turn) for turn in listed(turns, "a conversation")]
    if not messages or messages[-1].role != "user":
        raise UsageError("a conversation must end with a message whose role is 'user'")
    if contract is None or any(m.role == "system" for m in messages):
        return messages
    fields = fields_of(contract.template, messages[-1].content)
    return messages_of(contract, Example(fields, "", history=tuple(messages[:-1])))


def asked(turns: Any) -> list[str]:
    """Return what a conversation's user has said, at the end its last turn; "" is what cannot be read."""
    own = list(turns) if isinstance(turns, Sequence) and not isinstance(turns, str) else []
    said = [_said(turn) for n, turn in enumerate(own, 1) if _by_user(turn) or n == len(own)]
    return said or [""]


def _by_user(turn: Any) -> bool:
    role = turn.get("role") if isinstance(turn, Mapping) else getattr(turn, "role", None)
    return bool(role == "user")


def _said(turn: Any) -> str:
    found = turn.get("content") if isinstance(turn, Mapping) else getattr(turn, "content", None)
    return found if isinstance(found, str) else ""


def _message(turn: Any) -> Message:
    if not isinstance(turn, Message | Mapping):
        raise UsageError(f"a message must be a Message or a mapping, not {turn!r}")
    message = as_message(turn)
    text(message.content, "a message")
    return message


def unanswered(contract: PromptContract, inputs: Sequence[Any]) -> list[Example]:
    """Return texts, or fields by name, as examples that wait for an answer.

    Raises one DataError for all that do not fit, counted from 1.
    """
    examples: list[Example] = []
    misfits: list[str] = []
    for number, given in enumerate(inputs, 1):
        try:
            examples.append(_example(contract.template, given, number))
        except UsageError as error:
            misfits.append(str(error))
    if misfits:
        raise DataError(join_misfits("the inputs", misfits, SHOWN))
    return examples


def _example(template: str, given: Any, number: int) -> Example:
    if not isinstance(given, str | Mapping):
        raise DataError(f"input {number} is neither a text nor fields by name: {given!r}")
    fields = fields_of(template, given, number)
    try:
        text(render_prompt(template, fields), "the prompt")
    except UsageError as error:
        raise DataError(f"input {number}: {error}") from error
    return Example(fields, "")
