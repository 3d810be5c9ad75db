"""Train adapters one after another, then measure each on every task.

    python scripts/train_sequence.py sentiment qa --pool runs/mine

The earlier ones stay as they were: a task learnt later takes nothing away.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.output import Bars


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=["sentiment", "qa"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", default="runs/sequence")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    hub = AdapterHub(options.backbone, options.pool)
    with Bars(Console(stderr=True)) as bars:
        learnt = hub.train(
            options.tasks,
            how="sequence",
            max_steps=options.steps,
            test_examples=0,
            listeners=bars.listeners,
        )
        scores = hub.evaluate(list(learnt), options.tasks, limit=100, listeners=bars.listeners)
    for s in scores:
        beside = f"the backbone's {s.backbone_value:.3f}"
        print(f"{s.adapter} on {s.task}: {s.metric} {s.value:.3f}, {beside}")


if __name__ == "__main__":
    main()
