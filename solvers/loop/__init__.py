"""Stages and batches of an epoch."""
