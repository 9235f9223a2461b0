"""Numbers that stages return: averaged over batches and ranks, made plain, compared to the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from checkpoint.integration import Ranks

Metrics = dict[str, Any]
Mode = Literal["min", "max"]

_NOTED = 100
"""Updates whose metrics are noted before they are added up."""

_COMPLEX = (torch.complex32, torch.complex64, torch.complex128, np.complex64, np.complex128)


def unchanging(metrics: Mapping[str, Any]) -> Metrics:
    """Return the metrics of one batch as values that nothing done later changes.

    Numbers and tensors on the CPU become floats, which are cheaper to add up than tensors. Tensors
    on an accelerator are copied there, in double precision: no step waits for the device. No value
    keeps a graph alive.

    Raises:
        TypeError: what `run_step` returned is no dict of numbers, or of tensors with one element;
            the message names the metric.
    """
    if type(metrics) is not dict and not isinstance(metrics, Mapping):
        raise TypeError(f"run_step returned {type(metrics).__name__}: return a dict of metrics")
    values: Metrics = {}
    for name, value in metrics.items():
        if type(value) is float:
            values[name] = value
        elif not isinstance(value, torch.Tensor):
            values[name] = _number(name, value)
        elif value.is_cpu:
            try:
                number = value.item()
                values[name] = number if type(number) is float else float(number)
            except (RuntimeError, TypeError) as error:
                raise _no_number(name, value) from error
        elif value.numel() != 1 or value.is_complex():
            raise _no_number(name, value)
        else:
            values[name] = value.detach().to(torch.float64, copy=True).reshape(())
    return values


def _read(values: list[Any]) -> list[Any]:
    if all(isinstance(value, torch.Tensor) for value in values):
        read: list[Any] = torch.stack(values).tolist()
        return read
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]


def _number(name: str, value: Any) -> float:
    one = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    # Text can be turned into a float, and has no such method; complex numbers have neither.
    if not hasattr(one, "__float__"):
        raise _no_number(name, value)
    try:
        return float(one)
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_number(name, value) from error


def _no_number(name: str, value: Any) -> TypeError:
    """Say which metric of a batch cannot be averaged, and what to return in its place."""
    what, instead = f"of type {type(value).__qualname__}", "a number, or a tensor with one element"
    if value is None:
        what, instead = "None", "a number, or leave the metric out for a batch that has none"
    elif isinstance(value, str | bytes):
        what, instead = "text", "a number; text may come from valid, evaluate or generate"
    elif isinstance(value, complex) or getattr(value, "dtype", None) in _COMPLEX:
        what, instead = "complex", "its absolute value, or its two parts as two metrics"
    elif isinstance(value, int):
        what = "an integer too large for a float"
    elif isinstance(value, list | tuple) or hasattr(value, "shape"):
        shape = [len(value)] if isinstance(value, list | tuple) else list(value.shape)
        what, instead = f"of shape {shape}", "one number, such as its mean, or several metrics"
    return TypeError(f"metric {name} is {what}: return {instead}")


class Averager:
    """Weighted mean of each metric over the batches in which it occurred.

    Values on an accelerator are read all together, every hundred batches and when they are asked
    for: no step waits for the device.
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        # Added up only now and then: at each update, that costs more than to note them.
        self._noted: list[tuple[float, Mapping[str, Any]]] = []

    def update(self, values: Mapping[str, Any], weight: float = 1) -> None:
        """Take in the metrics of one batch.

        Args:
            values: as `unchanging` returns them; they must not change any more.
            weight: of the batch in the means, such as its number of samples; at 0 it has no say.
        """
        self.note((weight, values))

    def note(self, batch: tuple[float, Mapping[str, Any]]) -> None:
        """Take in a batch, as its weight and its metrics; see `update`."""
        self._noted.append(batch)
        if len(self._noted) == _NOTED:
            self._add_up()

    def _add_up(self) -> None:
        noted, self._noted = self._noted, []
        by_name: dict[str, tuple[list[float], list[Any]]] = {}
        for weight, values in noted:
            # NaN, as a mean over no samples is, stays NaN when it is multiplied by zero.
            for name, value in values.items() if weight else ():
                weights, each = by_name.setdefault(name, ([], []))
                weights.append(weight)
                each.append(value)
        for name, (weights, each) in by_name.items():
            total, sum_ = self._totals.get(name, 0.0), self._weights.get(name, 0)
            # One after the other: the same sum, to the last bit, wherever it is cut into parts.
            for weight, number in zip(weights, _read(each), strict=True):
                total += weight * number
                sum_ += weight
            self._totals[name], self._weights[name] = total, sum_

    def copy(self) -> "Averager":
        """Return one that has taken in the same, quickly."""
        other = Averager()
        other._totals, other._weights = self._totals.copy(), self._weights.copy()
        other._noted = self._noted.copy()
        return other

    def state_dict(self) -> dict[str, Any]:
        """Capture the weighted sums, and the sums of the weights, as plain numbers."""
        self._add_up()
        return {"totals": dict(self._totals), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any], batch_weight: float = 1) -> None:
        """Go on from there.

        Args:
            state: as `state_dict` gives it, or of a version that counted each batch as 1.
            batch_weight: what a batch of that version weighs now.
        """
        self._noted = []
        # Of ranks that have nothing to take up, it is empty.
        self._totals, self._weights = dict(state.get("totals", {})), dict(state.get("weights", {}))
        for name, count in state.get("counts", {}).items():
            self._totals[name] *= batch_weight
            self._weights[name] = batch_weight * count

    def averages(self) -> dict[str, float]:
        """Means so far."""
        self._add_up()
        return {name: total / self._weights[name] for name, total in self._totals.items()}

    def averages_over(self, ranks: Ranks) -> dict[str, float]:
        """Means over the batches of all ranks in which a metric occurred, on any of them."""
        together = Averager()
        together.load_state_dict(summed(ranks.all_gather(self.state_dict())))
        return together.averages()


def summed(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the states of averagers, by key."""
    total: dict[str, Any] = {}
    for state in states:
        for what, values in state.items():
            sums = total.setdefault(what, {})
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value
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
