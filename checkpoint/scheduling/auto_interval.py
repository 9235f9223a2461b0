"""Chooses the interval of `checkpoint.interval=auto` from the record of a run. Pure."""

from dataclasses import dataclass

from ..run_folder.run_stats import RunStats
from ..units import format_duration
from .young_daly import PRIOR, daly, estimated_mtbf, shortest

_NEVER = 1e15
"""Seconds between failures that are as good as none."""


@dataclass(frozen=True)
class IntervalDecision:
    """How long to train between two saves, and why.

    Attributes:
        seconds: the interval, from the end of a save to the beginning of the next.
        loss: what a failure is expected to cost, in seconds: half an interval, what is not durable
            yet, and the restart.
        why: both, and where they come from, in one line.
    """

    seconds: float
    loss: float
    why: str


def choose_interval(
    record: RunStats, mtbf: float | None, max_overhead: float
) -> IntervalDecision | None:
    """Choose the interval; None as long as no save was measured.

    It is Daly's optimum for the time that training stands still, or longer where saves would take
    more than `max_overhead`, or begin before the one before is durable.

    Args:
        record: of the run.
        mtbf: mean time between failures in seconds; None to estimate it from the record.
        max_overhead: greatest share of the time, in (0, 1], that saves may take.
    """
    if not record.saves:
        return None
    between = min(mtbf or estimated_mtbf(record.running, record.failures), _NEVER)
    best = daly(record.stall, between)
    least = shortest(record.stall, record.seconds, max_overhead)
    seconds = max(best, least)
    pending = max(record.seconds - record.stall, 0.0)
    loss = seconds / 2 + pending + record.restart_seconds
    why = (
        f"Saving every {format_duration(seconds)}: a save costs {format_duration(record.stall)}, "
        f"failures come every {format_duration(between)} ({_source(record, mtbf)}), "
        f"expected loss {format_duration(loss)} each; "
        f"{_bound(best, seconds, pending, max_overhead)}"
    )
    return IntervalDecision(seconds, loss, why)


def _source(record: RunStats, mtbf: float | None) -> str:
    if mtbf:
        return "checkpoint.mtbf_hours"
    failures = record.failures or "none"
    return (
        f"{failures} in {format_duration(record.running)} of this run, "
        f"and one in {format_duration(PRIOR)} assumed"
    )


def _bound(best: float, seconds: float, pending: float, max_overhead: float) -> str:
    if seconds == best:
        return "Young/Daly"
    if seconds == pending:
        return (
            f"as long as a save takes in the background; Young/Daly alone: {format_duration(best)}"
        )
    return (
        f"so that saves take {100 * max_overhead:g} % of the time (checkpoint.max_overhead); "
        f"Young/Daly alone: {format_duration(best)}"
    )
