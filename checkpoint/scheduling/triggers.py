"""Decide when to save, from the position of the run and the time of its last save."""

import time
from collections.abc import Callable
from typing import Literal

from ..layout import NONFINITE, PERIODIC, ROLLING, THRESHOLD


def reasons_to_save(
    epoch: int, *, save_last: bool, save_every: int | None, crossed: bool = False
) -> tuple[str, ...]:
    """Return why the end of an epoch is saved; empty if it is not saved.

    One reason is enough.

    Args:
        epoch: number of the epoch, from 1.
        save_last: whether the end of each epoch is saved.
        save_every: number of epochs between two periodic checkpoints; None for none.
        crossed: whether a `Threshold` asks for a save.
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
    """Return whether to save in the middle of an epoch.

    Args:
        step: optimizer updates since the start of the run.
        seconds: time since the last save, or since the run began.
        every_steps: updates between two saves; None for none.
        every_minutes: minutes between two saves; None for none.
    """
    return (every_steps is not None and step % every_steps == 0) or (
        every_minutes is not None and seconds >= 60 * every_minutes
    )


class SaveClock:
    """Knows when the last save was, and whether the next one is due in the middle of an epoch.

    Args:
        every_steps: updates between two saves; None for none.
        every_minutes: minutes between two saves; None for none. It may be changed at any time.

    Raises:
        ValueError: `every_steps` is less than 1.
    """

    def __init__(self, every_steps: int | None, every_minutes: float | None) -> None:
        check_count("every_steps", every_steps)
        self._every_steps = every_steps
        self.every_minutes = every_minutes
        self._saved_at = time.monotonic()
        self._is_owed = False

    def is_due(self, step: int, is_busy: bool) -> bool:
        """Return whether to save after an update.

        Args:
            step: optimizer updates since the start of the run.
            is_busy: whether a save is in flight. A save that becomes due then stays due.
        """
        seconds = time.monotonic() - self._saved_at
        # `every_steps` is true for one update only, so this object must remember it.
        self._is_owed = self._is_owed or is_due(
            step, seconds, every_steps=self._every_steps, every_minutes=self.every_minutes
        )
        return self._is_owed and not is_busy

    def restart(self) -> None:
        """Count from now: a save was made, or it failed and the run goes on without it."""
        self._saved_at, self._is_owed = time.monotonic(), False


def with_finite(reasons: tuple[str, ...], finite: bool | Callable[[], bool]) -> tuple[str, ...]:
    """Add the reason `NONFINITE` if not all weights are finite."""
    is_finite = finite() if callable(finite) else finite
    return reasons if is_finite else (*reasons, NONFINITE)


def check_count(name: str, value: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: the message names the key of the configuration.
    """
    if value is not None and value < 1:
        raise ValueError(f"checkpoint.{name} is {value}: give at least 1, or null for none")


class Threshold:
    """Asks for a save when a metric crosses a value, once for each crossing.

    Args:
        value: the metric must be beyond this value; an equal metric is not beyond it.
        mode: whether beyond means `above` or `below`.
        patience: number of evaluations in a row that must be beyond the value.

    Attributes:
        held: number of evaluations in a row that were beyond the value. This is the whole state. A
            metric that is beyond the value from the first evaluation on has crossed it too.
    """

    def __init__(
        self, value: float, mode: Literal["above", "below"] = "below", patience: int = 1
    ) -> None:
        self.value = value
        self.mode = mode
        self.patience = patience
        self.held = 0

    def observe(self, score: object) -> bool:
        """Record a score and return whether it crosses the threshold.

        Non-numbers and NaN are ignored.
        """
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            return False
        beyond = score > self.value if self.mode == "above" else score < self.value
        self.held = self.held + 1 if beyond else 0
        return self.held == self.patience
