"""From a state in memory to a committed checkpoint."""
