"""What saving every so many updates costs, and what not saving would. Pure."""

import math
from dataclasses import dataclass

from .young_daly import young


@dataclass(frozen=True)
class Costs:
    """The costs of one interval, over the whole run. Times are in seconds, disk use in bytes.

    Attributes:
        updates: between two saves.
        interval: time that these take.
        saves: how many there are.
        disk_all: disk use if all checkpoints stay.
        disk_kept: disk use at its peak if only the rolling ones stay, with one in the making.
        overhead: time that saves take.
        loss: time that failures are expected to lose.
    """

    updates: float
    interval: float
    saves: float
    disk_all: float
    disk_kept: float
    overhead: float
    loss: float

    @property
    def total(self) -> float:
        """What saves take and failures lose, together."""
        return self.overhead + self.loss


@dataclass(frozen=True)
class CostModel:
    """The usual model of the costs of a save every N updates.

        disk use       = (total_updates / N) * size, or with the rolling ones alone, at most
                         (rolling + 1) * size
        time overhead  = (total_updates / N) * save_seconds
        expected loss  = failures * ((N / 2) * update_seconds + restart_seconds)
        E[total](N)    = total_updates * update_seconds + time overhead + expected loss

    `failures = total_updates * update_seconds / mtbf` is how many are expected. As long as that is
    well below 1 it is the probability that the run fails, `1 - exp(-failures)`.

    The optimum is where the derivative by N, `failures / 2 * update_seconds - total_updates *
    save_seconds / N^2`, is 0:

        N* = sqrt(2 * total_updates * save_seconds / (failures * update_seconds))
           = sqrt(2 * save_seconds * mtbf) / update_seconds

    which is Young's interval in updates: it does not depend on the length of the run, nor on what a
    restart takes. At N* time overhead and lost updates cost the same.

    Args:
        total_updates: optimizer updates of the run.
        update_seconds: time of one.
        save_seconds: time that training stands still for a save.
        size: bytes of a checkpoint.
        mtbf: mean time between failures, in seconds.
        restart_seconds: time from a failure to the first update that is new.
        rolling: how many of the newest checkpoints stay.

    Raises:
        ValueError: a value is not positive; the message names it. Times of saves and restarts, and
            the size, may be 0.
    """

    total_updates: int
    update_seconds: float
    save_seconds: float
    size: float
    mtbf: float
    restart_seconds: float = 0.0
    rolling: int = 2

    def __post_init__(self) -> None:
        for name in ("total_updates", "update_seconds", "mtbf"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be above 0")
        for name in ("save_seconds", "size", "restart_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least 0")

    @property
    def training_seconds(self) -> float:
        """Time of all updates, without saves and failures."""
        return self.total_updates * self.update_seconds

    @property
    def failures(self) -> float:
        """Failures that are expected in that time."""
        return self.training_seconds / self.mtbf

    @property
    def probability(self) -> float:
        """Probability of any failure in that time."""
        return -math.expm1(-self.failures)

    @property
    def optimum(self) -> float:
        """Updates between two saves at which the total is least; from 1 to all of them."""
        best = young(self.save_seconds, self.mtbf) / self.update_seconds
        return min(max(best, 1.0), float(self.total_updates))

    def at(self, updates: float) -> Costs:
        """Return the costs of a save every so many updates."""
        saves = self.total_updates / updates
        return Costs(
            updates=updates,
            interval=updates * self.update_seconds,
            saves=saves,
            disk_all=saves * self.size,
            disk_kept=min(saves, self.rolling + 1) * self.size,
            overhead=saves * self.save_seconds,
            loss=self.failures * (updates / 2 * self.update_seconds + self.restart_seconds),
        )
