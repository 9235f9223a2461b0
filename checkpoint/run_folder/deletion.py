"""Deletes a checkpoint or some of its sources: the manifest goes, or changes, first."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import CannotSave
from ..format.manifest import Manifest
from ..layout import COPY, MANIFEST, TEMPORARY, UNFINISHED, is_of_source
from ..storage import Storage

logger = logging.getLogger(__name__)


def delete(storage: Storage, name: str) -> None:
    """Delete a checkpoint; after the first step it is no longer a checkpoint.

    The manifest becomes the mark of an unfinished deletion. So the rest of an interrupted deletion
    is never taken for a checkpoint that lost its manifest.

    Raises:
        CannotSave: the storage refused.
    """
    storage.turn_into_mark(name, MANIFEST, UNFINISHED)
    storage.delete_marked_folder(name, UNFINISHED)


def drop_sources(storage: Storage, name: str, manifest: Manifest, kept: frozenset[str]) -> Manifest:
    """Delete the sources of a checkpoint that are not in `kept`; return its new manifest.

    The checkpoint is committed at every moment: first with the old manifest, then with the new one.

    Raises:
        CannotSave: the storage refused.
    """
    thinned = manifest.without(kept)
    # The copy must equal the manifest beside it, or be missing.
    best_effort(storage.delete_unsynced, f"{name}/{COPY}")
    data = thinned.to_bytes()
    storage.commit(f"{name}/{MANIFEST}", data)
    best_effort(storage.write_unsynced, f"{name}/{COPY}", data)
    # Files go after the new manifest is durable, so `manifest.json` never names a missing file.
    for file in leftovers(storage.files(name), thinned):
        storage.delete(f"{name}/{file}")
    return thinned


def leftovers(files: Iterable[str], manifest: Manifest) -> list[str]:
    """Return our files in a committed checkpoint that its manifest does not list.

    An interrupted `drop_sources` leaves such files.

    Args:
        files: names of the files in the folder.
        manifest: manifest of the checkpoint.
    """
    return [
        file
        for file in files
        if file.startswith(TEMPORARY)
        or (
            file not in manifest.files
            and any(is_of_source(file, source) for source in manifest.dropped)
        )
    ]


def best_effort(act: Callable[..., None], *arguments: Any) -> None:
    """Do a step that a checkpoint does not need; a failure is a warning."""
    try:
        act(*arguments)
    except CannotSave as error:
        logger.warning("The checkpoint is whole without this: %s", error)
