"""Command-line options that several verbs share, and flags made from the fields of the settings models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import adapterhub_chat
from adapterhub_chat.cli.output import Notes
from adapterhub_chat.config import EngineOptions, RunOptions, TrainConfig
from adapterhub_chat.validation import read_settings

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
        name: _option(name, field, "Training settings" if parameter == "settings" else "The run")
        for parameter, model in panels.items()
        for name, field in model.model_fields.items()
    }

    def run(**values: Any) -> None:
        chosen = {parameter: _taken(values, model) for parameter, model in panels.items()}
        command(**values, **chosen)

    return with_signature(run, command, {"run_options": [*options.values()], "settings": []})


def with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of EngineOptions; they arrive in `hub_options.engine`.

    `with_backbone` goes around it. Values out of range raise one ConfigError that lists them all.
    """
    parameter = inspect.signature(command, eval_str=True).parameters["hub_options"]
    fields = EngineOptions.model_fields.items()
    options = [_option(name, field, "Decoding and memory") for name, field in fields]

    def run(*, hub_options: HubOptions, **values: Any) -> None:
        engine = read_settings(EngineOptions, _taken(values, EngineOptions), "command line")
        command(**values, hub_options=replace(hub_options, engine=engine))

    return with_signature(run, command, {"hub_options": [parameter, *options]})


def _taken(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Remove the fields of `model` from `values`; return those that were set."""
    taken = {name: values.pop(name) for name in model.model_fields}
    return {name: value for name, value in taken.items() if value is not None}


def with_signature(
    run: Callable[..., None],
    command: Callable[..., None],
    replacements: Mapping[str, Sequence[inspect.Parameter]],
) -> Callable[..., None]:
    """Give `run` the signature that typer reads: the command's, with some of its parameters replaced."""
    signature = inspect.signature(command, eval_str=True).parameters
    parameters = [p for name, old in signature.items() for p in replacements.get(name, [old])]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _option(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    """Return an option of a field; it is None unless it is set. Choices are read as texts."""
    types = (field.annotation, *get_args(field.annotation))  # of `int | None`, int
    kind = next((each for each in types if each in (int, float, bool, str)), str)
    option = typer.Option(
        help=field.description,
        rich_help_panel=panel,
        show_default=False if field.default is None else str(field.default),
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


@dataclass(frozen=True)
class HubOptions:
    """The arguments of AdapterHub that verbs have in common."""

    backbone: BackboneOption = "smollm2-135m"
    pool: PoolOption = Path("adapters")
    quantize: QuantizeOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    engine: EngineOptions | None = None

    def open(self, notes: Notes) -> AdapterHub:
        """Return a hub; write the backbone's precision, device and size as a note."""
        arguments: Any = {"quantize": self.quantize, "dtype": self.dtype, "device": self.device}
        hub = adapterhub_chat.AdapterHub(self.backbone, self.pool, engine=self.engine, **arguments)
        shown = precision(hub)
        kind = shown["quantize"] or shown["dtype"]
        mebibytes = hub.backbone.nbytes / 2**20
        placement = f"{kind} on {shown['device']}, {mebibytes:.0f} MiB"
        if hub.backbone.dtype_reason and not self.quantize:
            placement += f"; {kind}: {hub.backbone.dtype_reason}"
        notes(f"{self.backbone} in {placement} (change with --dtype, --quantize, --device)")
        return hub


DEFAULT_HUB = HubOptions()


def with_backbone(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of HubOptions but `engine`.

    They arrive as one argument, `hub_options`, whose default holds theirs.
    """
    default = inspect.signature(command, eval_str=True).parameters["hub_options"].default
    fields = inspect.signature(HubOptions, eval_str=True).parameters.values()
    options = [p.replace(default=getattr(default, p.name)) for p in fields if p.name != "engine"]

    def run(**values: Any) -> None:
        hub_options = HubOptions(**{option.name: values.pop(option.name) for option in options})
        command(**values, hub_options=hub_options)

    return with_signature(run, command, {"hub_options": options})


def precision(hub: AdapterHub) -> dict[str, Any]:
    """Return the backbone's name, dtype, device and quantization."""
    backbone = hub.backbone
    return {
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "quantize": backbone.quantize,
    }
