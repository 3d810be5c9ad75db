"""The folder of adapters, and its loaded part."""
