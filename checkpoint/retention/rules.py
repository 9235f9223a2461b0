"""Each rule that keeps checkpoints, as a pure function of what exists."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..layout import Position
from ..scheduling.triggers import NONFINITE, PERIODIC, ROLLING, THRESHOLD
from .policy import Policy


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Attributes:
        source: whose tensors it holds; empty for the manifest.
        identity: what it has in common with its other names, when it has any.
        size: in bytes.
    """

    source: str
    identity: Hashable
    size: int


@dataclass(frozen=True)
class Existing:
    """A committed checkpoint, as far as retention cares.

    Attributes:
        position: where in the run it was taken.
        reasons: why it was saved, see `schedule`.
        sources: names of those that it holds.
        metrics: those of its epoch, by stage.
        age: hours since it was saved.
        resumed: name of the checkpoint that the run which saved it had started from.
        pinned: the note of who pinned it; None when it is not pinned.
        continued: names of the runs that continued from it and are still there.
        foreign: files in its folder that are not of the checkpoint.
        files: those that are.
    """

    position: Position
    reasons: frozenset[str]
    sources: frozenset[str]
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    age: float = math.inf
    resumed: str | None = None
    pinned: str | None = None
    continued: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    files: tuple[File, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether all its weights are."""
        return NONFINITE not in self.reasons


@dataclass(frozen=True)
class Hold:
    """What one rule says of a checkpoint that it keeps.

    Attributes:
        why: for people.
        is_firm: whether it stays also when all together are over the limit.
        is_whole: whether it keeps all its sources.
    """

    why: str
    is_firm: bool = False
    is_whole: bool = True


Holds = dict[Position, list[Hold]]
_Held = Iterable[tuple[Existing, Hold]]


def holds(ordered: Sequence[Existing], policy: Policy) -> Holds:
    """Ask every rule; what is held by none may go.

    Args:
        ordered: the committed checkpoints, oldest first.
        policy: which are to stay.
    """
    found: Holds = {one.position: [] for one in ordered}
    good = [one for one in ordered if one.is_finite]
    for rules, given in ((_OF_GOOD, good), (_OF_ALL, ordered)):
        for rule in rules:
            for one, hold in rule(given, policy):
                found[one.position].append(hold)
    for newest, why in ((ordered[-1:], "the newest"), (good[-1:], "the newest good one")):
        for one in newest:
            if not found[one.position]:
                found[one.position].append(Hold(why, is_firm=True))
    return found


def _rolling(good: Sequence[Existing], policy: Policy) -> _Held:
    count = policy.keep_rolling
    for one in [one for one in good if ROLLING in one.reasons][-count:]:
        yield one, Hold(f"one of the newest {_number(count)}")


def _crossed(good: Sequence[Existing], policy: Policy) -> _Held:
    for one in good:
        if THRESHOLD in one.reasons:
            yield one, Hold("a metric crossed its threshold", is_firm=True)


def _periodic(good: Sequence[Existing], policy: Policy) -> _Held:
    periodic = [one for one in good if PERIODIC in one.reasons]
    for one in periodic if policy.keep_last is None else periodic[-policy.keep_last :]:
        yield one, Hold("periodic (save_every)", is_whole=False)


def _every(good: Sequence[Existing], policy: Policy) -> _Held:
    for one in good:
        if policy.keep_every and is_end(one) and one.position.epoch % policy.keep_every == 0:
            yield one, Hold(f"every {policy.keep_every} epochs (keep_every)", is_whole=False)


def _best(good: Sequence[Existing], policy: Policy) -> _Held:
    sign = 1 if policy.best_mode == "min" else -1
    # The sort leaves equal ones in order: the older goes first.
    scored = [one for one in good if is_end(one) and score(one, policy) is not None]
    ranked = sorted(scored, key=lambda one: sign * (score(one, policy) or 0.0))
    for rank, one in enumerate(ranked[: policy.keep_best or 0], start=1):
        yield one, Hold(f"best {rank} of {policy.best_stage} {policy.best_metric}")


def _young(good: Sequence[Existing], policy: Policy) -> _Held:
    for one in good:
        if policy.keep_hours is not None and one.age < policy.keep_hours:
            yield one, Hold(f"younger than {policy.keep_hours:g} hours (keep_hours)")


def _resumed(good: Sequence[Existing], policy: Policy) -> _Held:
    # The newest one says where the run that goes on now has started.
    resumed = good[-1].resumed if good and policy.keep_resumed else None
    for one in good:
        if one.position.name == resumed:
            yield one, Hold("this run resumed from it (keep_resumed)", is_firm=True)


def _continued(ordered: Sequence[Existing], policy: Policy) -> _Held:
    for one in ordered:
        if one.continued:
            yield one, Hold(f"continued by {', '.join(one.continued)}", is_firm=True)


def _pinned(ordered: Sequence[Existing], policy: Policy) -> _Held:
    for one in ordered:
        if one.pinned is not None:
            yield one, Hold(f"pinned: {one.pinned}" if one.pinned else "pinned", is_firm=True)


def _foreign(ordered: Sequence[Existing], policy: Policy) -> _Held:
    for one in ordered:
        if one.foreign:
            why = f"its folder holds what is not of the checkpoint: {', '.join(one.foreign)}"
            yield one, Hold(why, is_firm=True)


_Rule = Callable[[Sequence[Existing], Policy], _Held]
# Weights that are not finite count for none of the first, and take no other's place.
_OF_GOOD: tuple[_Rule, ...] = (_rolling, _crossed, _periodic, _every, _best, _young, _resumed)
_OF_ALL: tuple[_Rule, ...] = (_continued, _pinned, _foreign)


def score(one: Existing, policy: Policy) -> float | None:
    """Return the metric that says what is best; None when it is not there or not finite."""
    value = one.metrics.get(policy.best_stage, {}).get(policy.best_metric or "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -math.inf < value < math.inf else None


def is_end(one: Existing) -> bool:
    """Whether it is of the end of an epoch."""
    return one.position.step is None


def why_stale(one: Existing, policy: Policy) -> str:
    """Say why no rule keeps a checkpoint."""
    return "; ".join(_missed(one, policy)) or "no rule keeps it"


def _missed(one: Existing, policy: Policy) -> Iterator[str]:
    if not one.is_finite:
        yield "its weights are not finite"
        return
    if ROLLING in one.reasons:
        yield f"older than the newest {_number(policy.keep_rolling)}"
    if PERIODIC in one.reasons:
        yield f"older than the newest {policy.keep_last} periodic ones (keep_last)"
    if policy.keep_best and is_end(one):
        what = f"{policy.best_stage} {policy.best_metric}"
        found = score(one, policy) is not None
        yield f"not among the best {policy.keep_best} of {what}" if found else f"without {what}"
    if policy.keep_hours is not None:
        yield f"older than {policy.keep_hours:g} hours (keep_hours)"


def _number(count: int) -> str:
    return "two" if count == 2 else str(count)
