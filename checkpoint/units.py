"""Durations in words. Pure."""

_UNITS = ((86400.0, "days", 172800.0), (3600.0, "h", 6000.0), (60.0, "min", 100.0), (1.0, "s", 1.0))


def duration(seconds: float) -> str:
    """Say how long something takes, in two digits: `21 ms`, `14 min`, `6.0 h`, `12 days`."""
    for unit, name, least in _UNITS:
        if seconds >= least:
            return f"{_short(seconds / unit)} {name}"
    return f"{_short(1000 * seconds)} ms" if seconds else "0 s"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
