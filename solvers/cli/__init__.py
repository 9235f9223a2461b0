"""Console command `standard-solver`."""
