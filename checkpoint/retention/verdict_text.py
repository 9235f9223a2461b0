"""A verdict of the retention plan as text for people."""

from ..units import format_bytes
from .plan import Verdict

_DONE = {"thin": "Thinned", "delete": "Deleted"}


def describe_verdict(verdict: Verdict) -> str:
    """Write what was done to one checkpoint as a line for the log."""
    name, size = verdict.position.name, format_bytes(verdict.size)
    return f"{_DONE[verdict.action]} {name} ({size}): {why(verdict)}"


def why(verdict: Verdict) -> str:
    """Return why a checkpoint stays or goes, and what a thinned one keeps."""
    if verdict.action != "thin":
        return verdict.why
    return f"{verdict.why}; keeps {', '.join(sorted(verdict.kept_sources)) or 'nothing'}"
