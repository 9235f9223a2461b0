"""Format of a checkpoint on disk: manifest, tensors, values, digests."""
