"""Metrics of a stage on several ranks: averaged over them, or the same on all of them."""

import math
from collections.abc import Mapping
from typing import Any

from checkpoint.integration import Ranks

from ..metrics import Averager, Metrics, plain, unchanging

CLOSE = 1e-5
"""Relative difference up to which two ranks have the same number."""


def average_over(ranks: Ranks, metrics: Mapping[str, Any], weight: float) -> dict[str, float]:
    """Return the weighted means of what all ranks measured; each rank has to call it.

    Args:
        ranks: which measured.
        metrics: of this rank's part of the data, numbers or tensors with one element.
        weight: of that part, such as its number of samples; at 0 the part has no say.

    Raises:
        TypeError: a metric of any rank is no number.
    """
    values = ranks.run_everywhere(lambda: unchanging(metrics))
    mine = Averager()
    mine.update(values, weight)
    return mine.averages_over(ranks)


def agreed(ranks: Ranks, stage: str, metrics: Mapping[str, Any]) -> Metrics:
    """Return the metrics that all ranks have in common; each rank has to call it.

    A rank that does not have a metric has no say in it. Of text, that of the first rank counts.

    Raises:
        ValueError: a number differs between ranks; the message says how to reduce it.
        TypeError: see `plain`.
    """
    everyone = ranks.all_gather(ranks.run_everywhere(lambda: plain(stage, metrics)))
    common: Metrics = {}
    owner: dict[str, int] = {}
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if name not in common:
                common[name], owner[name] = value, rank
            elif not _is_same(common[name], value):
                first = f"{_shown(common[name])} on rank {owner[name]}"
                raise ValueError(
                    f"metric {stage}.{name} is {first} and {_shown(value)} on rank {rank}: each "
                    "rank measured its own part, and none has the number of all the data. Return "
                    "self.average_over_ranks(metrics, weight=samples) for means over samples; "
                    "combine what self.ranks.all_gather(value) gives for anything else; or return "
                    "self.ranks.broadcast(value) where that of rank 0 counts for all"
                )
    return common


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        both_nan = one != one and other != other
        return both_nan or math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)
    return True


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)[:60]
