"""Which checkpoints may go, and why each other one stays. A pure function of what exists."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .layout import Position
from .schedule import NONFINITE, PERIODIC, ROLLING, THRESHOLD

ROLLING_KEPT = 2
"""The newest and the one before, so that there is always one to fall back to."""

Action = Literal["keep", "thin", "delete"]


@dataclass(frozen=True)
class Existing:
    """A committed checkpoint, as far as retention cares."""

    position: Position
    reasons: frozenset[str]
    sources: frozenset[str]


@dataclass(frozen=True)
class Policy:
    """Which checkpoints are to stay.

    Attributes:
        keep_last: how many periodic checkpoints stay; None for all of them.
        keep_every_states: the sources that a periodic checkpoint keeps once it is no longer a
            rolling one; None for all of them.
        always_kept: sources that thinning never drops.
    """

    keep_last: int | None = None
    keep_every_states: tuple[str, ...] | None = None
    always_kept: frozenset[str] = frozenset()

    @property
    def kept_sources(self) -> frozenset[str] | None:
        """Sources that a periodic checkpoint keeps in the end; None for all."""
        if not self.keep_every_states:
            return None
        return self.always_kept.union(self.keep_every_states)


@dataclass(frozen=True)
class Verdict:
    """What is to happen to one checkpoint; `thin` keeps only the sources in `kept_sources`."""

    position: Position
    action: Action
    why: str
    kept_sources: frozenset[str] = frozenset()


def plan(existing: Iterable[Existing], policy: Policy) -> list[Verdict]:
    """Decide for each checkpoint, oldest first.

    Args:
        existing: the committed checkpoints.
        policy: which are to stay.

    The newest checkpoint stays whatever the rules say: a run must never be left with nothing. One
    whose weights are not finite never takes the place of one whose weights are.
    """
    ordered = sorted(existing, key=lambda one: one.position.order)
    finite = [e for e in ordered if NONFINITE not in e.reasons]
    rolling = {one.position for one in [e for e in finite if ROLLING in e.reasons][-ROLLING_KEPT:]}
    crossed = {e.position for e in finite if THRESHOLD in e.reasons}
    periodic = [e.position for e in finite if PERIODIC in e.reasons]
    kept_periodic = set(periodic if policy.keep_last is None else periodic[-policy.keep_last :])
    verdicts = []
    for one in ordered:
        if one.position in rolling:
            verdicts.append(Verdict(one.position, "keep", "one of the newest two"))
        elif one.position in crossed:
            verdicts.append(Verdict(one.position, "keep", "a metric crossed its threshold"))
        elif one.position in kept_periodic:
            verdicts.append(_periodic(one, policy))
        elif one is ordered[-1]:
            verdicts.append(Verdict(one.position, "keep", "the newest"))
        else:
            verdicts.append(Verdict(one.position, "delete", _why_stale(one, policy)))
    return verdicts


def _periodic(one: Existing, policy: Policy) -> Verdict:
    why = "periodic (save_every)"
    kept = one.sources
    if policy.kept_sources is not None:
        kept = one.sources & policy.kept_sources
    if kept == one.sources:
        return Verdict(one.position, "keep", why)
    return Verdict(one.position, "thin", f"{why}, thinned by keep_every_states", kept)


def _why_stale(one: Existing, policy: Policy) -> str:
    if NONFINITE in one.reasons:
        return "its weights are not finite"
    if PERIODIC in one.reasons:
        return f"older than the newest {policy.keep_last} periodic ones (keep_last)"
    return f"older than the newest {ROLLING_KEPT}"
