"""Validation of callers' arguments: lists, conversations, inputs of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterhub_chat.data.encoding import messages_of
from adapterhub_chat.data.prompts import fields_of, render_prompt
from adapterhub_chat.errors import DataError, UsageError, join_misfits
from adapterhub_chat.types import Example, Message, PromptContract, Turn, as_message

MAX_SHOWN = 10
"""Maximum number of misfits in one message."""


def as_list(values: Any, what: str) -> list[Any]:
    """Return `values` as a list; raise UsageError for a single text or mapping."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UsageError(f"{what} must be a list, not one {type(values).__name__}: {values!r}")
    return list(values)


def checked_text(value: Any, what: str) -> str:
    """Return `value`; raise UsageError unless it is a text of valid Unicode."""
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not valid Unicode: {error}") from error
    return value


def conversation(turns: Sequence[Turn], contract: PromptContract | None) -> list[Message]:
    """Return the messages in the form that an adapter with this contract was trained on.

    The contract's template renders the last user turn, and its system turn comes first; a conversation that
    has a system turn stays as it is.
    """
    messages = [_message(turn) for turn in as_list(turns, "a conversation")]
    if not messages or messages[-1].role != "user":
        raise UsageError("a conversation must end with a message whose role is 'user'")
    if contract is None or any(m.role == "system" for m in messages):
        return messages
    fields = fields_of(contract.template, messages[-1].content)
    return messages_of(contract, Example(fields, "", history=tuple(messages[:-1])))


def user_texts(turns: Any) -> list[str]:
    """Return the texts of the user turns and of the last turn; "" stands for an unreadable content."""
    turn_list = list(turns) if isinstance(turns, Sequence) and not isinstance(turns, str) else []
    texts = [
        _content_of(turn)
        for n, turn in enumerate(turn_list, 1)
        if _by_user(turn) or n == len(turn_list)
    ]
    return texts or [""]


def _by_user(turn: Any) -> bool:
    role = turn.get("role") if isinstance(turn, Mapping) else getattr(turn, "role", None)
    return bool(role == "user")


def _content_of(turn: Any) -> str:
    content = turn.get("content") if isinstance(turn, Mapping) else getattr(turn, "content", None)
    return content if isinstance(content, str) else ""


def _message(turn: Any) -> Message:
    if not isinstance(turn, Message | Mapping):
        raise UsageError(f"a message must be a Message or a mapping, not {turn!r}")
    message = as_message(turn)
    checked_text(message.content, "a message")
    return message


def input_examples(contract: PromptContract, inputs: Sequence[Any]) -> list[Example]:
    """Return texts, or fields by name, as examples without answers.

    Raises one DataError that lists all misfits; inputs are counted from 1.
    """
    examples: list[Example] = []
    misfits: list[str] = []
    for number, value in enumerate(inputs, 1):
        try:
            examples.append(_example(contract.template, value, number))
        except UsageError as error:
            misfits.append(str(error))
    if misfits:
        raise DataError(join_misfits("the inputs", misfits, MAX_SHOWN))
    return examples


def _example(template: str, value: Any, number: int) -> Example:
    if not isinstance(value, str | Mapping):
        raise DataError(f"input {number} is neither a text nor fields by name: {value!r}")
    fields = fields_of(template, value, number)
    try:
        checked_text(render_prompt(template, fields), "the prompt")
    except UsageError as error:
        raise DataError(f"input {number}: {error}") from error
    return Example(fields, "")
