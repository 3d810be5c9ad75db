"""Make the matrix: `python -m tests.families.run [--only NAME,...] [--json] [--markdown FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

KINDS = ("right", "refused", "wrong", "raw", "-")
"""How a cell may begin; a dash is a check that the kind of model has no use for."""
Row = dict[str, Any]


def kind_of(cell: str) -> str:
    """Return which of KINDS a cell is."""
    return cell.partition(":")[0]


def make_row(name: str, columns: Sequence[str] = ()) -> Row:
    """Check one family; return its name, cells and seconds."""
    from tests.families import checks, models

    _quiet()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        cells, each = checks.row(models.FAMILIES[name], Path(work), columns)
    rounded = {column: round(seconds, 2) for column, seconds in each.items()}
    seconds = round(time.monotonic() - start, 2)
    return {"family": name, "cells": cells, "seconds": seconds, "each": rounded}


def _quiet() -> None:
    """Silence what transformers and bitsandbytes tell of loading; make few threads, for many processes."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def make_rows(names: Sequence[str], columns: Sequence[str] = (), jobs: int = 2) -> Iterator[Row]:
    """Yield the families' rows as they come, from `jobs` processes."""
    if jobs == 1:
        yield from (make_row(name, columns) for name in names)
        return
    context = get_context("spawn")
    left = dict.fromkeys(names)
    try:
        with ProcessPoolExecutor(jobs, mp_context=context) as executor:
            waiting = [executor.submit(make_row, name, columns) for name in names]
            for done in as_completed(waiting):
                row = done.result()
                del left[row["family"]]
                yield row
    except BrokenExecutor:  # one of them killed its process: each of the rest has one of its own
        for name in left:
            yield _alone(name, columns)


def _alone(name: str, columns: Sequence[str]) -> Row:
    """Return a family's row, made in a process of its own, which it may kill."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            return executor.submit(make_row, name, columns).result()
    except BrokenExecutor:
        from tests.families.checks import COLUMNS

        cells = dict.fromkeys(columns or COLUMNS, "raw: the process died")
        return {"family": name, "cells": cells, "seconds": 0.0, "each": {}}


def count(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Return how many cells of each kind every column has."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for column, cell in row["cells"].items():
            found.setdefault(column, Counter())[kind_of(cell)] += 1
    return {column: {k: own[k] for k in KINDS if own[k]} for column, own in found.items()}


def total(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many cells of each kind there are."""
    found = Counter(kind_of(cell) for row in rows for cell in row["cells"].values())
    return {kind: found[kind] for kind in KINDS}


def line(row: Row) -> str:
    """Return a row for the terminal."""
    cells = "  ".join(f"{column} {kind_of(cell):7}" for column, cell in row["cells"].items())
    return f"{row['family']:20}{cells}  {row['seconds']:5.1f} s"


HEADING = """# Backbones

Every architecture below was built as a small random model (two to four layers, windows of 16 tokens where
it has windows) and run through this project in float32 on a CPU, on prompts of 1 to 60 tokens. A cell is
*right*, or *refused* with a sentence at the door: when the backbone or the adapter is loaded. This page is
written by

    python -m tests.families.run --markdown docs/backbones.md

- **logits**: next-token logits are those of transformers.
- **greedy**: greedy text is that of `generate`.
- **mixed**: a row of a mixed batch is the row alone, also beside a row four times as long.
- **packed**: losses and gradients of examples packed into one row are those of each example alone.
- **trained**: an adapter that was trained here gives the same logits in PEFT.
- **foreign**: an adapter that PEFT made on `all-linear` loads here and gives PEFT's logits.
- **nf4**, **int8**: the same logits as transformers with bitsandbytes, whatever else is in the batch.
- **joint**: two adapters trained jointly have the losses of each trained alone.

Layers that only attend are packed and decoded in batches, whatever their windows, soft caps, sinks and
cache shapes. Layers that carry a state (recurrences, linear attention, short convolutions) and positions by
ALiBi get one example a row in training and one row at a time in decoding: right, and slower. The fused
decoder serves Llama, Mistral and Qwen2 without windows; all others run transformers' own modules.

"""


def markdown(rows: Sequence[Row]) -> str:
    """Return the page: the matrix as a table, and below it the reason of each cell that is not right."""
    columns = list(rows[0]["cells"]) if rows else []
    lines = [
        f"| backbone | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {row['family']} | {' | '.join(kind_of(c) for c in row['cells'].values())} |"
            for row in rows
        ),
    ]
    reasons = [note for row in rows for note in notes(row)]
    return HEADING + "\n".join([*lines, "", *reasons]) + "\n"


def notes(row: Row) -> list[str]:
    """Return what is behind the cells that are not right, equal ones together."""
    columns: dict[str, list[str]] = {}
    for column, cell in row["cells"].items():
        if kind_of(cell) not in ("right", "-"):
            columns.setdefault(cell, []).append(column)
    return [f"- **{row['family']}**, {', '.join(names)}: {cell}" for cell, names in columns.items()]


def parse(arguments: Sequence[str] | None, families: Iterable[str], columns: Iterable[str]) -> Any:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m tests.families.run", description=__doc__)
    parser.add_argument("--only", default="", help="families, by comma")
    parser.add_argument("--columns", default="", help="columns, by comma")
    parser.add_argument("--json", action="store_true", help="write the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args(arguments)
    for field, known in (("only", list(families)), ("columns", list(columns))):
        chosen = [part for part in getattr(options, field).split(",") if part]
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(options, field, chosen)
    return options


def main(
    arguments: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write
) -> Mapping[str, Any]:
    """Make the matrix and print it; return what `--json` prints."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tests.families.checks import COLUMNS
    from tests.families.models import FAMILIES

    options = parse(arguments, FAMILIES, COLUMNS)
    names = options.only or [name for name, family in FAMILIES.items() if family.exists]
    start, rows = time.monotonic(), []
    for row in make_rows(names, options.columns, options.jobs):
        rows.append(row)
        if not options.json:
            write(line(row) + "\n")
    rows.sort(key=lambda row: names.index(row["family"]))
    found = {
        "rows": rows,
        "columns": count(rows),
        "total": total(rows),
        "seconds": round(time.monotonic() - start, 1),
    }
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    if options.json:
        write(json.dumps(found, indent=1) + "\n")
        return found
    for column, kinds in found["columns"].items():
        write(f"{column:10}{'  '.join(f'{number} {kind}' for kind, number in kinds.items())}\n")
    write(f"{'all':10}{'  '.join(f'{n} {k}' for k, n in found['total'].items() if k != '-')}\n")
    write(f"{found['seconds']} s\n")
    return found


if __name__ == "__main__":
    main()
