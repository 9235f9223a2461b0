"""From a checkpoint to a state in memory."""
