"""What people do with checkpoints that lie there: list, look into, verify, mend, delete."""
