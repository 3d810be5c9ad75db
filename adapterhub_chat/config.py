"""All settings as pydantic models: TOML files, command-line flags and saved JSON derive from their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapterhub_chat.errors import ConfigError
from adapterhub_chat.validation import read_settings


class TrainConfig(BaseModel):
    """Settings of the training of one adapter."""

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
        description="End within so many minutes, the schedule with them; 0 sets no limit.",
    )
    rows_per_step: int = Field(2, ge=1, description="Packed rows of each adapter in one step.")
    row_length: int = Field(
        256, ge=16, description="Tokens of a packed row, and of the longest example."
    )
    eval_every: int = Field(0, ge=0, description="Steps between validations; 0 makes eight.")
    eval_examples: int = Field(200, ge=0, description="Validation examples of each validation.")
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
    """Settings of a training run: how its adapters are combined, measured and checkpointed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    how: Literal["joint", "sequence", "shared"] = Field(
        "joint",
        description="joint: all in every batch; sequence: one after another; "
        "shared: joint, with one more adapter that acts on and learns from all rows.",
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
        False,
        description="Recompute activations inside the blocks: less memory, a third more work.",
    )


class MergeOptions(BaseModel):
    """Settings of a merge of several adapters into one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int | None = Field(
        None, description="Rank of the result; none: the method's own, mostly the largest source's."
    )
    density: float | None = Field(
        None,
        description="Share of numbers kept, by methods that drop some; none: the method's own.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of random dropping, and of the search for weights."
    )
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


class EngineOptions(BaseModel):
    """Limits of decoding and of loaded adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(32, ge=1, description="Maximum number of requests decoded together.")
    queue: int = Field(4096, ge=1, description="Maximum number of waiting requests.")
    chunk: int = Field(512, ge=1, description="Maximum prompt tokens of one step.")
    cache_bytes: int = Field(
        2 * 2**30, ge=0, description="Maximum bytes of the KV cache; one request may always run."
    )
    prefix_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Bytes of finished requests' keys and values kept as a prefix cache.",
    )
    adapter_bytes: int | None = Field(
        None, ge=0, description="Maximum bytes of loaded adapters; default: no limit."
    )
    ram_bytes: int | None = Field(
        None,
        ge=0,
        description="Bytes of read adapters kept in the host's memory; default: 1 GiB with a GPU, else 0.",
    )
    graphs: bool = Field(
        False,
        description="Record decoding steps once (CUDA graphs; torch.compile on a CPU) and replay them.",
    )


def engine_options(engine: EngineOptions | None, options: Mapping[str, Any]) -> EngineOptions:
    """Return `engine`, else EngineOptions from keywords; raise ConfigError for both."""
    if engine is None:
        return read_settings(EngineOptions, options, "AdapterHub")
    if options:
        raise ConfigError("AdapterHub", [f"give engine=... or {', '.join(options)}, not both"])
    return engine


class RunConfig(RunOptions):
    """The TOML file of `train --config`: the adapters of a run, their tasks and settings.

    `settings` holds TrainConfig fields for all adapters. Each table of `adapters` names a `task` (or `tasks`,
    which are mixed) and may override TrainConfig fields; its table `sweep` lists values of fields, and the
    combination with the best validation loss is kept.
    """

    backbone: str = Field("smollm2-135m", description="Packaged name, folder, .gguf or Hub id.")
    pool: str = Field("adapters", description="Folder that keeps the adapters.")
    quantize: Literal["nf4", "int8"] | None = Field(None, description="Precision of the backbone.")
    dtype: str | None = Field(None, description="Default: the fastest that the hardware has.")
    device: str | None = Field(None, description="Default: CUDA when there is one.")
    settings: dict[str, Any] = Field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = Field(default_factory=dict)
