"""Reading of checkpoints."""
