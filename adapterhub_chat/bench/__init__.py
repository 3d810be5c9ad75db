"""Measurements beside peers: the same work, in one run, as ratios."""
