"""The one equation: adapter weights, the bank of slots, and their products; knows no transformers model."""
