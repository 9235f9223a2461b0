"""Pictures of an experiment: learning curves from its history, and grids of small images."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["image_grid", "learning_curves"]

Point = tuple[int, float]
Lines = dict[str, list[Point]]

_REFERENCE = "_reference"
_BETWEEN = -0.6  # grey between the images of a grid
_DECADES = 1.0  # a panel that spans more powers of ten than this is drawn on a log scale


def learning_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draw a panel for each metric, a line for each stage, to a PNG at `path`; return `path`.

    A metric `NAME_reference` is what `NAME` is to be compared with: it is drawn dashed, in the
    panel of `NAME`. Durations, and whatever is not a finite number, are left out.

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
    columns = math.ceil(math.sqrt(len(panels))) or 1
    rows = math.ceil(len(panels) / columns) or 1
    # A figure of its own, not pyplot's: pyplot would keep the figure, and ask for a display.
    figure = Figure(figsize=(4.2 * columns, 0.5 + 3.0 * rows), dpi=100, layout="constrained")
    figure.suptitle(title)
    for place, (metric, lines) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(rows, columns, place), metric, lines)
    canvas = FigureCanvasAgg(figure)
    return _replace(path, lambda file: canvas.print_figure(file, format="png"))


def image_grid(images: "Tensor", columns: int, path: Path, cell: int = 48, gap: int = 4) -> Path:
    """Write images [N, H, W] between -1 (black) and 1 as a grey PNG, row by row; return `path`.

    Args:
        images: a multiple of `columns` of them.
        columns: images in a row.
        path: where to write; its folder is made.
        cell: width and height that each image is enlarged to, in pixels.
        gap: pixels between two images.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.image import imsave
    from torch.nn.functional import interpolate, pad

    large = interpolate(images[:, None].float(), (cell, cell), mode="bicubic").clamp(-1, 1)
    framed = pad(large, (0, gap, 0, gap), value=_BETWEEN)
    rows = framed.view(-1, columns, cell + gap, cell + gap)
    picture = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-gap, :-gap]

    def write(file: Path) -> None:
        imsave(file, picture.numpy(), vmin=-1, vmax=1, cmap="gray", format="png")

    return _replace(path, write)


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    """Put a file at `path` in one go, so that a viewer never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(unfinished)
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
