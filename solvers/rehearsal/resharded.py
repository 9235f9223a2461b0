"""Compares a run that resumes on another number of ranks: with what has to be the same there."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .comparison import Difference, Found, Reference, counted
from .trace import Record

NOT_COMPARED = (
    "losses, gradients and weights of the updates after the restart: another number of ranks adds "
    "up in another order and draws other random numbers",
    "attributes of the data loaders, and generators: each rank has its own",
)
OF_FIRST_RANK = ("buffers and history of all ranks but the first, whose values are saved",)
_SAME = ("weights", "buffers", "optimizer", "registered state", "ema", "best state", "history")


def compare_resharded(
    reference: Reference, records: Sequence[Sequence[Record]], noise: Collection[tuple[str, str]]
) -> tuple[Found, Mapping[str, int]]:
    """Compare the restored state, and after that learning rates and the samples of each update.

    Args:
        reference: the undisturbed run.
        records: of each rank of the resumed run.
        noise: keys of attributes that differ between two undisturbed runs.

    Returns:
        What differs, and how many values were compared by section.
    """
    restored = [one for own in records for one in own if one.kind == "restored"]
    counts = {k: v for k, v in counted(restored).items() if k in (*_SAME, "attributes")}
    state = [d for rank, own in enumerate(records) for d in _of_state(reference, own, rank)]
    order = list(_of_order(reference, records))
    counts["indices"] = sum(one.kind == "batch" for one in records[0])
    first = next(iter([*state, *order]), None)
    held = [one for own in records for one in _of_attributes(reference, own, noise)]
    return Found(first, held, held if first is None else (), state[1:]), counts


def _of_state(reference: Reference, records: Sequence[Record], rank: int) -> Iterator[Difference]:
    for record in records:
        other = reference.beside(record, 0) if record.kind == "restored" else None
        if other is not None:
            yield from _between(other, record, _SAME, rank)


def _of_attributes(
    reference: Reference, records: Sequence[Record], noise: Collection[tuple[str, str]]
) -> Iterator[Difference]:
    """Compare attributes that all ranks have the same, and that are no part of the loaders."""
    for record in records:
        other = reference.beside(record, 0) if record.kind == "restored" else None
        second = reference.beside(record, reference.size - 1)
        if other is None or second is None:
            continue
        shared = other.values.get("attributes", {}).items() & second.values["attributes"].items()
        names = {name for name, _ in shared}
        for one in _between(other, record, ("attributes",), 0):
            is_module = one.was.startswith(("tensor", "module", "stateful", "value"))
            if one.name in names and is_module and not _is_of_a_rank(one) and one.key not in noise:
                yield one


def _is_of_a_rank(one: Difference) -> bool:
    return one.name.startswith("dataloaders") or one.now == "nothing"


def _between(
    other: Record, record: Record, sections: Sequence[str], rank: int
) -> Iterator[Difference]:
    for section in sections:
        then, now = other.values.get(section, {}), record.values.get(section, {})
        for name in {**then, **now}:
            was, value = then.get(name, "nothing"), now.get(name, "nothing")
            if was != value:
                yield Difference(section, name, was, value, record.label, rank, True)


def _of_order(reference: Reference, records: Sequence[Sequence[Record]]) -> Iterator[Difference]:
    """Compare the samples that all ranks together train on in each update."""
    batches = [
        {one.place: one for one in own if one.kind == "batch" and " train " in one.place}
        for own in records
    ]
    for place, record in batches[0].items():
        now = [own[place] for own in batches if place in own]
        then = [reference.beside(record, rank) for rank in range(reference.size)]
        was, value = _samples(then), _samples(now)
        if was != value and was is not None:
            yield Difference(
                "indices", "the samples of an update", str(was), str(value), record.label
            )


def _samples(records: Sequence[Record | None]) -> list[int] | None:
    found: list[Any] = []
    for record in records:
        text = record.values["indices"].get("indices of the batch", "[]") if record else "[]"
        numbers = [
            int(one) for one in text.strip("[]").replace("[", "").split(", ") if one.isdigit()
        ]
        found += numbers
    return sorted(found) or None
