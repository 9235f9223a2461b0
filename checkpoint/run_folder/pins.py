"""Pins: small files in the folder of a checkpoint that keep it from being deleted.

A user writes `pinned`; a run that continued from the checkpoint writes `continued-by-NAME`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from ..errors import CheckpointError
from ..format.digest import Digest
from ..storage import LocalStorage, Storage
from .file_names import longest_name
from .manifest_file import refuse_uncommitted

PINNED = "pinned"
_CONTINUED = "continued-by-"
_MAX_NOTE = 4096  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pins:
    """The pins of a checkpoint.

    Attributes:
        pinned: note of the user's pin, which may be empty; None if there is no such pin.
        continued: name and full path of each run that continued from it.
    """

    pinned: str | None = None
    continued: tuple[tuple[str, str], ...] = ()


def is_pin(file: str) -> bool:
    """Whether a file name in the folder of a checkpoint is that of a pin."""
    return file == PINNED or file.startswith(_CONTINUED)


def read_pins(storage: Storage, name: str, files: Sequence[str] | None = None) -> Pins:
    """Read the pins of a checkpoint; a pin that cannot be read counts, with an empty note.

    Args:
        storage: storage of the checkpoint.
        name: name of its folder.
        files: names of the files in the folder, if they are known.
    """
    files = storage.files(name) if files is None else files
    return Pins(
        pinned=_note(storage, f"{name}/{PINNED}") if PINNED in files else None,
        continued=tuple(
            (unquote(file.removeprefix(_CONTINUED)), _note(storage, f"{name}/{file}"))
            for file in sorted(files)
            if file.startswith(_CONTINUED)
        ),
    )


def may_be_there(where: str) -> bool:
    """Whether the folder of a run may exist; it may if its disk is not mounted."""
    path = Path(where)
    if not path.is_absolute():
        return True
    try:
        return path.exists() or not path.parent.exists()
    except (OSError, ValueError):
        return True


def pin(storage: Storage, name: str, note: str = "") -> None:
    """Keep a checkpoint until it is unpinned; a new note replaces the old one.

    Raises:
        MissingCheckpoint: there is no committed checkpoint of that name.
        CannotSave: the storage refused.
    """
    _mark(storage, name, PINNED, note)


def unpin(storage: Storage, name: str) -> None:
    """Remove the user's pin, so that the rules decide again."""
    storage.delete(f"{name}/{PINNED}")


def pin_parent(storage: Storage, name: str, by: str, where: str) -> None:
    """Keep a checkpoint as long as the run that continued from it exists.

    Args:
        storage: where the checkpoint lies.
        name: its folder.
        by: name of the other run, such as its signature.
        where: full path of the other run.

    Raises:
        MissingCheckpoint, CannotSave: see `pin`.
    """
    _mark(storage, name, _mark_of(by, longest_name(storage)), where)


def pin_as_parent(path: str | Path, *, by: str, where: str) -> None:
    """Pin the checkpoint in a folder of the file system, also through a link to that folder.

    Raises:
        MissingCheckpoint, CannotSave: see `pin`.
    """
    path = Path(path).resolve()
    pin_parent(LocalStorage(path.parent), path.name, by, where)


def _mark_of(by: str, longest: int) -> str:
    """Return the name of the file; if the name of the run is too long, it ends in a digest."""
    file = _CONTINUED + quote(by, safe="")
    if len(file) <= longest:
        return file
    end = f"~{Digest(by.encode()).raw().hex()}"
    return file[: longest - len(end)] + end


def _mark(storage: Storage, name: str, file: str, note: str) -> None:
    refuse_uncommitted(storage, name)
    try:
        storage.commit(f"{name}/{file}", note.encode()[:_MAX_NOTE])
    finally:
        # A run may delete the checkpoint meanwhile, and then deletes the new pin with it.
        refuse_uncommitted(storage, name)


def _note(storage: Storage, file: str) -> str:
    try:
        with storage.open(file) as opened:
            data = opened.read(_MAX_NOTE)
    except (CheckpointError, OSError, MemoryError) as error:
        _warn_once(storage.describe(file), str(error) or type(error).__name__)
        return ""
    return (data or b"").decode(errors="replace").strip()


@cache
def _warn_once(path: str, why: str) -> None:
    logger.warning("The note in %s cannot be read: %s. It keeps its checkpoint anyway", path, why)
