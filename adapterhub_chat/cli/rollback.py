"""`rollback`: restore an adapter's earlier version. Unlike `list` and `show` it imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.cli.options import JsonOption, PoolOption
from adapterhub_chat.cli.output import print_json
from adapterhub_chat.pool.pool import Pool


def rollback(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    pool: PoolOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Restore an adapter's earlier version; a second call returns to the newer one."""
    manifest = Pool(pool).rollback(adapter).manifest
    sha256, created = (manifest.sha256, manifest.created) if manifest else ("", "")
    if as_json:
        print_json({"adapter": adapter, "sha256": sha256, "created": created})
    else:
        origin = f"made {created or 'at a time unknown'}, sha256 {sha256[:12] or 'unknown'}"
        typer.echo(f"{adapter}: the other version is in its place now ({origin})")
