"""How the cost grows, as lines on scales of powers of ten; dotted lines grow in proportion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every measure of growth into one file, a panel each."""
    grown = [one for one in results if one["measure"].startswith("growth")]
    figure, panels = pyplot.subplots(
        1, max(len(grown), 1), figsize=(4 * max(len(grown), 1), 4), squeeze=False
    )
    for panel, measure in zip(panels[0], grown, strict=False):
        _draw(panel, measure)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _draw(panel: Any, measure: dict[str, Any]) -> None:
    rows = [(int(r["name"].replace(",", "")), r["median"]) for r in measure["rows"] if r["rounds"]]
    counts = [count for count, _ in rows]
    for key in [key for key in rows[0][1] if key.endswith("_s")] if rows else []:
        times = [row[key] for _, row in rows]
        panel.plot(counts, times, marker="o", label=key.removesuffix("_s"))
        linear = [times[0] * count / counts[0] for count in counts]
        panel.plot(counts, linear, linestyle=":", color="grey", linewidth=0.7)
    panel.set(xscale="log", yscale="log", xlabel=measure["title"].removeprefix("Growth with "))
    panel.set_ylabel("seconds")
    panel.legend(fontsize="small")
