"""Command-line options that several verbs share, and the flags that are made of TrainConfig's fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_chat.config import TrainConfig

BackboneOption = Annotated[
    str, typer.Option(help="Packaged name, local folder, .gguf file or Hub id.")
]
PoolOption = Annotated[Path, typer.Option(help="Folder that keeps the adapters.")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="Keep the backbone in nf4 or int8 (bitsandbytes).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32; default: the best that is native here.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA when there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
LimitOption = Annotated[int, typer.Option(min=0, help="Test items per task; 0 takes all.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per TrainConfig field; those that were set arrive as `settings`."""
    options = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _option_type(field.annotation) | None,
                typer.Option(
                    help=field.description,
                    rich_help_panel="Training settings",
                    show_default=str(field.default),
                ),
            ],
        )
        for name, field in TrainConfig.model_fields.items()
    }

    def run(**given: Any) -> None:
        settings = {n: v for n in options if (v := given.pop(n)) is not None}
        command(**given, settings=settings)

    own = inspect.signature(command, eval_str=True).parameters
    kept = [p for name, p in own.items() if name != "settings"]
    run.__signature__ = inspect.Signature([*kept, *options.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*kept, *options.values())}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _option_type(annotation: Any) -> Any:
    return annotation if annotation in (int, float, bool, str) else str
