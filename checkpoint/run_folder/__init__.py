"""The folder of a run: which checkpoints lie in it, and their commit records."""
