"""A retention plan as text for people."""

from collections.abc import Sequence

from ..units import readable
from .plan import Verdict

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


def _why(verdict: Verdict) -> str:
    if verdict.action != "thin":
        return verdict.why
    return f"{verdict.why}; keeps {', '.join(sorted(verdict.kept_sources)) or 'nothing'}"
