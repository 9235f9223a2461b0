"""Durations, sizes and tables as text."""

from collections.abc import Iterable, Sequence

_TIMES = ((86400.0, "days", 172800.0), (3600.0, "h", 6000.0), (60.0, "min", 100.0), (1.0, "s", 1.0))
_SIZES = ("B", "kB", "MB", "GB", "TB")


def format_duration(seconds: float) -> str:
    """Say how long something takes, in two digits: `21 ms`, `14 min`, `6.0 h`, `12 days`."""
    for unit, name, least in _TIMES:
        if seconds >= least:
            return f"{_short(seconds / unit)} {name}"
    return f"{_short(1000 * seconds)} ms" if seconds else "0 s"


def format_bytes(size: int) -> str:
    """Write a number of bytes with three digits, in units of powers of 1000."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_SIZES) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_SIZES[unit]}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def format_table(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align rows, of which the first is the head; the columns in `right` to the right."""
    filled = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    ]
