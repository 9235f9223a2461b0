"""How long to train between two saves: pure functions of what a save costs and how often runs fail.

All times are in seconds. An interval is the time that is trained between two saves, without the
time that these take.
"""

import math

PRIOR = 24 * 3600.0
"""Seconds in which one failure is assumed before a run has a record of its own."""


def young(cost: float, mtbf: float) -> float:
    """Return the interval that loses least, to first order: `sqrt(2 cost mtbf)`.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
    the ACM 17(9), 1974, 530-531. Good as long as the interval is short beside `mtbf`.

    Args:
        cost: time that training stands still for a save.
        mtbf: mean time between two failures.
    """
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Return the interval that loses least, to higher order.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22(3), 2006, 303-312, equation 37. With x = cost / (2 mtbf):

        sqrt(2 cost mtbf) (1 + sqrt(x) / 3 + x / 9) - cost    for cost < 2 mtbf,
        mtbf                                                  else.

    It approximates the minimum over the interval t of the expected time of a run whose failures
    come at random, `mtbf exp(restart / mtbf) (exp((t + cost) / mtbf) - 1) / t` for each second of
    training; the time of a restart has no part in where that is.

    Args:
        cost: time that training stands still for a save.
        mtbf: mean time between two failures.
    """
    if cost >= 2 * mtbf:
        return mtbf
    x = cost / (2 * mtbf)
    return young(cost, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def estimated_mtbf(running: float, failures: int, prior: float = PRIOR) -> float:
    """Estimate the mean time between two failures: `(running + prior) / (failures + 1)`.

    The inverse is the mean of the rate of failures given the record, when before it the rate has an
    exponential distribution with mean `1 / prior` (gamma-Poisson conjugates). A run without a
    record has `prior`; with time, the record alone counts.

    Args:
        running: time that the run has trained, in all its starts.
        failures: how often it failed in that time.
        prior: time in which one failure is assumed in addition.
    """
    return (running + prior) / (failures + 1)


def shortest(stall: float, total: float, max_overhead: float) -> float:
    """Return the interval below which saves take too much, or come before the last one is done.

    Args:
        stall: time that training stands still for a save.
        total: time until a save is durable, of which the rest goes on beside the training.
        max_overhead: greatest share of the time, in (0, 1], that training may stand still.
    """
    return max(stall / max_overhead - stall, total - stall)
