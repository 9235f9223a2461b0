"""Every rule that keeps checkpoints: its keys in `Policy`, and a pure function of what exists.

To add a rule, add its field to `Policy` and its function to `_OF_GOOD` or `_OF_ALL`.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from ..layout import PERIODIC, ROLLING, THRESHOLD, Position
from .facts import CheckpointFacts

Mode = Literal["min", "max"]


def _count(least: int = 1, default: int | None = None) -> Any:
    """Return a field for a count that is at least `least`."""
    return field(default=default, metadata={"least": least})


def _positive() -> Any:
    """Return a field for a number above 0, or None."""
    return field(default=None, metadata={"above": 0})


def _sources() -> Any:
    """Return a field for names of sources; an empty list means None."""
    return field(default=None, metadata={"sources": True})


@dataclass(frozen=True)
class Policy:
    """Which checkpoints stay: all that at least one of the rules keeps.

    Attributes:
        keep_rolling: how many of the newest stay; at least 2, so that a fallback exists.
        keep_last: how many periodic checkpoints stay; None for all of them.
        keep_every: the end of every N-th epoch stays for good, if it was saved; None for none.
        keep_best: how many of the best checkpoints by `best_metric` stay; None for none.
        best_metric: name of that metric. A value that is not a finite number does not count; of
            equal values, the older one is better.
        best_mode: whether the smallest (`min`) or the largest (`max`) value is the best.
        best_stage: stage that computes the metric.
        keep_hours: all checkpoints that are younger stay; None for none.
        keep_resumed: whether the checkpoint stays from which the run last started.
        keep_every_states: sources that a checkpoint keeps if only `save_every` or `keep_every`
            keep it; None for all sources.
        demote: sources that a checkpoint keeps if no rule keeps it; None to delete it.
        keep_demoted: how many of the demoted ones stay, the newest; None for all of them.
        max_gb: limit for all checkpoints together, in units of 10**9 bytes; None for no limit.
        always_kept: sources that no rule drops.

    Raises:
        ValueError: a number is out of range, or the metric is missing; the message names the key.
    """

    keep_rolling: int = _count(2, 2)
    keep_last: int | None = _count()
    keep_every: int | None = _count()
    keep_best: int | None = _count()
    best_metric: str | None = None
    best_mode: Mode = "min"
    best_stage: str = "valid"
    keep_hours: float | None = _positive()
    keep_resumed: bool = True
    keep_every_states: tuple[str, ...] | None = _sources()
    demote: tuple[str, ...] | None = _sources()
    keep_demoted: int | None = _count()
    max_gb: float | None = _positive()
    always_kept: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least")
            # None is allowed where it is the default, and fails in the comparison elsewhere.
            is_given = value is not None or one.default is not None
            if least is not None and is_given and value < least:
                other = ", or null for none" if least == 1 else ", so that there is a fallback"
                raise ValueError(f"checkpoint.{one.name} is {value}: give at least {least}{other}")
            if value is not None and "above" in one.metadata and not value > 0:
                raise ValueError(f"checkpoint.{one.name} is {value}: give more than 0, or null")
        if self.keep_best is not None and self.best_metric is None:
            raise ValueError(
                f"checkpoint.keep_best is {self.keep_best}, and no metric says what is best: set "
                "checkpoint.best_metric"
            )

    @classmethod
    def of(cls, **rules: Any) -> Self:
        """Make a policy from keyword arguments; lists are allowed for the names of sources.

        Raises:
            TypeError: there is no such rule; the message has the nearest name.
            ValueError: see the class.
        """
        known = {one.name: one for one in fields(cls)}
        for name in rules.keys() - known.keys():
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"there is no retention rule {name!r}: {hint}")
        for name, one in known.items():
            if "sources" in one.metadata and name in rules:
                rules[name] = tuple(rules[name] or ()) or None
        return cls(**{**rules, "always_kept": frozenset(rules.get("always_kept", ()))})

    @property
    def kept_sources(self) -> frozenset[str] | None:
        """Sources that a periodic checkpoint keeps in the end; None for all."""
        return self.always_kept.union(self.keep_every_states) if self.keep_every_states else None

    @property
    def demoted_sources(self) -> frozenset[str]:
        """Sources that a demoted checkpoint keeps; empty when it is deleted."""
        return self.always_kept.union(self.demote) if self.demote else frozenset()

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        lists = (tuple, frozenset)
        return {k: sorted(v) if isinstance(v, lists) else v for k, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read the result of `to_plain`; rules that this version does not know are left out.

        Raises:
            ValueError: the values do not describe a policy.
        """
        try:
            known = {one.name: plain[one.name] for one in fields(cls) if one.name in plain}
            return cls.of(**known)
        except TypeError as error:
            raise ValueError(f"these are not the rules of a policy: {error}") from error


@dataclass(frozen=True)
class Hold:
    """The reason for which one rule keeps a checkpoint.

    Attributes:
        why: the reason, for people.
        is_firm: whether the checkpoint stays even if all together exceed the limit.
        is_whole: whether the checkpoint keeps all its sources.
    """

    why: str
    is_firm: bool = False
    is_whole: bool = True


Holds = dict[Position, list[Hold]]
_Held = Iterable[tuple[CheckpointFacts, Hold]]


def holds(ordered: Sequence[CheckpointFacts], policy: Policy) -> Holds:
    """Apply every rule; a checkpoint without a hold may be deleted.

    Args:
        ordered: the committed checkpoints, oldest first.
        policy: which of them stay.
    """
    found: Holds = {one.position: [] for one in ordered}
    good = [one for one in ordered if one.is_finite]
    for rules, given in ((_OF_GOOD, good), (_OF_ALL, ordered)):
        for rule in rules:
            for one, hold in rule(given, policy):
                found[one.position].append(hold)
    # Whatever the rules say, a run must never be left without a checkpoint to start from.
    for newest, why in ((ordered[-1:], "the newest"), (good[-1:], "the newest good one")):
        for one in newest:
            if not found[one.position]:
                found[one.position].append(Hold(why, is_firm=True))
    return found


def _rolling(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    count = policy.keep_rolling
    for one in [one for one in good if ROLLING in one.reasons][-count:]:
        yield one, Hold(f"one of the newest {_number(count)}")


def _crossed(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in good:
        if THRESHOLD in one.reasons:
            yield one, Hold("a metric crossed its threshold", is_firm=True)


def _periodic(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    periodic = [one for one in good if PERIODIC in one.reasons]
    for one in periodic if policy.keep_last is None else periodic[-policy.keep_last :]:
        yield one, Hold("periodic (save_every)", is_whole=False)


def _every(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in good:
        every = policy.keep_every
        if every and one.is_end_of_epoch and one.position.epoch % every == 0:
            yield one, Hold(f"every {every} epochs (keep_every)", is_whole=False)


def _best(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    sign = 1 if policy.best_mode == "min" else -1
    scored = [one for one in good if one.is_end_of_epoch and score(one, policy) is not None]
    # The sort is stable: of equal scores, the older checkpoint comes first.
    ranked = sorted(scored, key=lambda one: sign * (score(one, policy) or 0.0))
    for rank, one in enumerate(ranked[: policy.keep_best or 0], start=1):
        yield one, Hold(f"best {rank} of {policy.best_stage} {policy.best_metric}")


def _young(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in good:
        if policy.keep_hours is not None and one.age < policy.keep_hours:
            yield one, Hold(f"younger than {policy.keep_hours:g} hours (keep_hours)")


def _resumed(good: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    # The newest checkpoint with finite weights names the one from which its run started.
    resumed = good[-1].resumed if good and policy.keep_resumed else None
    for one in good:
        if one.position.name == resumed:
            yield one, Hold("this run resumed from it (keep_resumed)", is_firm=True)


def _continued(ordered: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in ordered:
        if one.continued:
            yield one, Hold(f"continued by {', '.join(one.continued)}", is_firm=True)


def _pinned(ordered: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in ordered:
        if one.pinned is not None:
            yield one, Hold(f"pinned: {one.pinned}" if one.pinned else "pinned", is_firm=True)


def _foreign(ordered: Sequence[CheckpointFacts], policy: Policy) -> _Held:
    for one in ordered:
        if one.foreign:
            why = f"its folder holds what is not of the checkpoint: {', '.join(one.foreign)}"
            yield one, Hold(why, is_firm=True)


_Rule = Callable[[Sequence[CheckpointFacts], Policy], _Held]
# These rules see only checkpoints with finite weights, so that a checkpoint with NaN never takes
# the place of a good one.
_OF_GOOD: tuple[_Rule, ...] = (_rolling, _crossed, _periodic, _every, _best, _young, _resumed)
_OF_ALL: tuple[_Rule, ...] = (_continued, _pinned, _foreign)


def score(one: CheckpointFacts, policy: Policy) -> float | None:
    """Return the value of `best_metric`; None if it is missing or not a finite number."""
    value = one.metrics.get(policy.best_stage, {}).get(policy.best_metric or "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -math.inf < value < math.inf else None


def why_stale(one: CheckpointFacts, policy: Policy) -> str:
    """Return why no rule keeps a checkpoint."""
    return "; ".join(_missed(one, policy)) or "no rule keeps it"


def _missed(one: CheckpointFacts, policy: Policy) -> Iterator[str]:
    if not one.is_finite:
        yield "its weights are not finite"
        return
    if ROLLING in one.reasons:
        yield f"older than the newest {_number(policy.keep_rolling)}"
    if PERIODIC in one.reasons:
        yield f"older than the newest {policy.keep_last} periodic ones (keep_last)"
    if policy.keep_best and one.is_end_of_epoch:
        what = f"{policy.best_stage} {policy.best_metric}"
        found = score(one, policy) is not None
        yield f"not among the best {policy.keep_best} of {what}" if found else f"without {what}"
    if policy.keep_hours is not None:
        yield f"older than {policy.keep_hours:g} hours (keep_hours)"


def _number(count: int) -> str:
    return "two" if count == 2 else str(count)
