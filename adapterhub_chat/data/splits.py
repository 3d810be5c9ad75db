"""Clean, de-duplicated splits: an example lies in the same one whatever else is in the data."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from adapterhub_chat.data.prompts import placeholders
from adapterhub_chat.errors import ConfigError, DataError, join_misfits
from adapterhub_chat.types import SPLITS, Example, PromptContract, Split


@dataclass(frozen=True, slots=True)
class Splits:
    """The examples of a task, cleaned and parted; in each part in a fixed random order."""

    parts: Mapping[Split, tuple[Example, ...]]
    duplicates: int = 0
    """Examples dropped because their input was there already."""
    contradictions: int = 0
    """Examples dropped because one input came with several labels."""

    def where(self, keep: Callable[[Example], bool]) -> Splits:
        """Return the examples that `keep` wants, each in its own split."""
        return Splits({s: tuple(filter(keep, own)) for s, own in self.parts.items()})


def input_key(example: Example, contract: PromptContract) -> str:
    """Return what the model reads of an example, without case and layout: equal keys, equal inputs.

    The template's words take no part, so a task that is asked in new words keeps its splits.
    """
    turns = [message.content for message in example.history]
    fields = [example.fields.get(name, "") for name in sorted(placeholders(contract.template))]
    return "\x1f".join(" ".join(text.casefold().split()) for text in [*turns, *fields] if text)


def split_of(key: str, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Return the split in which `key` lies, whatever else is in the data."""
    place = int.from_bytes(_digest(key)[:8]) / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def split_examples(
    examples: Iterable[Example] | Mapping[Split, Iterable[Example]],
    contract: PromptContract,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    source: str = "examples",
) -> Splits:
    """Clean the examples and part them by the hash of their group or input.

    Splits that the source has are kept; a missing one is cut off its train split. One input stays
    once, and only in the most held-out of the source's splits. If it came with several labels, all
    of its examples go; with several free answers, the most frequent one is taught and all of them
    are accepted.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ConfigError(source, ["split: validation and test are shares with a sum below 1"])
    given = examples if isinstance(examples, Mapping) else {"train": examples}
    shares = {
        "validation": 0.0 if "validation" in given else validation,
        "test": 0.0 if "test" in given else test,
    }
    parts: dict[Split, dict[str, Example]] = {split: {} for split in SPLITS}
    total = contradictions = 0
    for split in reversed(SPLITS):
        listed = list(given.get(split, ()))
        _check(listed, contract, source)
        unique, clashing = _unique(listed, contract)
        total, contradictions = total + len(listed), contradictions + clashing
        for key, example in unique.items():
            if not any(key in part for part in parts.values()):
                to = split_of(example.group or key, **shares) if split == "train" else split
                parts[to][key] = example
    kept = sum(len(part) for part in parts.values())
    if not kept:
        raise DataError(f"{source}: no examples ({contradictions} had contradicting labels)")
    return Splits(
        {s: tuple(part[key] for key in sorted(part, key=_digest)) for s, part in parts.items()},
        duplicates=total - kept - contradictions,
        contradictions=contradictions,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _unique(examples: list[Example], contract: PromptContract) -> tuple[dict[str, Example], int]:
    """Return one example for each input, and how many went because their labels clash."""
    same: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        same[input_key(example, contract)].append(example)
    clashing = {
        key: len(group)
        for key, group in same.items()
        if contract.labels and len({example.answer for example in group}) > 1
    }
    unique = {key: _merged(group) for key, group in same.items() if key not in clashing}
    return unique, sum(clashing.values())


def _merged(same: list[Example]) -> Example:
    """Return the one with the most frequent answer, with everybody's references."""
    if len(same) == 1:
        return same[0]
    count = Counter(e.answer for e in same)
    same = sorted(same, key=lambda e: (-count[e.answer], e.group, e.answer, [*e.fields.values()]))
    accepted = tuple(dict.fromkeys(answer for example in same for answer in example.accepted))
    return replace(same[0], references=accepted if len(accepted) > 1 else same[0].references)


def _check(examples: list[Example], contract: PromptContract, source: str) -> None:
    misfits = [
        f"example {number}: {misfit}"
        for number, example in enumerate(examples, 1)
        for misfit in _misfits(example, contract)
    ]
    if misfits:
        more = [f"and {len(misfits) - 10} more"] if len(misfits) > 10 else []
        raise DataError(join_misfits(source, misfits[:10] + more))


def _misfits(example: Example, contract: PromptContract) -> Iterator[str]:
    for name, required in placeholders(contract.template).items():
        if required and not example.fields.get(name, "").strip():
            yield f"field {name!r} is {'empty' if name in example.fields else 'missing'}"
    if not example.answer.strip():
        yield "the answer is empty"
    elif contract.labels and example.answer not in contract.labels:
        yield f"label {example.answer!r} is not one of {', '.join(contract.labels)}"


def sample(examples: Sequence[Example], limit: int, seed: int = 0) -> list[Example]:
    """Return `limit` examples drawn without replacement (all when 0), in their old order."""
    if not limit or limit >= len(examples):
        return list(examples)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(examples), generator=generator)[:limit]
    return [examples[i] for i in sorted(chosen.tolist())]
