"""Conversations as token ids by a tokenizer's chat template, whatever the template can and cannot do.

The text of a turn never becomes a control token: where it spells one, that spelling is tokenized apart. A
template that refuses system turns or two turns of one role in a row gets the system text in the first user
turn and such turns joined; a tokenizer without a template gets the turns line by line after its own opening.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from adapterhub_chat.errors import UsageError
from adapterhub_chat.types import Message

PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
"""Chat template for tokenizers without one (base models): each turn on a line."""
DEFAULT = "default"
"""Name of the template that chats use, where a tokenizer has several."""
OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the number of a control token that a turn spells."""
SAMPLE_ANSWER = "adapterhub"


def check_template(tokenizer: Any) -> None:
    """Make the template that chats use the tokenizer's only one; raise UsageError where none is named so."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return
    if DEFAULT not in templates:
        raise UsageError(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))}, and none is named "
            f"{DEFAULT!r}; name one of them so in the backbone's tokenizer_config.json"
        )
    tokenizer.chat_template = templates[DEFAULT]


def encode_prompts(
    tokenizer: Any, conversations: Sequence[Sequence[Message]]
) -> list[tuple[int, ...]]:
    """Return the token ids of each conversation, with the start of the assistant's turn.

    Raises UsageError for a conversation that the template refuses.
    """
    if not conversations:
        return []
    rendered = _rendered(tokenizer, [[_as_dict(tokenizer, m) for m in c] for c in conversations])
    opening = () if tokenizer.chat_template else _opening(tokenizer)
    return [(*opening, *ids) for ids in _token_ids(tokenizer, rendered)]


def encode_text(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the token ids of texts, without control tokens and without the tokenizer's opening."""
    return _token_ids(tokenizer, [_marked(tokenizer, text) for text in texts])


def turn_end(tokenizer: Any) -> int:
    """Return the token that ends an assistant's turn: the template's, else the tokenizer's end of text."""
    return _turn_end(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=64)
def _turn_end(tokenizer: Any, template: str) -> int:
    end = int(tokenizer.eos_token_id)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAMPLE_ANSWER}]
    if not template:
        return end
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # the template's own errors: of jinja2, or what its code raises
        return end
    after = text.rpartition(SAMPLE_ANSWER)[2].strip()
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return int(ids[0]) if ids and ids[0] in _control_tokens(tokenizer).values() else end


def _as_dict(tokenizer: Any, message: Message) -> dict[str, str]:
    return {"role": message.role, "content": _marked(tokenizer, message.content)}


def _rendered(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
    """Return each conversation as the template writes it."""

    def render(turns: Sequence[Any]) -> Any:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )

    try:
        rendered: list[str] = render(conversations)
    except Exception:  # one of them, by the template's own rules: which, and does another form do?
        return [_one_rendered(render, turns, n) for n, turns in enumerate(conversations)]
    return rendered


def _one_rendered(
    render: Callable[[Sequence[Any]], Any], turns: list[dict[str, str]], number: int
) -> str:
    """Return a conversation as the template writes it, folded where the template refuses it as it is."""
    for form in (turns, _folded(turns)):
        try:
            return str(render(form))
        except Exception as error:
            reason = error
    raise UsageError(f"conversation {number}: the chat template refuses it: {reason}") from reason


def _folded(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return turns without system turns, whose text opens the next user turn, and with neighbours joined."""
    as_users = [{**t, "role": "user" if t["role"] == "system" else t["role"]} for t in turns]
    return [
        {"role": role, "content": "\n\n".join(turn["content"] for turn in group)}
        for role, group in groupby(as_users, key=lambda turn: turn["role"])
    ]


def _opening(tokenizer: Any) -> tuple[int, ...]:
    """Return the token that the tokenizer puts before a text, if any."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return (int(bos),) if bos is not None and ids and ids[0] == bos else ()


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the spelling and id of every token that is no text, longer spellings first."""
    return _control_tokens_of(tokenizer, len(tokenizer))


@lru_cache(maxsize=64)
def _control_tokens_of(tokenizer: Any, _size: int) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder
    found = {str(token.content): int(i) for i, token in added.items() if token.special}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _marked(tokenizer: Any, text: str) -> str:
    """Return a text with each spelling of a control token replaced by a mark."""
    spellings = list(_control_tokens(tokenizer))
    if OPEN in text:
        text = text.replace(OPEN, "\ufffd")
    if not any(spelling in text for spelling in spellings):
        return text
    pattern = "|".join(map(re.escape, spellings))
    return re.sub(pattern, lambda match: f"{OPEN}{spellings.index(match[0])}{CLOSE}", text)


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids of marked texts: a mark becomes the ids of its spelling as plain text."""
    plain = [text for text in texts if OPEN not in text]
    ids = iter(tokenizer(plain, add_special_tokens=False).input_ids if plain else ())
    return [
        tuple(_with_spellings(tokenizer, text)) if OPEN in text else tuple(next(ids))
        for text in texts
    ]


def _with_spellings(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a marked text; a spelling is cut after its first character, so it is no token."""
    spellings = list(_control_tokens(tokenizer))
    first, *rest = text.split(OPEN)
    parts = [first]
    for part in rest:
        number, _, after = part.partition(CLOSE)
        spelling = spellings[int(number)]
        parts += [spelling[:1], spelling[1:], after]
    parts = [part for part in parts if part]
    if not parts:
        return []
    return [i for ids in tokenizer(parts, add_special_tokens=False).input_ids for i in ids]
