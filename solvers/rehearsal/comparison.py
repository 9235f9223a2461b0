"""Compares the records of two runs, and finds what differs first."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .trace import Record

MODES = ("training mode", "requires_grad", "learning rate")
TRAINING = (
    *("indices", "content", *MODES, "data state", "generators"),
    *("weights", "buffers", "optimizer", "registered state", "ema", "best state"),
    *("loss and metrics", "gradients", "history"),
)
"""Sections that are the training itself, the most telling first."""
ATTRIBUTES = ("attributes", "globals", "files")
"""Sections of what may only explain a difference of the training."""
# A stage that begins sets these.
_RESTORED_LATER = MODES
_ABSENT = "nothing"


@dataclass(frozen=True)
class Difference:
    """A value that two runs do not share.

    Attributes:
        section: what it belongs to, one of `TRAINING` or `ATTRIBUTES`.
        name: of the value.
        was: its text in the undisturbed run.
        now: its text in the other run.
        where: the place in the run, for people.
        rank: of the process.
        is_restored: whether it was seen right after the restore.
    """

    section: str
    name: str
    was: str
    now: str
    where: str
    rank: int = 0
    is_restored: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What it is about, wherever it was seen."""
        return self.section, self.name


class Reference:
    """The records of the undisturbed run, by place.

    Args:
        records: of each rank.
    """

    def __init__(self, records: Sequence[Iterable[Record]]) -> None:
        self._at = [{_place(one): one for one in own} for own in records]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._at)

    def beside(self, record: Record, rank: int) -> Record | None:
        """Return what the undisturbed run was at the place of a record; None if it is no place."""
        return self._at[rank].get(_place(record)) if record.values else None


def _place(record: Record) -> tuple[str, str]:
    is_state = record.kind in ("update", "boundary", "restored")
    return ("state" if is_state else record.kind), record.place


def differences(
    reference: Reference,
    records: Iterable[Record],
    rank: int = 0,
    sections: Collection[str] = (*TRAINING, *ATTRIBUTES),
    without: Collection[tuple[str, str]] = (),
) -> Iterator[Difference]:
    """Give all differences of a run from the undisturbed one, in the order of the run.

    Args:
        reference: the undisturbed run.
        records: of one rank of the other run.
        rank: which one.
        sections: what is compared.
        without: keys of differences that do not count.
    """
    for record in records:
        other = reference.beside(record, rank)
        if other is None:
            continue
        for section in sections:
            if section in _not_compared(record, rank):
                continue
            then, now = other.values.get(section, {}), record.values.get(section, {})
            if then == now:
                continue
            for name in {**then, **now}:
                was, value = then.get(name, _ABSENT), now.get(name, _ABSENT)
                if was != value and (section, name) not in without:
                    yield Difference(
                        *(section, name, was, value, record.label, rank),
                        is_restored=record.kind == "restored",
                    )


def _not_compared(record: Record, rank: int) -> tuple[str, ...]:
    later = _RESTORED_LATER if record.kind == "restored" else ()
    if rank == 0:
        return later
    # A checkpoint holds that of rank 0.
    return (*later, "history")


@dataclass(frozen=True)
class Found:
    """What a resumed run did otherwise.

    Attributes:
        training: the first difference of the training; None when there is none.
        suspects: differences of attributes right after the restore, the most likely cause first.
        lasting: those of them that no later update put right.
        more: further differences at the place of the first one.
    """

    training: Difference | None
    suspects: Sequence[Difference] = ()
    lasting: Sequence[Difference] = ()
    more: Sequence[Difference] = ()

    @property
    def is_same(self) -> bool:
        """Whether the run is the same run."""
        return self.training is None and not self.lasting


def compare(
    reference: Reference,
    records: Sequence[Record],
    rank: int,
    noise: Collection[tuple[str, str]],
    is_last: bool,
) -> Found:
    """Compare a resumed run with the undisturbed run.

    Args:
        reference: the undisturbed run.
        records: of one rank of the resumed run.
        rank: which one.
        noise: keys of attributes that differ between two undisturbed runs.
        is_last: whether the run went on to the end of the rehearsal.
    """
    trained = list(differences(reference, records, rank, TRAINING))
    held = list(differences(reference, records, rank, ATTRIBUTES, noise))
    first = trained[0] if trained else None
    suspects = [one for one in held if one.is_restored]
    lasting = _lasting(held, records, is_last)
    keys = {one.key for one in lasting}
    suspects.sort(key=lambda one: (one.key not in keys, _rank(one)))
    more = [one for one in trained[1:] if first and one.where == first.where]
    return Found(first, suspects, lasting, more)


def _lasting(
    held: Sequence[Difference], records: Sequence[Record], is_last: bool
) -> list[Difference]:
    """Give the differences that are there until the end of a run that made enough updates.

    An attribute that is absent until it is computed again differs for a while and means nothing.
    """
    updates = [one for one in records if one.kind == "update"]
    if not is_last and len(updates) < 2:
        return []
    states = [one for one in records if one.kind in ("update", "boundary")]
    if not states:
        return []
    at_end = {one.key for one in held if one.where == states[-1].label}
    always = _always(held, [one.label for one in states])
    first: dict[tuple[str, str], Difference] = {}
    for one in held:
        first.setdefault(one.key, one)
    return sorted(
        (
            one
            for key, one in first.items()
            if key in at_end and (is_last or (key in always and _ABSENT not in (one.was, one.now)))
        ),
        key=_rank,
    )


def _always(held: Sequence[Difference], places: Collection[str]) -> set[tuple[str, str]]:
    seen: dict[tuple[str, str], set[str]] = {}
    for one in held:
        seen.setdefault(one.key, set()).add(one.where)
    return {key for key, where in seen.items() if where >= {*places}}


_KINDS = ("generator", "iterator", "module", "stateful", "tensor", "variable", "object", "value")


def _rank(one: Difference) -> tuple[int, int]:
    """Order by how likely it is that a value explains others."""
    kind = (one.was if one.was != _ABSENT else one.now).partition(" ")[0]
    place = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    return place, one.name.count(".") + one.name.count("[")


def noise_of(reference: Reference, twin: Sequence[Sequence[Record]]) -> set[tuple[str, str]]:
    """Return the keys of attributes that differ between two undisturbed runs."""
    return {
        one.key
        for rank, records in enumerate(twin)
        for one in differences(reference, records, rank, ATTRIBUTES)
    }


def up_to(records: Sequence[Record], where: str) -> Sequence[Record]:
    """Return the records of a run up to the first state that it wrote down after a place."""
    is_past = False
    for number, record in enumerate(records):
        is_past = is_past or record.label == where
        if is_past and record.kind in ("update", "boundary"):
            return records[: number + 1]
    return records


def counted(records: Iterable[Record]) -> Mapping[str, int]:
    """Count the values that a run wrote down, by section."""
    counts: dict[str, int] = {}
    for record in records:
        for section, values in record.values.items():
            counts[section] = counts.get(section, 0) + len(values)
    return counts
