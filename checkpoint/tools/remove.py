"""Delete checkpoints by hand, and refuse what would be regretted."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import CheckpointError
from ..layout import Position, is_quarantined
from ..run_folder import deletion
from ..run_folder.manifest_file import is_committed
from ..run_folder.pins import read_pins
from ..storage import Storage
from .scan import Scanner
from .verify import committed, total_size, verify_one


@dataclass(frozen=True)
class Removal:
    """What a deletion means.

    Attributes:
        names: the folders.
        freed: bytes that no other folder shares.
        obstacles: why it is not to be done, one sentence each.
    """

    names: tuple[str, ...]
    freed: int
    obstacles: tuple[str, ...]


def plan_removal(storage: Storage, names: Collection[str]) -> Removal:
    """Say what deleting these folders would free, and what speaks against it; touches nothing.

    Where the last good checkpoint might go, what would stay is read until a good one is found.

    Raises:
        CheckpointError: one of them is no checkpoint, whole or not.
    """
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        ours = Position.parse(name) is not None or is_quarantined(name)
        if not ours and not is_committed(storage, name):
            raise CheckpointError(
                f"{storage.describe(name)} is no checkpoint: delete it with other tools if you "
                "know what it is"
            )
    rest = [name for name in storage.folders() if name not in chosen]
    freed = total_size(storage, [*rest, *chosen]) - total_size(storage, rest)
    return Removal(chosen, freed, tuple(_obstacles(storage, chosen)))


def remove(storage: Storage, names: Collection[str]) -> None:
    """Delete these folders, the manifests first; the caller holds the storage's lock.

    Raises:
        CannotSave: the storage refused.
    """
    for name in names:
        deletion.delete(storage, name)


def _obstacles(storage: Storage, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        marks = read_pins(storage, name)
        if marks.pinned is not None:
            note = f" ({marks.pinned})" if marks.pinned else ""
            yield f"{name} is pinned{note}: `checkpoint unpin` it first"
        for by, where in marks.continued:
            yield f"{by} continued from {name}" + (f" ({where})" if where else "")
    whole = committed(storage)
    rest = [name for name in whole if name not in names]
    if len(rest) < len(whole) and not any(_is_good(storage, name) for name in reversed(rest)):
        yield "no good checkpoint of the experiment would be left"


def _is_good(storage: Storage, name: str) -> bool:
    return not verify_one(storage, name, Scanner()).damages
