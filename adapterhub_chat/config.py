"""Every setting once: TOML files, command-line flags and saved JSON all derive from these fields."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from adapterhub_chat.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


SHOWN = 100
"""Misfits in one message."""


class TrainConfig(BaseModel):
    """How one adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(8, ge=1, le=1024, description="Rank r of the update B A.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    targets: str = Field(
        "all-linear",
        description="Layers that get an update: all-linear, or last names such as q_proj,v_proj.",
    )
    layers: str = Field(
        "all",
        description="Blocks that get an update: all, or a slice by number such as 20:30 or -8:.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm of one adapter in one step.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training examples.")
    max_steps: int = Field(0, ge=0, description="End after this many steps; 0 sets no limit.")
    max_minutes: float = Field(
        0.0,
        ge=0,
        description="End after so many minutes, the schedule with them; 0 sets no limit.",
    )
    rows_per_step: int = Field(2, ge=1, description="Packed rows of each adapter in one step.")
    row_length: int = Field(
        256, ge=16, description="Tokens of a packed row, and of the longest example."
    )
    eval_every: int = Field(0, ge=0, description="Steps between validations; 0 makes eight.")
    eval_examples: int = Field(200, ge=0, description="Validation examples looked at each time.")
    patience: int = Field(
        3, ge=0, description="Validations without improvement before it stops; 0 never stops early."
    )
    train_examples: int = Field(0, ge=0, description="Training examples used; 0 takes all.")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Of a shared adapter: tasks are drawn by size ** (1 / temperature); large is even.",
    )
    orthogonal: float = Field(
        0.0,
        ge=0,
        description="Weight of the penalty on overlap with the adapter that is grown (O-LoRA).",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the initial weights and of the order of rows."
    )


class RunOptions(BaseModel):
    """How the adapters of one run go together, and what is kept on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    how: Literal["joint", "sequence", "shared"] = Field(
        "joint",
        description="joint: all in every batch; sequence: one after another; "
        "shared: joint, with one more adapter that acts on and learns from everybody's rows.",
    )
    test_examples: int = Field(200, ge=0, description="Test items measured per task.")
    shared_name: str = Field("shared", description="Name of the shared adapter.")
    grow: bool = Field(
        False,
        description="In a sequence: one adapter that grows, instead of a new one for each task.",
    )
    grown_name: str = Field("grown", description="Name of the adapter that grows.")
    replay: float = Field(
        0.0, ge=0, lt=1, description="While growing: share of the examples that earlier tasks give."
    )
    save_steps: int = Field(0, ge=0, description="Steps between two saved states; 0: by the clock.")
    save_minutes: float = Field(
        2.0, ge=0, description="Minutes between two saved states; 0: by steps alone."
    )
    shard: bool = Field(
        False,
        description="Spread the backbone's weights over the processes (FSDP): for one too large for "
        "a device. The adapters are then saved without probe and scores; measure them with eval.",
    )
    checkpointing: bool = Field(
        False, description="Keep no activations inside the blocks: less memory, a third more work."
    )


class MergeOptions(BaseModel):
    """How several adapters become one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int | None = Field(
        None, description="Rank of the result; none: the method's own, mostly the largest source's."
    )
    density: float | None = Field(
        None,
        description="Share of numbers kept, by methods that drop some; none: the method's own.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of what is dropped, and of the search.")
    limit: int = Field(
        50, ge=0, description="Items per task to choose and measure by; 0 takes all."
    )
    floor: float = Field(
        0.5, ge=0, description="Share of its score that every source must keep with method auto."
    )
    budget: int = Field(40, ge=1, description="Sets of weights that learning them may try.")
    force: bool = Field(
        False, description="Merge an adapter all the same that a transfer was judged to have hurt."
    )


class RunConfig(RunOptions):
    """A training run: which adapters, on what, and how. The TOML of `train --config`.

    `settings` holds TrainConfig fields for all adapters. Each table of `adapters` names its `task` (or
    `tasks`, mixed) and may set TrainConfig fields of its own; in its table `sweep` a field has a list of
    values, and the combination that is best on validation is kept.
    """

    backbone: str = Field("smollm2-135m", description="Packaged name, folder, .gguf or Hub id.")
    pool: str = Field("adapters", description="Folder that keeps the adapters.")
    quantize: Literal["nf4", "int8"] | None = Field(None, description="Precision of the backbone.")
    dtype: str | None = Field(None, description="Default: the best that the hardware has.")
    device: str | None = Field(None, description="Default: CUDA when there is one.")
    settings: dict[str, Any] = Field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = Field(default_factory=dict)


def read_run(
    path: Path | None,
    tasks: Sequence[str],
    names: Sequence[str],
    flags: Mapping[str, Any],
    settings: Mapping[str, Any],
    sweep: Mapping[str, list[Any]] | None = None,
) -> RunConfig:
    """Return the run that a TOML file and the command line describe together; flags win.

    Raises one ConfigError with every misfit: unknown keys at any depth, values out of range, an adapter
    without a task, one name for two, nothing to train.
    """
    values = _toml(path) if path else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    found: list[str] = []
    titles = list(names or map(_stem, tasks))
    if len(titles) != len(tasks):
        found.append(f"{len(tasks)} tasks but {len(titles)} names: give one name per task")
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        found.append(f"two adapters are called {', '.join(twice)}: give each a name of its own")
    adapters = {
        name: {key: own[key] for key in own if key not in settings} if _is_table(own) else own
        for name, own in _table(values, "adapters", found).items()
    }
    adapters |= {n: {"task": t} for n, t in zip(titles, tasks, strict=False)}
    for own in adapters.values() if sweep else ():
        if _is_table(own):
            own["sweep"] = {**own.get("sweep", {}), **(sweep or {})}
    values["adapters"] = adapters
    values["settings"] = {**_table(values, "settings", found), **settings}
    run = None
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        found += explain(error, RunConfig)
    found += _setting_misfits("settings", values["settings"])
    for name, table in adapters.items():
        found += _adapter_misfits(f"adapters.{name}", dict(table) if _is_table(table) else {})
    if not adapters:
        found.append("nothing to train: name tasks, or write [adapters.NAME] tables")
    if found or run is None:
        raise ConfigError(str(path) if path else "the command line", found)
    return run


def _adapter_misfits(where: str, own: dict[str, Any]) -> list[str]:
    """Return what is wrong in the table of one adapter: its task or tasks, its sweep, its settings."""
    found = []
    one, several, sweep = own.pop("task", None), own.pop("tasks", None), own.pop("sweep", {})
    if several is None and not isinstance(one, str):
        found.append(f'{where} needs a task, as in task = "qa"')
    elif several is not None and (one is not None or not _is_list(several, str)):
        found.append(f'{where} needs one task, or tasks = ["a", "b"] alone')
    return [*found, *sweep_misfits(f"{where}.sweep", sweep), *_setting_misfits(where, own)]


def sweep_misfits(where: str, sweep: Any) -> list[str]:
    """Return what is wrong with lists of values to try, by setting."""
    if not _is_table(sweep) or not all(_is_list(values) for values in sweep.values()):
        return [f"{where} needs a list of values for each setting, as in rank = [4, 8]"]
    found: list[str] = []
    for key, values in sweep.items():
        if len(set(map(repr, values))) < len(values):
            found.append(f"{where}.{key}: a value is given twice in {values}")
        misfits = [m for value in values for m in _setting_misfits(where, {key: value})]
        found += dict.fromkeys(misfits)
    return found


def _is_list(value: Any, kind: type = object) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, kind) for v in value)
    )


def read_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the lists that texts such as `rank=4,8` mean; raise ConfigError naming every misfit."""
    sweep: dict[str, list[Any]] = {}
    found = []
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not values:
            found.append(f"{text!r} is no sweep; write a setting and its values: rank=4,8")
            continue
        sweep.setdefault(key, []).extend(_number(value) for value in values.split(","))
    found += sweep_misfits("--sweep", sweep)
    if found:
        raise ConfigError("the command line", found)
    return sweep


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def read_settings(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Return `values` as a `model`; raise one ConfigError that lists every misfit in `source`."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(source, explain(error, model)) from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from error


def _table(values: Mapping[str, Any], key: str, found: list[str]) -> dict[str, Any]:
    """Return the table `key`; where it is something else, say so in `found` and return an empty one."""
    value = values.get(key, {})
    if _is_table(value):
        return dict(value)
    found.append(f"{key}: must be a table; got {value!r}")
    return {}


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _stem(task: str) -> str:
    return Path(task).stem if task.endswith((".py", ".toml")) else task


def _setting_misfits(where: str, values: Mapping[str, Any]) -> list[str]:
    try:
        TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        return [f"{where}.{sentence}" for sentence in explain(error, TrainConfig)]
    return []


# ---- misfits in sentences ------------------------------------------------------------------------

_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING_KEY = {"missing", "missing_argument", "missing_keyword_only_argument"}


def explain(error: ValidationError, model: type) -> list[str]:
    """Return one sentence for each misfit of `model` (a pydantic model or dataclass), SHOWN at most."""
    details = error.errors(include_url=False)
    more = [f"and {len(details) - SHOWN} more"] if len(details) > SHOWN else []
    return [*(_sentence(detail, model) for detail in details[:SHOWN]), *more]


def _printable(part: int | str) -> str:
    """Return a key as a message may hold it, whoever wrote it."""
    text = "".join(c if c.isprintable() else "?" for c in str(part))
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(detail: ErrorDetails, model: type) -> str:
    where = ".".join(_printable(part) for part in detail["loc"])
    *path, last = detail["loc"] or ("",)
    allowed = sorted(_fields_at(model, path))
    if detail["type"] in _UNKNOWN_KEY:
        close = get_close_matches(str(last), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{where}: no such key; allowed: {', '.join(allowed)}{hint}"
    if detail["type"] in _MISSING_KEY:
        return f"{where}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    return f"{where}: {message[:1].lower()}{message[1:]}; got {given}"


def _fields_at(model: type, path: list[int | str]) -> Mapping[str, Any]:
    """Return the fields of the model at `path` inside `model`; none where there is no model."""
    fields: Mapping[str, Any] = getattr(model, "__pydantic_fields__", {})
    for part in path:
        found = fields.get(str(part))
        options = _options(found.annotation) if found else ()
        inner = (getattr(option, "__pydantic_fields__", {}) for option in options)
        fields = next((f for f in inner if f), {})
    return fields


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
