"""Learning curves of an experiment as a picture, drawn from its history alone."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["learning_curves"]

Point = tuple[int, float]
Lines = dict[str, list[Point]]

_REFERENCE = "_reference"
_COLUMNS = 3
_DECADES = 1.0  # a panel that spans more powers of ten than this is drawn on a log scale


def learning_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draw a panel for each metric, a line for each stage, to a PNG at `path`; return `path`.

    A metric `NAME_reference` is what `NAME` is to be compared with: it is drawn dashed, in the panel
    of `NAME`. Durations, and whatever is not a finite number, are left out. The file is replaced
    in one go, so that a viewer never reads half of it.

    Args:
        history: for each epoch, the metrics of each stage, as in `history.json`.
        path: where to write; its folder is made.
        title: heading of the picture.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(history)
    columns = max(1, min(_COLUMNS, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    # A figure of its own, not pyplot's: nothing is left behind, and no display is asked for.
    figure = Figure(figsize=(4.2 * columns, 0.5 + 3.0 * rows), dpi=100, layout="constrained")
    figure.suptitle(title)
    for place, (metric, lines) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(rows, columns, place), metric, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        FigureCanvasAgg(figure).print_png(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _panels(history: Sequence[Mapping[str, Any]]) -> dict[str, Lines]:
    """Return metric -> line -> points (epoch from 1, value), in order of appearance."""
    panels: dict[str, Lines] = {}
    for epoch, stages in enumerate(history, start=1):
        for stage, metrics in stages.items():
            for name, value in metrics.items():
                if name != "duration" and _is_finite(value):
                    metric = name.removesuffix(_REFERENCE)
                    line = stage if metric == name else f"{stage}, reference"
                    panels.setdefault(metric, {}).setdefault(line, []).append((epoch, value))
    return panels


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw(axes: Any, metric: str, lines: Lines) -> None:
    """Draw one panel."""
    from matplotlib.ticker import MaxNLocator

    for name, points in lines.items():
        epochs, values = zip(*points, strict=True)
        style = "--" if name.endswith("reference") else "-"
        axes.plot(epochs, values, style, label=name, linewidth=1.5, marker="o", markersize=3)
    if _wants_log([value for points in lines.values() for _, value in points]):
        axes.set_yscale("log")
    axes.set_title(metric, fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _wants_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and math.log10(max(values) / min(values)) > _DECADES
