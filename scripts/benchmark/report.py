"""Medians and spread of rounds, and the tables that are printed."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]


def middle(rounds: Sequence[Row]) -> dict[str, Any]:
    """Return the median of each figure over the rounds; what is true has to be so in all."""
    found = {}
    for key, first in rounds[0].items():
        values = [row[key] for row in rounds if row.get(key) is not None]
        if isinstance(first, bool):
            found[key] = all(values)
        elif values:
            found[key] = median(values)
    return found


def spread(rounds: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return least and greatest of each figure over the rounds."""
    found = {}
    for key, first in rounds[0].items():
        values = [row[key] for row in rounds if row.get(key) is not None]
        if values and not isinstance(first, bool):
            found[key] = (min(values), max(values))
    return found


def table(title: str, names: str, columns: str, results: Sequence[Row]) -> str:
    """Return a Markdown table with a title; each figure with its spread when there are rounds.

    Args:
        names: what the first column has.
        columns: keys of the figures, separated by commas; what no row has is left out.
        results: `name`, and `rounds`, or `error`.
    """
    lines, errors = [], []
    known = {key for one in results for row in one["rounds"] for key in row}
    shown = [key for key in map(str.strip, columns.split(",")) if key in known]
    for one in results:
        if one["rounds"]:
            lines.append([one["name"], *(_cell(one["rounds"], key) for key in shown)])
        if "error" in one:
            errors.append(f"{one['name']}: {one['error'].strip().splitlines()[-1]}")
    head = [names, *(key.replace("_s", " s") for key in shown)]
    rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *lines)]
    rows.insert(1, "|---" * len(head) + "|")
    return "\n".join([f"### {title}", "", *rows, *(["", *errors] if errors else [])]) + "\n"


def _cell(rounds: Sequence[Row], key: str) -> str:
    value = middle(rounds).get(key)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if len(rounds) == 1 or isinstance(value, int):
        return _number(value)
    least, most = spread(rounds)[key]
    return f"{_number(value)} ({_number(least)}-{_number(most)})"


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
