"""Whether a folder holds a committed checkpoint: it does once it has a manifest."""

from ..errors import MissingCheckpoint
from ..layout import MANIFEST
from ..storage import Storage


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
