"""Console command `checkpoint`."""
