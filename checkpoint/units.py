"""Durations in words. Pure."""

_UNITS = ((86400.0, "days", 172800.0), (3600.0, "h", 6000.0), (60.0, "min", 100.0), (1.0, "s", 1.0))


def duration(seconds: float) -> str:
    """Say in two digits how long something takes: `21 ms`, `2.1 s`, `14 min`, `12 days`."""
    for unit, name, least in _UNITS:
        if seconds >= least:
            return f"{_short(seconds / unit)} {name}"
    return f"{_short(1000 * seconds)} ms"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
