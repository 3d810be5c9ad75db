"""Train several adapters in one run, each on its own task, and measure them.

    python scripts/train_joint.py qa sentiment my-tickets.toml --pool runs/mine

A task is a name from tasks/, or the path of a .toml or .py file. Copy this file and change it.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.output import Bars


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=["qa", "generation", "sentiment"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", default="runs/joint")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    hub = AdapterHub(options.backbone, options.pool)
    with Bars(Console(stderr=True)) as bars:
        manifests = hub.train(
            options.tasks, how="joint", max_steps=options.steps, listeners=bars.listeners
        )
    for name, manifest in manifests.items():
        for s in manifest.scores:
            print(f"{name}: {s.metric} {s.value:.3f}, the backbone's {s.backbone_value:.3f}")


if __name__ == "__main__":
    main()
