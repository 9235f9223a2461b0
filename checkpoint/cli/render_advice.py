"""Advice on the interval -> lines for a terminal: a table, the formula, and a plot."""

import math
import textwrap
from collections.abc import Sequence

from ..scheduling.cost_model import CostModel, Costs
from ..tools.advise import Advice, IntervalCosts, ModelValue
from ..units import format_bytes, format_duration
from . import text

_WIDTH, _HEIGHT = 64, 14
_CURVES = (("s", "saves take"), ("f", "failures lose"), ("*", "together"))
SPAN = 60.0
"""How much shorter and longer than the optimum intervals are drawn."""


def advised(advice: Advice) -> list[str]:
    """Write the whole of it."""
    return [
        advice.path,
        "",
        *_table(advice),
        "",
        *_formula(advice),
        "",
        *_plot(advice.model, advice.lines),
        "",
        *textwrap.wrap(f"With checkpoint.interval=auto: {advice.auto}", 100),
    ]


def drawn(model: CostModel) -> tuple[float, float]:
    """Say from how many updates to how many the curves are drawn."""
    least = max(model.optimum / SPAN, 1.0)
    most = min(model.optimum * SPAN, float(model.total_updates))
    return (least, most) if least < most else (least, 2 * least)


def shares(model: CostModel, costs: Costs) -> tuple[float, float, float]:
    """Give what saves take, failures lose, and both, in percent of the time of training."""
    whole = model.training_seconds / 100
    return costs.overhead / whole, costs.loss / whole, costs.total / whole


def _table(advice: Advice) -> list[str]:
    model = advice.model
    newest = f"newest {model.rolling}"
    costs = (name for _, name in _CURVES)
    head = ("every", "updates", "saves", "disk: all", newest, *costs, "share", "")
    rows = [_row(model, line) for line in advice.lines]
    return text.format_table([head, *rows], range(9))


def _row(model: CostModel, line: IntervalCosts) -> tuple[str, ...]:
    costs = line.costs
    return (
        format_duration(costs.interval),
        f"{costs.updates:,.0f}",
        f"{costs.saves:,.0f}",
        format_bytes(round(costs.disk_all)),
        format_bytes(round(costs.disk_kept)),
        *map(format_duration, (costs.overhead, costs.loss, costs.total)),
        _percent(shares(model, costs)[2]),
        f"<- {line.what}" if line.what else "",
    )


def _percent(value: float) -> str:
    return f"{value:.2g} %" if value < 9.95 else f"{value:,.0f} %"


_SYMBOLS = {
    "total_updates": ("T", "updates"),
    "update_seconds": ("t", "an update"),
    "restart_seconds": ("r", "a restart"),
    "save_seconds": ("s", "a save"),
    "size": ("", "a checkpoint"),
    "mtbf": ("M", "between failures"),
}


def _formula(advice: Advice) -> list[str]:
    model = advice.model
    best = f"{model.optimum:,.0f} updates = {format_duration(model.optimum * model.update_seconds)}"
    return [
        "E[total](N) = T t + (T / N) s + F (N / 2 t + r), with a save every N updates",
        *text.format_table(map(_value, advice.values)),
        f"  F = T t / M = {model.failures:.3g} failures expected; any at all with probability "
        f"{model.probability:.2g}",
        f"  N* = sqrt(2 s M) / t = {best}",
    ]


def _value(one: ModelValue) -> tuple[str, str, str]:
    symbol, unit = _SYMBOLS[one.name]
    if one.name == "total_updates":
        shown = f"{one.value:,.0f}"
    else:
        shown = format_bytes(round(one.value)) if one.name == "size" else format_duration(one.value)
    return f"  {symbol} =" if symbol else "", f"{shown} {unit}", f"({one.source})"


def _plot(model: CostModel, lines: Sequence[IntervalCosts]) -> list[str]:
    least, most = drawn(model)
    columns = [least * (most / least) ** (i / (_WIDTH - 1)) for i in range(_WIDTH)]
    curves = [shares(model, model.at(updates)) for updates in columns]
    positive = [value for three in curves for value in three if value > 0]
    low, high = math.log(min(positive)), math.log(max(positive) * 1.001)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for column, three in enumerate(curves):
        for (mark, _), value in zip(_CURVES, three, strict=True):
            if value > 0:
                grid[int((math.log(value) - low) / (high - low) * _HEIGHT)][column] = mark
    return _framed(model, lines, grid, (low, high))


def _framed(
    model: CostModel,
    lines: Sequence[IntervalCosts],
    grid: list[list[str]],
    span: tuple[float, float],
) -> list[str]:
    low, high = span
    levels = [math.exp(low + (high - low) * (row + 0.5) / _HEIGHT) for row in range(_HEIGHT)]
    labels = [_percent(level) if row % 3 == 1 else "" for row, level in enumerate(levels)]
    rows = [f"{labels[row]:>9} |{''.join(grid[row])}" for row in reversed(range(_HEIGHT))]
    legend = ", ".join(f"{mark} {name}" for mark, name in _CURVES)
    return [
        "percent of the time of training, by the time between two saves (both logarithmic):",
        f"{'':>11}{legend}",
        *(row.rstrip() for row in rows),
        f"{'':>9} +{_axis(model, lines)}",
        f"{'':>11}{_ticks(model)}".rstrip(),
    ]


def _axis(model: CostModel, lines: Sequence[IntervalCosts]) -> str:
    axis = ["-"] * _WIDTH
    for line in lines:
        column = _column(model, line.costs.updates)
        if line.what and 0 <= column < _WIDTH:
            axis[column] = "O" if "optimum" in line.what else "P"
    return "".join(axis) + "  O optimum" + ("  P present" if "P" in axis else "")


def _column(model: CostModel, updates: float) -> int:
    least, most = drawn(model)
    return round(math.log(updates / least) / math.log(most / least) * (_WIDTH - 1))


def _ticks(model: CostModel) -> str:
    least, most = drawn(model)
    ticks = ""
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        updates = least * (most / least) ** share
        ticks = ticks.ljust(_column(model, updates)) + format_duration(
            updates * model.update_seconds
        )
    return ticks
