"""Delete an experiment with all its checkpoints, if no process runs it and no mark keeps any."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CannotSave, CheckpointError
from ..layout import CHECKPOINTS, Position
from ..run_folder import deletion
from ..run_folder.pins import may_be_there, read_pins
from ..storage import LocalStorage, locked
from ..storage.lock import LOCK


def refuse_to_clear(folder: Path, *, ask_lock: bool = True) -> None:
    """Refuse if the experiment in a folder is not to be cleared; delete nothing.

    Args:
        folder: of the experiment; it need not exist.
        ask_lock: whether to refuse while another process holds the lock of the experiment.

    Raises:
        CannotSave: another process runs the experiment; the message names the process.
        CheckpointError: checkpoints are pinned, or other runs continued from them; the message
            lists them and says what to do.
    """
    if not folder.exists():
        return
    storage = LocalStorage(folder / CHECKPOINTS)
    _refuse_marked(folder, storage)
    if ask_lock:
        with _named(folder), locked(storage):
            pass


def clear_experiment(folder: Path) -> None:
    """Delete the folder of an experiment, and hold its lock meanwhile.

    The checkpoints go last, and the newest of them goes last: a run that starts after an
    interruption goes on from that one. A run that starts meanwhile is refused by the lock.

    Raises:
        CheckpointError: see `refuse_to_clear`.
        CannotSave: a file could not be deleted.
    """
    if not folder.exists():
        return
    storage = LocalStorage(folder / CHECKPOINTS)
    with _named(folder), locked(storage):
        _refuse_marked(folder, storage)
        for entry in _entries(folder):
            if entry != storage.root:
                _delete(entry)
        for name in sorted(storage.folders(), key=_age):
            # A folder that holds another folder stays, with its mark and that inner folder: its
            # files are deleted, and the loop over `_entries` below deletes the rest.
            with suppress(CannotSave):
                deletion.delete(storage, name)
        for entry in _entries(storage.root):
            if entry.name != LOCK:
                _delete(entry)
        _delete(storage.root / LOCK)
        # The lock file is gone, so a run may start now and make files here: those folders stay.
        for one in (storage.root, folder):
            with suppress(OSError):
                one.rmdir()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Say in an error which experiment was to be cleared."""
    try:
        yield
    except OSError as error:
        raise CannotSave(f"cannot clear {folder}: {error}") from error


def _refuse_marked(folder: Path, storage: LocalStorage) -> None:
    obstacles = [one for name in sorted(storage.folders()) for one in _obstacles(storage, name)]
    if obstacles:
        raise CheckpointError(f"cannot clear {folder}: {'; '.join(obstacles)}")


def _obstacles(storage: LocalStorage, name: str) -> Iterator[str]:
    marks, where = read_pins(storage, name), storage.describe(name)
    if marks.pinned is not None:
        note = f" ({marks.pinned})" if marks.pinned else ""
        yield f"{where} is pinned{note}: `checkpoint unpin {where}`, or move that folder away"
    for by, place in marks.continued:
        if may_be_there(place):
            yield (
                f"{by} continued from {where} and may be there ({place}): delete {by} first, or "
                f"move that folder away, or `checkpoint rm --force {where}`"
            )


def _age(name: str) -> tuple[bool, tuple[float, ...]]:
    """Sort key: folders whose names are not positions first, then positions, oldest first."""
    position = Position.parse(name)
    return position is not None, () if position is None else position.order


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
