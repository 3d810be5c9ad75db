"""Measured results as pictures."""
