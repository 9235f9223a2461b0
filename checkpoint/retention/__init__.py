"""Retention: which checkpoints stay, and which are deleted."""
