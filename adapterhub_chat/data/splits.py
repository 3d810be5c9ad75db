"""Clean, de-duplicated splits; the split of an example does not depend on the other examples."""

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
    """The cleaned examples of a task by split, each split in a fixed random order."""

    parts: Mapping[Split, tuple[Example, ...]]
    duplicates: int = 0
    """Examples dropped because their input had occurred before."""
    contradictions: int = 0
    """Examples dropped because their input has several labels."""

    def where(self, keep: Callable[[Example], bool]) -> Splits:
        """Return the examples for which `keep` is true, in their splits."""
        return Splits({s: tuple(filter(keep, examples)) for s, examples in self.parts.items()})


def input_key(example: Example, contract: PromptContract) -> str:
    """Return an example's input without case and layout, as the key of duplicates.

    The template's own words are left out, so that a task with a changed template keeps its splits.
    """
    turns = [message.content for message in example.history]
    fields = [example.fields.get(name, "") for name in sorted(placeholders(contract.template))]
    return "\x1f".join(" ".join(text.casefold().split()) for text in [*turns, *fields] if text)


def split_of(key: str, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Return the split of `key`, by its hash alone."""
    fraction = int.from_bytes(_digest(key)[:8]) / 2**64
    if fraction < test:
        return "test"
    return "validation" if fraction < test + validation else "train"


def split_examples(
    examples: Iterable[Example] | Mapping[Split, Iterable[Example]],
    contract: PromptContract,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    source: str = "examples",
) -> Splits:
    """Clean the examples and split them by the hash of their group or input.

    Splits that the source has are kept; a missing one is taken from its train split. Each input stays once,
    in the most held-out of the source's splits (test, validation, train). If an input has several labels, all
    of its examples are dropped; if it has several free answers, the most frequent one is the training target
    and all of them are accepted.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ConfigError(source, ["split: validation and test are shares with a sum below 1"])
    sources = examples if isinstance(examples, Mapping) else {"train": examples}
    shares = {
        "validation": 0.0 if "validation" in sources else validation,
        "test": 0.0 if "test" in sources else test,
    }
    parts: dict[Split, dict[str, Example]] = {split: {} for split in SPLITS}
    total = contradictions = 0
    for split in reversed(SPLITS):
        source_examples = list(sources.get(split, ()))
        _check(source_examples, contract, source)
        unique, num_contradicting = _unique(source_examples, contract)
        total, contradictions = total + len(source_examples), contradictions + num_contradicting
        for key, example in unique.items():
            if not any(key in part for part in parts.values()):
                target = split_of(example.group or key, **shares) if split == "train" else split
                parts[target][key] = example
    num_kept = sum(len(part) for part in parts.values())
    if not num_kept:
        raise DataError(f"{source}: no examples ({contradictions} had contradicting labels)")
    return Splits(
        {s: tuple(part[key] for key in sorted(part, key=_digest)) for s, part in parts.items()},
        duplicates=total - num_kept - contradictions,
        contradictions=contradictions,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _unique(examples: list[Example], contract: PromptContract) -> tuple[dict[str, Example], int]:
    """Return one example for each input, and the number of examples dropped for contradicting labels."""
    examples_by_key: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        examples_by_key[input_key(example, contract)].append(example)
    contradicting = {
        key: len(group)
        for key, group in examples_by_key.items()
        if contract.labels and len({example.answer for example in group}) > 1
    }
    unique = {
        key: _merge_duplicates(group)
        for key, group in examples_by_key.items()
        if key not in contradicting
    }
    return unique, sum(contradicting.values())


def _merge_duplicates(duplicates: list[Example]) -> Example:
    """Return the example with the most frequent answer, and the references of all."""
    if len(duplicates) == 1:
        return duplicates[0]
    count = Counter(e.answer for e in duplicates)
    duplicates = sorted(
        duplicates, key=lambda e: (-count[e.answer], e.group, e.answer, [*e.fields.values()])
    )
    accepted = tuple(dict.fromkeys(answer for example in duplicates for answer in example.accepted))
    return replace(
        duplicates[0], references=accepted if len(accepted) > 1 else duplicates[0].references
    )


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
    """Return `limit` examples drawn without replacement (0: all), in their original order."""
    if not limit or limit >= len(examples):
        return list(examples)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(examples), generator=generator)[:limit]
    return [examples[i] for i in sorted(chosen.tolist())]
