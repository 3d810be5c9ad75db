"""Draw the table of packages and modules in docs/architecture.md from their docstrings.

python docs/draw_architecture.py          # writes the page; a test checks that it is up to date
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE = ROOT / "adapterhub_chat", ROOT / "docs" / "architecture.md"
FLOORS: tuple[str, ...] = (
    "errors types events files validation config",
    "assets",
    "data lora",
    "artifact model",
    "inference",
    "pool",
    "route remote",
    "evaluation",
    "training merge export",
    "transfer",
    "report",
    "api",
    "serve bench",
    "cli",
)
"""Packages, and the modules beside them, from the ground up. A module imports from its own package and from
lower floors; packages of one floor stay apart, but the modules on the ground floor know one another."""
BEGIN, END = "<!-- drawn by docs/draw_architecture.py -->\n", "<!-- end -->\n"


def sentence(path: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def lines() -> Iterator[str]:
    """Yield the table, the top floor first."""
    for number, names in reversed([*enumerate(FLOORS)]):
        yield f"**Floor {number}**\n"
        for name in names.split():
            if (module := PACKAGE / f"{name}.py").exists():
                yield f"- `{name}.py`: {sentence(module)}"
            elif (package := PACKAGE / name).is_dir():
                yield f"- `{name}/`: {sentence(package / '__init__.py')}"
                modules = sorted(p for p in package.glob("*.py") if p.stem != "__init__")
                yield from (f"    - `{path.name}`: {sentence(path)}" for path in modules)
        yield ""


def drawn(page: str) -> str:
    """Return the page with its table drawn anew."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + "\n".join(lines()) + END + rest.partition(END)[2]


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(drawn(PAGE.read_text("utf-8")), "utf-8")
