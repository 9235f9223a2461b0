"""Marked folders, and small files without a sync: what a storage may do better than by its basics.

A mark is an empty or small file in a folder that says that work on the folder has begun and not
ended. A storage that has a method of the name of one of these functions does it by that; all others
do it by the operations that every `Storage` has, which may sync more often.
"""

from contextlib import suppress

from ..errors import CannotSave, CheckpointError
from .protocol import Storage


def new_marked_folder(storage: Storage, folder: str, mark: str) -> None:
    """Make a folder with an empty file `mark`, which is there durably whenever the folder is.

    Raises:
        CannotSave: the folder exists, or the storage refused.
    """
    if own := getattr(storage, "new_marked_folder", None):
        own(folder, mark)
        return
    storage.new_folder(folder)
    try:
        storage.write(f"{folder}/{mark}", [])
    except BaseException:
        with suppress(CheckpointError):
            storage.delete_folder(folder)
        raise


def write_unsynced(storage: Storage, name: str, data: bytes) -> None:
    """Write a small file that must not exist yet; after a loss of power it may hold anything.

    Raises:
        CannotSave: the name is taken, or the storage refused.
    """
    if own := getattr(storage, "write_unsynced", None):
        own(name, data)
    else:
        storage.write(name, [data])


def delete_unsynced(storage: Storage, name: str) -> None:
    """Delete one file, durably once the folder is synced; fine when the file is gone already.

    Raises:
        CannotSave: the storage refused.
    """
    (getattr(storage, "delete_unsynced", None) or storage.delete)(name)


def turn_into_mark(storage: Storage, folder: str, file: str, mark: str) -> None:
    """Delete a file durably, and leave a mark in the folder: both happen, or neither.

    Fine when the file, or the folder, is gone already.

    Raises:
        CannotSave: the storage refused.
    """
    if own := getattr(storage, "turn_into_mark", None):
        own(folder, file, mark)
        return
    if storage.files(folder) and storage.stamp(f"{folder}/{mark}") is None:
        with suppress(CannotSave):
            # A full disk must not keep a deletion from making room.
            storage.write(f"{folder}/{mark}", [])
    storage.delete(f"{folder}/{file}")


def delete_marked_folder(storage: Storage, folder: str, mark: str) -> None:
    """Delete a folder with all its files; the mark goes once all others are gone durably.

    Fine when the folder is gone already.

    Raises:
        CannotSave: the storage refused.
    """
    if own := getattr(storage, "delete_marked_folder", None):
        own(folder, mark)
    else:
        storage.delete_folder(folder)
