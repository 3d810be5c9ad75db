"""Benchmarks against peers: the same work in one run, reported as ratios."""
