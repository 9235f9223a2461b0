"""A folder gets another name, also where the file system refuses to rename folders."""

import logging

from ..errors import CannotSave, CheckpointError, MissingCheckpoint
from ..format.safetensors_reader import read_blocks
from ..layout import MANIFEST
from ..storage import Storage
from .deletion import delete

logger = logging.getLogger(__name__)


def move_folder(storage: Storage, folder: str, new: str) -> None:
    """Give a folder a name that is still free.

    Some file systems refuse that, such as overlays for a folder of a lower layer. Then each file
    gets a second name in a new folder, the manifest last, and the old folder is deleted, its
    manifest first. So one of the folders has all files at any time, whenever the process is killed.

    Raises:
        CannotSave: the storage refused both; the folder is as it was.
        UnreadableCheckpoint: the storage cannot be looked at.
    """
    try:
        storage.rename_folder(folder, new)
        return
    except CannotSave as error:
        refusal = error
    if {folder, new}.intersection(storage.folders()) == {new}:
        # The last step failed, which makes the new name durable.
        logger.warning("%s may have its old name again after a power cut: %s", new, refusal)
        return
    logger.info("Moving file by file: %s", refusal)
    try:
        _copy_folder(storage, folder, new)
    except CheckpointError as error:
        raise CannotSave(
            f"{refusal}. It could not be moved file by file either: {error}"
        ) from refusal
    _delete_old(storage, folder)


def _copy_folder(storage: Storage, folder: str, new: str) -> None:
    storage.new_folder(new)
    try:
        # A folder without a manifest is no checkpoint.
        for file in sorted(storage.files(folder), key=MANIFEST.__eq__):
            _copy(storage, f"{folder}/{file}", f"{new}/{file}")
    except BaseException:
        try:
            storage.delete_folder(new)
        except CheckpointError as error:
            logger.warning("Could not remove what is of no use: %s", error)
        raise


def _copy(storage: Storage, file: str, new: str) -> None:
    if storage.link(file, new, replace=True):
        return
    with storage.open(file) as opened:
        storage.replace(new, read_blocks(opened))


def _delete_old(storage: Storage, folder: str) -> None:
    try:
        delete(storage, folder)
    except (CannotSave, MissingCheckpoint) as error:
        logger.warning("Could not delete what was moved: %s", error)
