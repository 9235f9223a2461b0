"""Numbers that stages return: averaged over batches and ranks, made plain, compared to the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from checkpoint import Ranks

Metrics = dict[str, Any]
Mode = Literal["min", "max"]

_NOTED = 100
"""Updates whose metrics are noted before they are added up."""


def unchanging(metrics: Mapping[str, Any]) -> Metrics:
    """Return the metrics of one batch as values that nothing done later changes.

    Tensors on the CPU become numbers, which is cheaper than any sum of tensors. Those on an
    accelerator are copied there, in double precision: nobody waits for the device.

    Raises:
        TypeError: what `run_step` returned is no dict of numbers, or of tensors with one element.
    """
    if type(metrics) is not dict and not isinstance(metrics, Mapping):
        raise TypeError(f"run_step returned {type(metrics).__name__}: return a dict of metrics")
    values: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor):
            if value.is_cpu:
                values[name] = value.item()
            else:
                values[name] = value.detach().to(torch.float64, copy=True).reshape(())
        elif type(value) is float:
            values[name] = value
        else:
            values[name] = _number(name, value)
    return values


def _read(values: list[Any]) -> list[Any]:
    if all(isinstance(value, torch.Tensor) for value in values):
        read: list[Any] = torch.stack(values).tolist()
        return read
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]


def _number(name: str, value: Any) -> Any:
    try:
        return 0 + value
    except TypeError as error:
        raise TypeError(
            f"metric {name} is of type {type(value).__qualname__}: return numbers, or "
            "tensors with one element"
        ) from error


class Averager:
    """Mean of each metric over the updates in which it occurred.

    Values on an accelerator are read all together, every hundred updates and when they are asked
    for: no step waits for the device.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        # Added up only now and then: at each update, that costs more than to note them.
        self._noted: list[Mapping[str, Any]] = []

    def update(self, values: Mapping[str, Any]) -> None:
        """Take in the metrics of one batch.

        Args:
            values: as `unchanging` returns them; nobody may change them any more.
        """
        self._noted.append(values)
        if len(self._noted) == _NOTED:
            self._add_up()

    def _add_up(self) -> None:
        noted, self._noted = self._noted, []
        by_name: dict[str, list[Any]] = {}
        for values in noted:
            for name, value in values.items():
                by_name.setdefault(name, []).append(value)
        for name, each in by_name.items():
            total = self._totals.get(name, 0)
            # One after the other: the same sum, to the last bit, wherever it is cut into parts.
            for number in _read(each):
                total += number
            self._totals[name] = total
            self._counts[name] = self._counts.get(name, 0) + len(each)

    def copy(self) -> "Averager":
        """Return one that has taken in the same, quickly."""
        other = Averager()
        other._totals, other._counts = self._totals.copy(), self._counts.copy()
        other._noted = self._noted.copy()
        return other

    def state_dict(self) -> dict[str, Any]:
        """Capture sums and counts, as plain numbers."""
        self._add_up()
        totals = {name: float(total) for name, total in self._totals.items()}
        return {"totals": totals, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._noted = []
        self._totals, self._counts = dict(state["totals"]), dict(state["counts"])

    def averages(self) -> dict[str, float]:
        """Means so far."""
        self._add_up()
        return {name: float(total) / self._counts[name] for name, total in self._totals.items()}

    def averages_over(self, ranks: Ranks) -> dict[str, float]:
        """Means over the batches of all ranks; a rank that had no batch has no say.

        Raises:
            ValueError: the ranks have different keys; the message names them.
        """
        everyone = [state for state in ranks.gather(self.state_dict()) if state["counts"]]
        for state in everyone:
            if odd := state["counts"].keys() ^ everyone[0]["counts"].keys():
                raise ValueError(
                    "the ranks return different metrics: only some of them have "
                    f"{', '.join(sorted(odd))}; return the same keys from run_step on every rank"
                )
        together = Averager()
        together.load_state_dict(summed(everyone))
        return together.averages()


def summed(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the states of averagers, by key."""
    total: dict[str, Any] = {"totals": {}, "counts": {}}
    for state in states:
        for what, values in state.items():
            for name, value in values.items():
                total[what][name] = total[what].get(name, 0) + value
    return total


def plain(stage: str, metrics: Mapping[str, Any]) -> Metrics:
    """Turn what a stage returned into what JSON and every reader of the history can hold.

    Raises:
        TypeError: a value is no number, string, None, nor a list or dict of these.
    """
    return {name: _plain(value, f"{stage}.{name}") for name, value in metrics.items()}


def numbers(metrics: Mapping[str, Any]) -> Metrics:
    """Keep what a log line can show."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"metric {name} is of type {type(value).__qualname__}: return numbers or strings"
    )


def best_score(
    history: Sequence[Mapping[str, Any]], stage: str, metric: str, mode: Mode
) -> tuple[float, int] | None:
    """Best score so far and its epoch (from 1); None when no epoch has a finite one.

    Epochs without the stage or the metric are skipped, NaN is never best, ties keep the older.
    """
    best: tuple[float, int] | None = None
    for epoch, stages in enumerate(history, start=1):
        score = stages.get(stage, {}).get(metric)
        if is_better(score, None if best is None else best[0], mode):
            best = float(score), epoch
    return best


def is_better(score: Any, best: float | None, mode: Mode) -> bool:
    """Whether a score beats the best so far; what is not a finite number never does."""
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best if mode == "min" else score > best
