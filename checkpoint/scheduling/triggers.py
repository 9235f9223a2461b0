"""Save now? Pure functions of where the run is, and of what it measured."""

from typing import Literal

ROLLING = "rolling"
"""Kept until two newer ones exist (`save_last`)."""
PERIODIC = "periodic"
"""Kept beside the rolling ones (`save_every`, limited by `keep_last`)."""
THRESHOLD = "threshold"
"""A metric crossed a value: kept for good, with all its sources."""
NONFINITE = "nonfinite"
"""Its weights are not all finite: stays only while it is the newest, and counts for no rule."""


def reasons_to_save(
    epoch: int, *, save_last: bool, save_every: int | None, crossed: bool = False
) -> tuple[str, ...]:
    """Say why the end of `epoch` (counted from 1) is to be saved; empty when it is not.

    Any of the rules is enough. `crossed` says that `Threshold` asks for it.
    """
    reasons = []
    if save_last:
        reasons.append(ROLLING)
    if save_every is not None and epoch % save_every == 0:
        reasons.append(PERIODIC)
    if crossed:
        reasons.append(THRESHOLD)
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


class Threshold:
    """Asks for a save when a metric crosses a value, once for each crossing.

    Args:
        value: what the metric has to be beyond; just there is not beyond.
        mode: whether beyond is `above` or `below`.
        patience: how many evaluations in a row have to be beyond before it counts.

    Attributes:
        held: evaluations in a row that were beyond, all the state there is. A metric that is beyond
            from the first evaluation on has crossed the value too.
    """

    def __init__(
        self, value: float, mode: Literal["above", "below"] = "below", patience: int = 1
    ) -> None:
        self.value = value
        self.mode = mode
        self.patience = patience
        self.held = 0

    def observe(self, score: object) -> bool:
        """Take in an evaluation; return whether to save. What is no number, or NaN, is none."""
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            return False
        beyond = score > self.value if self.mode == "above" else score < self.value
        self.held = self.held + 1 if beyond else 0
        return self.held == self.patience
