"""Look for the newest committed checkpoint, for messages that say what is there."""

from pathlib import Path

from ..storage import Storage
from .catalog import Catalog, storage_of


def describe_newest(folder: str | Path | Storage) -> str:
    """Say which checkpoint is the newest committed one, from a look at the storage.

    The sentence is for the end of an error, so the look raises no `Exception` of its own.

    Args:
        folder: of the experiment, or the storage of its checkpoints.

    Returns:
        A sentence without a full stop. It says so if there is no checkpoint, or if the storage
        cannot be looked at.
    """
    storage = storage_of(folder)
    where = storage.describe()
    try:
        committed = Catalog(storage).committed()
    except Exception as error:
        return f"{where} could not be looked at ({error or type(error).__name__})"
    if not committed:
        return f"{where} holds no committed checkpoint"
    return f"The newest committed checkpoint is {storage.describe(committed[-1].name)}"
