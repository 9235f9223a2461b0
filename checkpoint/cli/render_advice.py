"""Advice on the interval as lines for a terminal: a table and the formula."""

import textwrap

from ..scheduling.cost_model import CostModel, Costs
from ..tools.advise import Advice, IntervalCosts, ModelValue
from ..units import format_bytes, format_duration, format_table

_COSTS = ("saves take", "failures lose", "together")
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
    head = ("every", "updates", "saves", "disk: all", newest, *_COSTS, "share", "")
    rows = [_row(model, line) for line in advice.lines]
    return format_table([head, *rows], range(9))


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
        *format_table(map(_value, advice.values)),
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
