"""Saving, restoring and interrupting a run."""
