"""The commit records of the checkpoints in a folder: read, and whether a checkpoint has one."""

import logging
from collections.abc import Callable

from ..errors import CorruptCheckpoint, MissingCheckpoint, UnsupportedFormat
from ..format.manifest import Manifest
from ..format.seal import MAX_BYTES
from ..layout import COPY, MANIFEST, UNFINISHED, Position
from ..machine_errors import reading
from ..storage import Storage

logger = logging.getLogger(__name__)


def is_committed(storage: Storage, name: str) -> bool:
    """Whether a folder holds a manifest."""
    return storage.stamp(f"{name}/{MANIFEST}") is not None


def refuse_uncommitted(storage: Storage, name: str) -> None:
    """Refuse what can only be done with a committed checkpoint.

    Raises:
        MissingCheckpoint: there is none of that name.
    """
    if not is_committed(storage, name):
        raise MissingCheckpoint(f"{storage.describe(name)} is no committed checkpoint")


def read_manifest(storage: Storage, name: str, *, uncached: bool = False) -> Manifest:
    """Read the manifest of the checkpoint in folder `name`; with `uncached`, from the medium.

    Raises:
        MissingCheckpoint: there is no manifest, so the folder is no checkpoint.
        CorruptCheckpoint: it is damaged.
        UnsupportedFormat: it is of a version from the future.
        UnreadableCheckpoint: the storage refused.
    """
    return _read(storage, f"{name}/{MANIFEST}", Manifest.from_bytes, uncached)


def read_head(storage: Storage, name: str) -> Manifest:
    """Read a manifest without its tensors, in a fraction of the time; see `Manifest.head`.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return _read(storage, f"{name}/{MANIFEST}", Manifest.head)


def read_copy(storage: Storage, name: str, *, uncached: bool = False) -> Manifest:
    """Read the copy of the manifest in folder `name`.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return _read(storage, f"{name}/{COPY}", Manifest.from_bytes, uncached)


def good_copy(storage: Storage, name: str) -> Manifest | None:
    """Read the copy of a manifest; None if there is no good copy.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    try:
        copy = read_copy(storage, name)
    except (MissingCheckpoint, CorruptCheckpoint, UnsupportedFormat):
        return None
    return copy if Position.parse(name) in (None, copy.position) else None


def stand_in(storage: Storage, name: str) -> Manifest | None:
    """Read the copy of the manifest of a checkpoint that was committed and is not being deleted.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    is_there = storage.stamp(f"{name}/{MANIFEST}") is not None
    if not is_there and storage.stamp(f"{name}/{UNFINISHED}") is not None:
        return None
    return good_copy(storage, name)


def read_either(storage: Storage, name: str) -> Manifest:
    """Read the manifest, or its copy if the manifest is missing or damaged.

    Raises:
        CheckpointError: the error of the manifest, see `read_manifest`.
    """
    try:
        return read_manifest(storage, name)
    except (MissingCheckpoint, CorruptCheckpoint) as error:
        copy = stand_in(storage, name)
        if copy is None:
            raise
        logger.warning(
            "%s. Its copy %s is good, and is read instead: `checkpoint repair` puts it back",
            *(error, storage.describe(f"{name}/{COPY}")),
        )
        return copy


def _read(
    storage: Storage, file: str, take: Callable[[bytes], Manifest], uncached: bool = False
) -> Manifest:
    name, _, record = file.rpartition("/")
    stamp = storage.stamp(file)
    if stamp is None:
        raise MissingCheckpoint(
            f"{storage.describe(name)} holds no committed checkpoint: it has no {record}"
        )
    if stamp[0] > MAX_BYTES:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: it has {stamp[0]} bytes")
    try:
        with reading(storage.describe(file)):
            with storage.open(file, uncached=uncached) as opened:
                data = opened.readall()
            return take(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: {error}") from error
    except ValueError as error:
        raise type(error)(f"{storage.describe(file)} cannot be read: {error}") from error
