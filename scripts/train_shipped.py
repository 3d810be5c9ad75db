"""Train the adapters that the repository ships: qa, generation and sentiment, jointly, in one run.

    python scripts/train_shipped.py [--pool adapters] [--steps 500]

About 40 minutes on two CPU cores. Scores are measured afterwards on the test splits and written into
each adapter's manifest and card.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from adapterhub_chat import AdapterHub
from adapterhub_chat.progress import Bars

SHARED = {
    "rank": 8,
    "alpha": 16,
    "learning_rate": 5e-4,
    "eval_every": 100,
    "eval_examples": 100,
    "patience": 0,
    "seed": 0,
    "epochs": 10,
}
ROWS = {"qa": 2, "generation": 1, "sentiment": 3}
"""Packed rows of 256 tokens in each step: what each task's share of the work is."""
TRAIN_EXAMPLES = {"qa": 0, "generation": 8000, "sentiment": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default="adapters")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--test-examples", type=int, default=600)
    options = parser.parse_args()
    hub = AdapterHub(pool=options.pool)
    with Bars(Console(stderr=True)) as bars:
        manifests = hub.train(
            list(ROWS),
            settings={
                name: {"rows_per_step": rows, "train_examples": TRAIN_EXAMPLES[name]}
                for name, rows in ROWS.items()
            },
            test_examples=options.test_examples,
            save_dtype=torch.bfloat16,
            run_dir=f"runs/shipped-{options.steps}",
            listeners=bars.listeners,
            max_steps=options.steps,
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
