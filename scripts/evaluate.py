"""Score adapters on tasks, each with its interval and beside the bare backbone.

    python scripts/evaluate.py --adapters qa sentiment --tasks sentiment --limit 100

Both are measured on the same test items.
"""

import argparse
from collections.abc import Sequence

from adapterhub_chat import AdapterHub


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", help="default: all of the pool")
    parser.add_argument("--tasks", nargs="+", help="default: what each adapter was trained on")
    parser.add_argument("--limit", type=int, default=0, help="test items a task; 0 takes all")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", default="adapters")
    options = parser.parse_args(arguments)
    hub = AdapterHub(options.backbone, options.pool)
    for s in hub.evaluate(options.adapters, options.tasks, limit=options.limit):
        print(
            f"{s.adapter} on {s.task}: {s.metric} {s.value:.3f} [{s.low:.3f}, {s.high:.3f}], "
            f"the backbone's {s.backbone_value:.3f}, {s.n} items"
        )


if __name__ == "__main__":
    main()
