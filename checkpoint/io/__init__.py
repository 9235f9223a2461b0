"""One file of tensors: written, read, hashed, compressed. Knows nothing of checkpoints."""
