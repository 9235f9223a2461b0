"""Save now? Pure functions of where the run is."""

ROLLING = "rolling"
"""Kept until two newer ones exist (`save_last`)."""
PERIODIC = "periodic"
"""Kept beside the rolling ones (`save_every`, limited by `keep_last`)."""
NONFINITE = "nonfinite"
"""Its weights are not all finite: stays only while it is the newest, and counts for no rule."""


def reasons_to_save(epoch: int, *, save_last: bool, save_every: int | None) -> tuple[str, ...]:
    """Say why the end of `epoch` (counted from 1) is to be saved; empty when it is not."""
    reasons = []
    if save_last:
        reasons.append(ROLLING)
    if save_every is not None and epoch % save_every == 0:
        reasons.append(PERIODIC)
    return tuple(reasons)


def is_due(
    step: int, seconds: float, *, every_steps: int | None, every_minutes: float | None
) -> bool:
    """Say whether to save in the middle of an epoch.

    Args:
        step: optimizer updates since the start of the run.
        seconds: since the last save, or since the run began.
        every_steps: updates between two saves; None for none.
        every_minutes: minutes between two saves; None for none.
    """
    return (every_steps is not None and step % every_steps == 0) or (
        every_minutes is not None and seconds >= 60 * every_minutes
    )
