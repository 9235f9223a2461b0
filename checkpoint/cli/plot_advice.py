"""Advice on the interval -> a picture, with matplotlib."""

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..tools.advise import Advice
from .render_advice import drawn, shares

_POINTS = 200
_UNITS = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))


def plot(advice: Advice, path: Path) -> Path:
    """Draw the three curves over the interval to a PNG at `path`; return `path`.

    Raises:
        CheckpointError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CheckpointError(
            f"{path} cannot be drawn without matplotlib, which is not installed: "
            "pip install standard-solver[plots]"
        ) from error
    # A figure without pyplot: no figure stays open, and no display is needed.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    _draw(figure.add_subplot(), advice)
    canvas = FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        canvas.print_figure(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _draw(axes: Any, advice: Advice) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    model = advice.model
    least, most = drawn(model)
    updates = [least * (most / least) ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    unit, name = _unit(model.optimum * model.update_seconds)
    times = [n * model.update_seconds / unit for n in updates]
    saves, losses, totals = zip(*(shares(model, model.at(n)) for n in updates), strict=True)
    axes.plot(times, saves, "--", color="tab:blue", label="time that saves take")
    axes.plot(times, losses, "--", color="tab:red", label="time that failures are expected to lose")
    axes.plot(times, totals, "-", color="black", linewidth=2, label="together")
    _mark(axes, advice, unit, name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"time between two saves ({name})")
    axes.set_ylabel("share of the time of training (%)")
    axes.set_title(Path(advice.path).parents[1].name or advice.path, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _unit(seconds: float) -> tuple[float, str]:
    return next(
        ((unit, name) for least, unit, name in _UNITS if seconds >= least), (1.0, "seconds")
    )


def _mark(axes: Any, advice: Advice, unit: float, name: str) -> None:
    least, most = drawn(advice.model)
    for line in advice.lines:
        if not line.what or not least <= line.costs.updates <= most:
            continue
        time, total = line.costs.interval / unit, shares(advice.model, line.costs)[2]
        color = "tab:green" if "optimum" in line.what else "tab:orange"
        label = f"{line.what}: {time:.3g} {name}, {total:.2g} %"
        axes.plot([time], [total], "o", color=color, markersize=9, label=label, zorder=3)
        axes.axvline(time, color=color, linestyle=":", linewidth=1.2)
