"""Finds out what a folder without `manifest.json` holds: an unfinished save, or a lost manifest.

During a save or a deletion, a folder holds the mark `.tmp-unfinished`. Any other folder with files
was committed and lost its `manifest.json`, or a copy of it is in progress, or an older version of
this code was interrupted in it. Only folders with a mark are deleted.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ..errors import (
    CannotSave,
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
    UnsupportedFormat,
)
from ..format.manifest import Manifest
from ..format.tensor_index import FileRecord
from ..layout import (
    COPY,
    MANIFEST,
    TEMPORARY,
    UNFINISHED,
    Position,
    quarantine_name,
)
from ..storage import Storage
from .manifest_file import good_copy, read_head, stand_in
from .move_folder import move_folder

_SHOWN = 4  # names in a message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderContents:
    """The contents of a folder.

    Attributes:
        where: full path of the folder.
        kind: `committed`: it has a manifest. `nothing`: it is empty, missing, or holds only
            temporary files. `unfinished`: its save or deletion was interrupted, or is in progress.
            `recoverable`: it lost only its manifest and has a good copy of that. `lost`: all other
            cases.
        what: the same as a sentence, with what to do.
    """

    where: str
    kind: Literal["committed", "nothing", "unfinished", "recoverable", "lost"]
    what: str = ""

    @property
    def may_be_deleted(self) -> bool:
        """Whether the folder cannot hold bytes of a committed checkpoint."""
        return self.kind in ("nothing", "unfinished")


def examine(storage: Storage, name: str) -> FolderContents:
    """Look into a folder.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    where, files = storage.describe(name), sorted(storage.files(name))
    if MANIFEST in files:
        return FolderContents(where, "committed")
    if UNFINISHED in files:
        return FolderContents(where, "unfinished", _unfinished(storage, name))
    if all(file.startswith(TEMPORARY) for file in files):
        return FolderContents(where, "nothing")
    copy = good_copy(storage, name)
    if copy is None:
        held = f"it holds {_few(files)}"
    elif gone := _lacking(storage, name, copy.files):
        held = f"it lacks {_few(gone)} too"
    else:
        what = f"{where} has no {MANIFEST}, and its copy {COPY} is good"
        return FolderContents(where, "recoverable", what)
    what = (
        f"{where} has no {MANIFEST}, and no save or deletion of it was interrupted; {held}. A copy "
        f"of this folder may be in progress, or files were lost: copy the folder again, or put "
        f"{MANIFEST} back from a backup"
    )
    return FolderContents(where, "lost", what)


def files_gone(storage: Storage, name: str) -> list[str] | None:
    """Name the missing files of a checkpoint; None if the folder is not a checkpoint any more.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    if examine(storage, name).kind not in ("committed", "recoverable"):
        return None
    with suppress(CorruptCheckpoint, MissingCheckpoint, UnsupportedFormat):
        return [
            file
            for file in read_head(storage, name).files
            if storage.stamp(f"{name}/{file}") is None
        ]
    return []


def needs_copy(storage: Storage, name: str) -> bool:
    """Whether the manifest of a checkpoint is damaged or missing, and its copy is good.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    try:
        _head(storage, name)
    except (CorruptCheckpoint, MissingCheckpoint):
        return stand_in(storage, name) is not None
    except CheckpointError:
        pass
    return False


def put_back(storage: Storage, name: str) -> bool:
    """Restore a manifest from its copy, durably; a warning reports that, or why it failed.

    The caller holds the lock of the storage, and has asked `needs_copy` or `examine`.
    """
    file = storage.describe(f"{name}/{MANIFEST}")
    try:
        storage.commit(f"{name}/{MANIFEST}", _bytes(storage, f"{name}/{COPY}"))
    except (CannotSave, MissingCheckpoint) as error:
        logger.warning("%s could not be put back from its copy: %s", file, error)
        return False
    logger.warning("%s was missing or damaged: it was put back from its copy %s", file, COPY)
    return True


def renew_copy(storage: Storage, name: str) -> None:
    """Copy the manifest to its copy again; a failure is a warning."""
    file = f"{name}/{COPY}"
    try:
        data = _bytes(storage, f"{name}/{MANIFEST}")
        storage.delete_unsynced(file)
        storage.write_unsynced(file, data)
    except CheckpointError as error:
        logger.warning("%s has no copy: %s", storage.describe(f"{name}/{MANIFEST}"), error)


def tidy(storage: Storage, name: str) -> None:
    """Renew the copy of the manifest of a good checkpoint, and remove an old mark.

    A power cut after a save can leave the copy cut short, and the mark in the folder.
    """
    try:
        files = storage.files(name)
        if UNFINISHED in files:
            storage.delete_unsynced(f"{name}/{UNFINISHED}")
        is_stale = COPY in files and not _is_same(storage, f"{name}/{COPY}", f"{name}/{MANIFEST}")
    except CheckpointError as error:
        logger.info("%s is good, and could not be tidied: %s", storage.describe(name), error)
    else:
        if is_stale:
            copy = storage.describe(f"{name}/{COPY}")
            logger.warning("%s is damaged or old: it is made anew from %s", copy, MANIFEST)
            renew_copy(storage, name)


def quarantine(storage: Storage, name: str) -> str:
    """Rename a folder out of the way of new checkpoints; return its new name.

    Raises:
        CannotSave, UnreadableCheckpoint: the storage refused.
    """
    taken = set(storage.folders())
    attempt = 0
    while quarantine_name(name, attempt) in taken:
        attempt += 1
    new = quarantine_name(name, attempt)
    move_folder(storage, name, new)
    return new


def _lacking(storage: Storage, name: str, files: Mapping[str, FileRecord]) -> list[str]:
    """Name the files that are missing or have the wrong size."""
    stamps = {file: storage.stamp(f"{name}/{file}") for file in files}
    return [file for file, stamp in stamps.items() if stamp is None or stamp[0] != files[file].size]


def _bytes(storage: Storage, file: str) -> bytes:
    with storage.open(file) as opened:
        return opened.readall()


def _is_same(storage: Storage, file: str, other: str) -> bool:
    sizes = [(storage.stamp(one) or (0, 0))[0] for one in (file, other)]
    return sizes[0] == sizes[1] and _bytes(storage, file) == _bytes(storage, other)


def _head(storage: Storage, name: str) -> Manifest:
    head = read_head(storage, name)
    if Position.parse(name) not in (None, head.position):
        raise CorruptCheckpoint(f"it is that of {head.position.name}")
    return head


def _unfinished(storage: Storage, name: str) -> str:
    # A deletion renames the manifest to the mark; a save creates an empty mark.
    stamp = storage.stamp(f"{name}/{UNFINISHED}")
    what = "deletion" if stamp is not None and stamp[0] else "save"
    before = "" if what == "deletion" else " before its commit"
    return f"{storage.describe(name)} has no {MANIFEST}: its {what} was interrupted{before}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
