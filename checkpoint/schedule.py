"""Save now? Pure functions of where the run is."""

ROLLING = "rolling"
"""Kept until two newer ones exist (`save_last`)."""
PERIODIC = "periodic"
"""Kept beside the rolling ones (`save_every`, limited by `keep_last`)."""


def reasons_to_save(epoch: int, *, save_last: bool, save_every: int | None) -> tuple[str, ...]:
    """Say why the end of `epoch` (counted from 1) is to be saved; empty when it is not."""
    reasons = []
    if save_last:
        reasons.append(ROLLING)
    if save_every is not None and epoch % save_every == 0:
        reasons.append(PERIODIC)
    return tuple(reasons)
