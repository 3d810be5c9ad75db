"""Training in one loop; only `run` and `checkpoint` write files."""
