"""What a merge is asked for, and what it is made of: sources as they lie on the disk, and their tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adapterhub_chat.config import MergeOptions
from adapterhub_chat.data.inputs import listed
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import ConfigError, UsageError, warn
from adapterhub_chat.merge.combine import Merged, default_weights, merge, setting_misfits
from adapterhub_chat.merge.methods import METHODS, Moments
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.provenance import load_trained_task
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stacks import flattened
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import BACKBONE, Mix
from adapterhub_chat.validation import read_settings

AUTO: Literal["auto"] = "auto"
LEARN: Literal["learn"] = "learn"


@dataclass(frozen=True)
class MergeSpec:
    """What a merge is asked for; see AdapterHub.merge."""

    names: tuple[str, ...]
    name: str
    method: str = "svd"
    weights: tuple[float, ...] | Literal["learn"] | None = None
    options: MergeOptions = field(default_factory=MergeOptions)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The weights, where none are given the method's own."""
        return self.given or tuple(default_weights(METHODS[self.method], len(self.names)))

    @property
    def given(self) -> tuple[float, ...] | None:
        """The weights, where they are numbers."""
        return None if isinstance(self.weights, str) else self.weights

    @property
    def needs_tasks(self) -> bool:
        """Whether the sources' tasks are needed: to choose by, or because the method looks."""
        return self.method == AUTO or self.weights == LEARN or METHODS[self.method].needs_moments

    @property
    def mix(self) -> Mix:
        """The sources at run time, with no merge: under the given weights, else evenly."""
        weights = self.given or (1 / len(self.names),) * len(self.names)
        return Mix(tuple(zip(self.names, weights, strict=True)))


def merge_spec(
    names: Sequence[str],
    method: str,
    weights: Sequence[float] | str | None,
    name: str,
    options: Mapping[str, Any],
) -> MergeSpec:
    """Return the order that a caller's words mean; raise ConfigError for all that is wrong with them."""
    order = MergeSpec(
        tuple(names),
        check_name(name),
        method,
        _weights(weights),
        read_settings(MergeOptions, options, "the merge"),
    )
    if found := list(_misfits(order)):
        raise ConfigError("the merge", found)
    return order


def _weights(given: Any) -> tuple[float, ...] | Literal["learn"] | None:
    if given is None:
        return None
    if given == LEARN:
        return LEARN
    try:
        return tuple(float(weight) for weight in listed(given, "weights"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the merge", [f"weights must be numbers, or {LEARN!r} alone; not {given!r}"]
        ) from error


def _misfits(order: MergeSpec) -> Iterator[str]:
    """Yield what is wrong with an order, before anything is read."""
    # auto hands the density to those methods that have one
    known = "ties" if order.method == AUTO else order.method
    names = order.names
    yield from setting_misfits(len(names), order.given, known, order.options.density)
    if order.weights == LEARN and known in METHODS and METHODS[known].needs_moments:
        yield f"{known} finds what is nearest by itself, so no weights are learnt for it; leave them out"
    if not names:
        yield "there are no adapters to merge; name one or more"
    if len(set(names)) < len(names):
        yield f"an adapter is named twice: {', '.join(names)}; give it more weight"
    if BACKBONE in names:
        yield f"{BACKBONE!r} is no adapter; a smaller weight leaves more of the backbone"
    if order.name in names:
        yield f"{order.name!r} is one of the sources; choose another name for the result"


def read_source(registry: Registry, name: str) -> Stored:
    """Load a source, and read its numbers as they lie on the disk: those in a slot are rounded."""
    registry.resolve([name])
    known = registry.known(name)
    stored = registry.read(known.path if known else registry.pool.path(name), name)
    return replace(stored, weights=flattened(registry.pool, stored))


def tasks_of(
    sources: Sequence[Stored], given: Mapping[str, str | Path | Task], *, needed: bool
) -> dict[str, list[Task]]:
    """Return what each source is judged by: the given task, else those that it was trained on."""
    names = [source.name for source in sources]
    if unknown := [name for name in given if name not in names]:
        raise UsageError(f"tasks for {', '.join(unknown)}, but the sources are {', '.join(names)}")
    found: dict[str, list[Task]] = {}
    for source in sources:
        if source.name in given:
            task = given[source.name]
            found[source.name] = [
                task if isinstance(task, Task) else load_trained_task(str(task), source.name)
            ]
            continue
        trained_on = source.manifest.training.tasks if source.manifest else ()
        try:
            found[source.name] = [load_trained_task(task, source.name) for task in trained_on]
        except UsageError:
            if needed:
                raise
            found[source.name] = []
    without = [name for name, own in found.items() if not own]
    if without and needed:
        raise UsageError(
            f"no task is known for {', '.join(without)}, so nothing can be chosen by it; give tasks={{...}}"
        )
    if without:
        text = (
            f"no task is known for {', '.join(without)}: what the merge keeps of it is not measured"
        )
        warn(text)
    return found


def merged_by(
    order: MergeSpec, sources: Sequence[Stored], moments: Moments | None = None
) -> Merged:
    """Return what an order makes of its sources; `moments` are for a method that looks."""
    return merge(
        [source.weights for source in sources],
        order.given,
        method=order.method,
        rank=order.options.rank,
        density=order.options.density,
        seed=order.options.seed,
        moments=moments,
    )
