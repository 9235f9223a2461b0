"""Checks of a run: finite weights, counted updates, state that no checkpoint holds."""
