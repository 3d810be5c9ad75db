"""The specification of a merge; its sources, read from disk, and their tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adapterhub_chat.config import MergeOptions
from adapterhub_chat.data.inputs import as_list
from adapterhub_chat.data.task import Task
from adapterhub_chat.errors import ConfigError, UsageError, warn
from adapterhub_chat.merge.combine import Merged, default_weights, merge, setting_misfits
from adapterhub_chat.merge.methods import METHODS, Moments
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.provenance import load_trained_task, load_trained_tasks
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stacks import flattened
from adapterhub_chat.pool.stored import Stored
from adapterhub_chat.types import BACKBONE, Mix
from adapterhub_chat.validation import read_settings

AUTO: Literal["auto"] = "auto"
LEARN: Literal["learn"] = "learn"


@dataclass(frozen=True)
class MergeSpec:
    """The arguments of a merge; see AdapterHub.merge."""

    names: tuple[str, ...]
    name: str
    method: str = "svd"
    weights: tuple[float, ...] | Literal["learn"] | None = None
    options: MergeOptions = field(default_factory=MergeOptions)

    @property
    def source_weights(self) -> tuple[float, ...]:
        """A weight for each source: the explicit ones, else the method's default."""
        return self.explicit_weights or tuple(
            default_weights(METHODS[self.method], len(self.names))
        )

    @property
    def explicit_weights(self) -> tuple[float, ...] | None:
        """The weights if they are numbers, None if they are to be learnt or the method's default."""
        return None if isinstance(self.weights, str) else self.weights

    @property
    def needs_tasks(self) -> bool:
        """Whether the sources' tasks are required: to select method or weights, or for the moments."""
        return self.method == AUTO or self.weights == LEARN or METHODS[self.method].needs_moments

    @property
    def mix(self) -> Mix:
        """The run-time mix of the sources: under the explicit weights, else evenly."""
        weights = self.explicit_weights or (1 / len(self.names),) * len(self.names)
        return Mix(tuple(zip(self.names, weights, strict=True)))


def merge_spec(
    names: Sequence[str],
    method: str,
    weights: Sequence[float] | str | None,
    name: str,
    options: Mapping[str, Any],
) -> MergeSpec:
    """Return the specification of a caller's arguments; raise ConfigError with all misfits."""
    spec = MergeSpec(
        tuple(names),
        check_name(name),
        method,
        _weights(weights),
        read_settings(MergeOptions, options, "the merge"),
    )
    if misfits := list(_misfits(spec)):
        raise ConfigError("the merge", misfits)
    return spec


def _weights(value: Any) -> tuple[float, ...] | Literal["learn"] | None:
    if value is None:
        return None
    if value == LEARN:
        return LEARN
    try:
        return tuple(float(weight) for weight in as_list(value, "weights"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the merge", [f"weights must be numbers, or {LEARN!r} alone; not {value!r}"]
        ) from error


def _misfits(spec: MergeSpec) -> Iterator[str]:
    """Yield the misfits of a specification that show before any source is read."""
    # auto passes the density to those methods that have one
    method = "ties" if spec.method == AUTO else spec.method
    names = spec.names
    yield from setting_misfits(len(names), spec.explicit_weights, method, spec.options.density)
    if spec.weights == LEARN and method in METHODS and METHODS[method].needs_moments:
        yield f"{method} finds what is nearest by itself, so no weights are learnt for it; leave them out"
    if not names:
        yield "there are no adapters to merge; name one or more"
    if len(set(names)) < len(names):
        yield f"an adapter is named twice: {', '.join(names)}; give it more weight"
    if BACKBONE in names:
        yield f"{BACKBONE!r} is no adapter; a smaller weight leaves more of the backbone"
    if spec.name in names:
        yield f"{spec.name!r} is one of the sources; choose another name for the result"


def read_source(registry: Registry, name: str) -> Stored:
    """Load a source, and return its weights as stored on disk, since those in a slot may be rounded."""
    registry.resolve([name])
    loaded = registry.known(name)
    stored = registry.read(loaded.path if loaded else registry.pool.path(name), name)
    return replace(stored, weights=flattened(registry.pool, stored))


def tasks_by_source(
    sources: Sequence[Stored], explicit: Mapping[str, str | Path | Task], *, required: bool
) -> dict[str, list[Task]]:
    """Return the tasks that each source is measured on: the explicit one, else those of its training.

    Where a source has none, this raises UsageError if tasks are `required`, and warns otherwise.
    """
    names = [source.name for source in sources]
    if unknown := [name for name in explicit if name not in names]:
        raise UsageError(f"tasks for {', '.join(unknown)}, but the sources are {', '.join(names)}")
    tasks: dict[str, list[Task]] = {}
    for source in sources:
        if source.name in explicit:
            task = explicit[source.name]
            tasks[source.name] = [
                task if isinstance(task, Task) else load_trained_task(str(task), source.name)
            ]
            continue
        try:
            tasks[source.name] = load_trained_tasks(source.manifest, source.name)
        except UsageError:
            if required:
                raise
            tasks[source.name] = []
    without = [name for name, source_tasks in tasks.items() if not source_tasks]
    if without and required:
        raise UsageError(
            f"no task is known for {', '.join(without)}, so nothing can be chosen by it; give tasks={{...}}"
        )
    if without:
        warn(
            f"no task is known for {', '.join(without)}: what the merge keeps of it is not measured"
        )
    return tasks


def merge_sources(
    spec: MergeSpec, sources: Sequence[Stored], moments: Moments | None = None
) -> Merged:
    """Return the merge of sources by a specification; `moments` are for a method that needs them."""
    return merge(
        [source.weights for source in sources],
        spec.explicit_weights,
        method=spec.method,
        rank=spec.options.rank,
        density=spec.options.density,
        seed=spec.options.seed,
        moments=moments,
    )
