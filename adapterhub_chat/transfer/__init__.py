"""Adapters for a target out of a source: reweight the source, stack, warm start; and the gate that judges."""
