"""Experiments on disk: folder, configuration, history."""
