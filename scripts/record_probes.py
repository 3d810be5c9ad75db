"""Record the probes of the shipped adapters anew, in float32; their weights stay as they are.

python scripts/record_probes.py qa generation sentiment
"""

import argparse

from adapterhub_chat import AdapterHub
from adapterhub_chat.pool.probe import make_probe


def main() -> None:
    """Replace the probe in each named adapter's manifest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapter", nargs="+", help="adapter of the pool")
    parser.add_argument("--pool", default="adapters", help="folder that keeps the adapters")
    options = parser.parse_args()
    hub = AdapterHub(pool=options.pool, dtype="bf16", device="cpu")
    for name in options.adapter:
        stored = hub.pool.load(name)
        hub.model.load(f"{name} again", stored.weights)
        probe = make_probe(hub.model, f"{name} again")
        hub.pool.describe(name, stored.manifest.model_copy(update={"probe": probe}))
        print(f"{name}: {probe}")


if __name__ == "__main__":
    main()
