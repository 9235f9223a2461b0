"""By which rules checkpoints stay: plain values, from the configuration or from a manifest."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, TypedDict, Unpack

Mode = Literal["min", "max"]


class Rules(TypedDict, total=False):
    """The fields of a `Policy`, as keyword arguments."""

    keep_rolling: int
    keep_last: int | None
    keep_every: int | None
    keep_best: int | None
    best_metric: str | None
    best_mode: Mode
    best_stage: str
    keep_hours: float | None
    keep_resumed: bool
    keep_every_states: Sequence[str] | None
    demote: Sequence[str] | None
    keep_demoted: int | None
    max_gb: float | None
    always_kept: Collection[str]


@dataclass(frozen=True)
class Policy:
    """Which checkpoints are to stay: those that any of the rules wants.

    Attributes:
        keep_rolling: how many of the newest stay; at least 2, for one to fall back to.
        keep_last: how many periodic checkpoints stay; None for all of them.
        keep_every: the end of every N-th epoch stays for good, as far as it was saved; None for
            no such rule.
        keep_best: how many of the best stay, by `best_metric`; None for no such rule.
        best_metric: name of the metric; what is no finite number never counts, ties keep the older.
        best_mode: whether the least (`min`) or the most (`max`) of it is the best.
        best_stage: stage that gives the metric.
        keep_hours: all that are younger stay; None for no such rule.
        keep_resumed: whether the one stays that the run last started from.
        keep_every_states: the sources that a checkpoint keeps which only `save_every` or
            `keep_every` still want; None for all of them.
        demote: the sources that a checkpoint keeps which no rule wants any more; None to delete it.
        keep_demoted: how many of those stay, the newest; None for all of them.
        max_gb: what all together may take, in units of 10**9 bytes; None for no limit.
        always_kept: sources that thinning never drops.

    Raises:
        ValueError: a number is out of range, or the metric is missing; the message names the key.
    """

    keep_rolling: int = 2
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: int | None = None
    best_metric: str | None = None
    best_mode: Mode = "min"
    best_stage: str = "valid"
    keep_hours: float | None = None
    keep_resumed: bool = True
    keep_every_states: tuple[str, ...] | None = None
    demote: tuple[str, ...] | None = None
    keep_demoted: int | None = None
    max_gb: float | None = None
    always_kept: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.keep_rolling < 2:
            raise ValueError(
                f"checkpoint.keep_rolling is {self.keep_rolling}: give at least 2, so that there "
                "is always one to fall back to"
            )
        for name in ("keep_last", "keep_every", "keep_best", "keep_demoted"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}: give at least 1, or null for none")
        for name in ("keep_hours", "max_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"checkpoint.{name} is {value}: give more than 0, or null")
        if self.keep_best is not None and self.best_metric is None:
            raise ValueError(
                f"checkpoint.keep_best is {self.keep_best}, and no metric says what is best: set "
                "checkpoint.best_metric"
            )

    @classmethod
    def of(cls, **rules: Unpack[Rules]) -> Self:
        """Make a policy of fields that may be lists; an empty list of sources is none."""
        given: dict[str, Any] = dict(rules)
        for name in ("keep_every_states", "demote"):
            given[name] = tuple(given.get(name) or ()) or None
        return cls(**{**given, "always_kept": frozenset(given.get("always_kept", ()))})

    @property
    def kept_sources(self) -> frozenset[str] | None:
        """Sources that a periodic checkpoint keeps in the end; None for all."""
        return self.always_kept.union(self.keep_every_states) if self.keep_every_states else None

    @property
    def demoted_sources(self) -> frozenset[str]:
        """Sources that a demoted checkpoint keeps; none when it is deleted."""
        return self.always_kept.union(self.demote) if self.demote else frozenset()

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as what JSON can hold."""
        lists = (tuple, frozenset)
        return {k: sorted(v) if isinstance(v, lists) else v for k, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `to_plain` returned; rules that this version does not know are left out.

        Raises:
            ValueError: it is not that.
        """
        try:
            known = {one.name: plain[one.name] for one in fields(cls) if one.name in plain}
            return cls.of(**known)
        except TypeError as error:
            raise ValueError(f"these are not the rules of a policy: {error}") from error
