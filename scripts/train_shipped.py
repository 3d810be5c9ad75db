"""Train the adapters that the repository ships: qa, generation and sentiment, jointly, in one run.

    python scripts/train_shipped.py [--tasks qa generation sentiment] [--steps 1200]

About 40 minutes on two CPU cores. Scores are measured afterwards on the test splits and written into
each adapter's manifest and card.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from adapterhub_chat import AdapterHub
from adapterhub_chat.cli.output import Bars

SHARED = {
    "rank": 8,
    "alpha": 16,
    "learning_rate": 5e-4,
    "row_length": 128,
    "patience": 0,
    "seed": 0,
    "epochs": 10,
}
OWN = {
    "qa": {"rows_per_step": 4, "eval_examples": 100},
    "generation": {"rows_per_step": 2, "eval_examples": 100, "train_examples": 8000},
    "sentiment": {"rows_per_step": 8, "eval_examples": 600},
}
"""Rows are packed, 128 tokens each: what a task's share of every step is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(OWN), default=list(OWN))
    parser.add_argument("--pool", default="adapters")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--test-examples", type=int, default=600)
    options = parser.parse_args()
    hub = AdapterHub(pool=options.pool)
    with Bars(Console(stderr=True)) as bars:
        manifests = hub.train(
            options.tasks,
            settings={name: OWN[name] for name in options.tasks},
            test_examples=options.test_examples,
            save_dtype=torch.bfloat16,
            run_dir=f"runs/shipped-{'-'.join(options.tasks)}-{options.steps}",
            listeners=bars.listeners,
            max_steps=options.steps,
            eval_every=max(1, options.steps // 8),
            **SHARED,
        )
    for manifest in manifests.values():
        for s in manifest.scores:
            print(
                f"{s.adapter}: {s.metric} {s.value:.3f} [{s.low:.3f}, {s.high:.3f}] "
                f"beside the backbone's {s.backbone_value:.3f} on {s.n} items"
            )


if __name__ == "__main__":
    main()
