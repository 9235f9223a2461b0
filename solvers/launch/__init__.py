"""Start of a run: Hydra, Dora, local jobs, the last log lines."""
