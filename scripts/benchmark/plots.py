"""How the cost grows, as lines on scales of powers of ten; a dotted line grows in proportion."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

_COLUMNS = 3


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every measure of growth into one file, a panel each."""
    grown = [one for one in results if one["measure"].startswith("growth")]
    columns = min(max(len(grown), 1), _COLUMNS)
    rows = max(math.ceil(len(grown) / columns), 1)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False)
    for panel in panels.flat[len(grown) :]:
        panel.set_axis_off()
    for panel, measure in zip(panels.flat, grown, strict=False):
        _draw(panel, measure)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def exponent(counts: Sequence[int], times: Sequence[float]) -> float:
    """Say how the time grows at the upper end: with n to the power of this, over a factor of 100.

    NaN where there is one count.
    """
    chosen = [(n, t) for n, t in zip(counts, times, strict=True) if n * 100 >= max(counts)]
    if len(chosen) < 2:
        chosen = list(zip(counts, times, strict=True))[-2:]
    if len(chosen) < 2:
        return math.nan
    slope, _ = np.polyfit(*np.log(chosen).T, 1)
    return float(slope)


def _draw(panel: Any, measure: dict[str, Any]) -> None:
    rows = [(int(r["name"].replace(",", "")), r["median"]) for r in measure["rows"] if r["rounds"]]
    counts = [count for count, _ in rows]
    panel.set(xscale="log", yscale="log", xlabel=measure["title"].removeprefix("Growth with "))
    series = {
        key.removesuffix("_s"): [row[key] for _, row in rows]
        for key in (rows[0][1] if rows else ())
        if key.endswith("_s")
    }
    for name, times in series.items():
        panel.plot(counts, times, marker="o", label=f"{name}: n^{exponent(counts, times):.2f}")
    if series:
        _guide(panel, counts, list(series.values()))
        panel.legend(fontsize="small")
    panel.set_ylabel("seconds")


def _guide(panel: Any, counts: Sequence[int], series: Sequence[Sequence[float]]) -> None:
    """Draw a line in proportion through the end of what takes longest; whole powers of ten."""
    times = [time for one in series for time in one]
    slowest = max(one[-1] for one in series)
    linear = [slowest * count / counts[-1] for count in counts]
    panel.plot(counts, linear, linestyle=":", color="grey", zorder=0)
    powers = [math.log10(time) for time in times]
    panel.set_ylim(10 ** math.floor(min(powers)), 10 ** math.ceil(max(powers)))
    panel.set_xticks(counts, [f"{count:,}" for count in counts], fontsize="small")
    panel.xaxis.set_minor_formatter(NullFormatter())
