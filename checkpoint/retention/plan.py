"""Which checkpoints may go, and why each other one stays. A pure function of what exists."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..layout import Position
from .disk_budget import Kept, fit, sizes
from .facts import CheckpointFacts
from .rules import Hold, Holds, Policy, holds, why_stale

Action = Literal["keep", "thin", "delete"]


@dataclass(frozen=True)
class Verdict:
    """What is to happen to one checkpoint.

    Attributes:
        position: which one.
        action: `thin` drops the sources that are not in `kept_sources`.
        why: all rules that keep it, or why none does.
        kept_sources: sources that it has in the end.
        size: bytes that it takes now; a file shared with an older checkpoint counts there.
    """

    position: Position
    action: Action
    why: str
    kept_sources: frozenset[str] = frozenset()
    size: int = 0


def plan(existing: Iterable[CheckpointFacts], policy: Policy) -> list[Verdict]:
    """Decide for each checkpoint, oldest first.

    Args:
        existing: the committed checkpoints.
        policy: which are to stay.

    What any rule wants stays. The newest checkpoint stays whatever the rules say: a run must never
    be left with nothing. One whose weights are not finite never takes the place of one whose
    weights are. Carried out and made again, the plan asks for nothing more.
    """
    ordered = sorted(existing, key=lambda one: one.position.order)
    held = holds(ordered, policy)
    wanted = _wanted(ordered, held, policy)
    kept = fit(ordered, wanted, held, policy)
    size = sizes(ordered)
    verdicts = []
    for one in ordered:
        at = one.position
        why = _why(one, held[at], wanted[at], kept[at], policy)
        left = kept[at] or frozenset()
        verdicts.append(Verdict(at, _action(one, kept[at]), why, left, size[at]))
    return verdicts


def _wanted(ordered: Sequence[CheckpointFacts], held: Holds, policy: Policy) -> Kept:
    """Say what each keeps by the rules, whatever that takes."""
    wanted = {one.position: _held_sources(one, held[one.position], policy) for one in ordered}
    demoted = [
        one
        for one in ordered
        if not held[one.position] and one.is_finite and one.sources & set(policy.demote or ())
    ]
    for one in demoted if policy.keep_demoted is None else demoted[-policy.keep_demoted :]:
        wanted[one.position] = one.sources & policy.demoted_sources
    return wanted


def _held_sources(
    one: CheckpointFacts, held: Sequence[Hold], policy: Policy
) -> frozenset[str] | None:
    if not held:
        return None
    if policy.kept_sources is None or any(hold.is_whole for hold in held):
        return one.sources
    return one.sources & policy.kept_sources


def _action(one: CheckpointFacts, kept: frozenset[str] | None) -> Action:
    if kept is None:
        return "delete"
    return "keep" if kept == one.sources else "thin"


def _why(
    one: CheckpointFacts,
    held: Sequence[Hold],
    wanted: frozenset[str] | None,
    kept: frozenset[str] | None,
    policy: Policy,
) -> str:
    why = "; ".join(hold.why for hold in held) or why_stale(one, policy)
    if kept != wanted:
        how = "gives way" if kept is None else "demoted"
        return f"{why}; {how}, since all together are over max_gb={policy.max_gb:g}"
    if held:
        return f"{why}; thinned by keep_every_states" if kept != one.sources else why
    if kept is not None:
        return f"demoted: {why}"
    if one.is_finite and one.sources & set(policy.demote or ()):
        return f"{why}; older than the newest {policy.keep_demoted} demoted ones (keep_demoted)"
    return why
