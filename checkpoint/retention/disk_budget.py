"""What checkpoints take on disk, and which have to give way when that is too much. Pure."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

from ..layout import Position
from .facts import CheckpointFacts, FileFacts
from .rules import Holds, Policy

GB = 10**9
_UNTOUCHED = 2  # of the newest good ones

Kept = Mapping[Position, frozenset[str] | None]
"""The sources that each checkpoint keeps; None for one that goes."""


def fit(ordered: Sequence[CheckpointFacts], kept: Kept, held: Holds, policy: Policy) -> Kept:
    """Let checkpoints give way, the oldest first, until all fit into `policy.max_gb`.

    First what no rule keeps and was only demoted is deleted, then what rules keep is demoted if
    `policy.demote` says to what, then that is deleted. What a firm rule keeps, and the newest two
    good ones, never give way: so it may be too much in the end.

    Args:
        ordered: the committed checkpoints, oldest first.
        kept: what each is to keep by the rules.
        held: by which.
        policy: says how much is too much.
    """
    if policy.max_gb is None:
        return kept
    limit = policy.max_gb * GB
    fitted = dict(kept)
    usage = _Usage(ordered, kept)
    for one, sources in _concessions(ordered, kept, held, policy):
        if usage.bytes <= limit:
            break
        usage.change(one, fitted[one.position], sources)
        fitted[one.position] = sources
    return fitted


def sizes(ordered: Sequence[CheckpointFacts]) -> dict[Position, int]:
    """Bytes of each checkpoint; what it shares with an older one counts there, as `du` does it."""
    seen: set[Hashable] = set()
    found: dict[Position, int] = {}
    for one in ordered:
        own = {file.identity: file.size for file in one.files if file.identity not in seen}
        found[one.position] = sum(own.values())
        seen |= own.keys()
    return found


def remaining(ordered: Sequence[CheckpointFacts], kept: Kept) -> int:
    """Bytes that are taken when each checkpoint keeps these sources."""
    return _Usage(ordered, kept).bytes


def _concessions(
    ordered: Sequence[CheckpointFacts], kept: Kept, held: Holds, policy: Policy
) -> Iterator[tuple[CheckpointFacts, frozenset[str] | None]]:
    staying = [one for one in ordered if kept[one.position] is not None]
    # Two, so that a run can still start if the newest one turns out to be damaged.
    untouched = [one for one in staying if one.is_finite][-_UNTOUCHED:]
    soft = [
        one
        for one in staying
        if one not in untouched and not any(hold.is_firm for hold in held[one.position])
    ]
    for one in soft:
        if not held[one.position]:
            yield one, None
    wanted = [one for one in soft if held[one.position]]
    for one in wanted:
        demoted = (kept[one.position] or frozenset()) & policy.demoted_sources
        if demoted.intersection(policy.demote or ()):
            yield one, demoted
    for one in wanted:
        yield one, None


class _Usage:
    """Bytes that are taken, each file once however many names it has."""

    def __init__(self, ordered: Sequence[CheckpointFacts], kept: Kept) -> None:
        self.bytes = 0
        self._names: Counter[Hashable] = Counter()
        for one in ordered:
            for file in _files(one, kept[one.position]):
                self.bytes += 0 if self._names[file.identity] else file.size
                self._names[file.identity] += 1

    def change(
        self, one: CheckpointFacts, before: frozenset[str] | None, after: frozenset[str] | None
    ) -> None:
        stays = set(_files(one, after))
        for file in _files(one, before):
            if file not in stays:
                self._names[file.identity] -= 1
                self.bytes -= 0 if self._names[file.identity] else file.size


def _files(one: CheckpointFacts, kept: frozenset[str] | None) -> list[FileFacts]:
    if kept is None:
        return []
    return [file for file in one.files if not file.source or file.source in kept]
