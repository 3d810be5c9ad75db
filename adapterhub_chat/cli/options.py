"""Command-line options that several verbs share, and the flags that are made of TrainConfig's fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import adapterhub_chat
from adapterhub_chat.cli.output import Notes
from adapterhub_chat.config import RunOptions, TrainConfig

if TYPE_CHECKING:
    from adapterhub_chat.api import AdapterHub

BackboneOption = Annotated[
    str, typer.Option(help="Packaged name, local folder, .gguf file or Hub id.")
]
PoolOption = Annotated[Path, typer.Option(help="Folder that keeps the adapters.")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="Keep the backbone in nf4 or int8 (bitsandbytes).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32; default: the fastest here.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA when there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
LimitOption = Annotated[int, typer.Option(min=0, help="Test items per task; 0 takes all.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of RunOptions and TrainConfig.

    Those that were set arrive as `run_options` and `settings`.
    """
    panels: dict[str, type[BaseModel]] = {
        "run_options": RunOptions,
        "settings": TrainConfig,
    }
    options = {
        name: _option(name, field, "Training settings" if to == "settings" else "The run")
        for to, model in panels.items()
        for name, field in model.model_fields.items()
    }

    def run(**given: Any) -> None:
        chosen = {
            to: {n: v for n in model.model_fields if (v := given.pop(n)) is not None}
            for to, model in panels.items()
        }
        command(**given, **chosen)

    return with_signature(run, command, {"run_options": [*options.values()], "settings": []})


def with_signature(
    run: Callable[..., None],
    command: Callable[..., None],
    instead: Mapping[str, Sequence[inspect.Parameter]],
) -> Callable[..., None]:
    """Make `run` look like a command, to typer, with options instead of some of its parameters."""
    own = inspect.signature(command, eval_str=True).parameters
    shown = [p for name, one in own.items() for p in instead.get(name, [one])]
    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _option(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    kind = field.annotation if field.annotation in (int, float, bool, str) else str
    shown = typer.Option(
        help=field.description, rich_help_panel=panel, show_default=str(field.default)
    )
    annotation = Annotated[kind | None, shown]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


@dataclass(frozen=True)
class HubOptions:
    """On which backbone, kept in what, and in which pool."""

    backbone: BackboneOption = "smollm2-135m"
    pool: PoolOption = Path("adapters")
    quantize: QuantizeOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None

    def open(self, say: Notes) -> AdapterHub:
        """Return a hub, after `say` has heard what the backbone is kept in."""
        given: Any = {"quantize": self.quantize, "dtype": self.dtype, "device": self.device}
        hub = adapterhub_chat.AdapterHub(self.backbone, self.pool, **given)
        shown = precision(hub)
        kind = shown["quantize"] or shown["dtype"]
        size = hub.backbone.nbytes / 2**20
        where = f"{kind} on {shown['device']}, {size:.0f} MiB"
        if hub.backbone.dtype_reason and not self.quantize:
            where += f"; {kind}: {hub.backbone.dtype_reason}"
        say(f"{self.backbone} in {where} (change with --dtype, --quantize, --device)")
        return hub


DEFAULT_HUB = HubOptions()


def with_backbone(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of Where; they arrive as one, `where`."""
    fields = inspect.signature(HubOptions, eval_str=True).parameters.values()
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fields]

    def run(**given: Any) -> None:
        where = HubOptions(**{option.name: given.pop(option.name) for option in options})
        command(**given, where=where)

    return with_signature(run, command, {"where": options})


def precision(hub: AdapterHub) -> dict[str, Any]:
    """Return the backbone's name and what it computes in."""
    backbone = hub.backbone
    return {
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "quantize": backbone.quantize,
    }
