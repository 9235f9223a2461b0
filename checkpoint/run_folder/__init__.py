"""The folder of a run: committed checkpoints, pins, statistics."""
