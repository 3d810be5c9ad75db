"""The frozen backbone and the slots attached to it."""
