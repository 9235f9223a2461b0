"""A retention plan as text for people."""

from collections.abc import Sequence

from .retention import Verdict

_UNITS = ("B", "kB", "MB", "GB", "TB")
_DONE = {"thin": "Thinned", "delete": "Deleted"}


def plan_table(verdicts: Sequence[Verdict]) -> str:
    """Write a plan as an aligned table, oldest checkpoint first, with the sum of the sizes."""
    rows = [("checkpoint", "size", "action", "why")]
    rows += [(v.position.name, readable(v.size), v.action, _why(v)) for v in verdicts]
    rows.append(("in all", readable(sum(v.size for v in verdicts)), "", ""))
    name, size, action = (max(len(row[i]) for row in rows) for i in range(3))
    lines = [f"{a:{name}}  {b:>{size}}  {c:{action}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


def plan_line(verdict: Verdict) -> str:
    """Write what was done to one checkpoint as a line for the log."""
    name, size = verdict.position.name, readable(verdict.size)
    return f"{_DONE[verdict.action]} {name} ({size}): {_why(verdict)}"


def readable(size: int) -> str:
    """Write a number of bytes with three digits, in units of powers of 1000."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def _why(verdict: Verdict) -> str:
    if verdict.action != "thin":
        return verdict.why
    return f"{verdict.why}; keeps {', '.join(sorted(verdict.kept_sources)) or 'nothing'}"
