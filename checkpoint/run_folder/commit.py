"""Commit, thin and delete a checkpoint: the manifest comes last and goes first."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import CannotSave, CheckpointExists, UnreadableCheckpoint
from ..format.decode import RANKS
from ..format.digest import Digest
from ..format.manifest import Manifest
from ..format.safetensors_header import DTYPES
from ..format.tensor_index import Chunk, FileRecord, TensorRecord, WrittenFile
from ..layout import (
    COPY,
    MANIFEST,
    TEMPORARY,
    UNFINISHED,
    index_file,
    is_of_source,
)
from ..storage import Storage, commit_while, marking
from .folder_contents import examine, quarantine
from .manifest_file import is_committed

logger = logging.getLogger(__name__)


def create_folder(storage: Storage, name: str) -> None:
    """Make the folder of a new checkpoint, marked as unfinished.

    What an interrupted save or deletion of that name left goes. Anything else without a manifest is
    set aside: it may be a checkpoint whose manifest was lost, or a copy that is in progress.

    Raises:
        CheckpointExists: there is a committed checkpoint of that name.
        CannotSave: the storage refused.
    """
    refuse_committed(storage, name)
    try:
        if name in storage.folders():
            _clear(storage, name)
    except UnreadableCheckpoint as error:
        raise CannotSave(f"cannot save into {storage.describe(name)}: {error}") from error
    marking.new_marked_folder(storage, name, UNFINISHED)


def _clear(storage: Storage, name: str) -> None:
    found = examine(storage, name)
    if found.may_be_deleted:
        marking.delete_marked_folder(storage, name, UNFINISHED)
    else:
        new = storage.describe(quarantine(storage, name))
        logger.warning("%s. It was set aside as %s", found.what, new)


def refuse_committed(storage: Storage, name: str) -> None:
    """Refuse to save where a committed checkpoint is.

    Raises:
        CheckpointExists, CannotSave: see `create_folder`.
    """
    try:
        is_there = is_committed(storage, name)
    except UnreadableCheckpoint as error:
        raise CannotSave(f"cannot save into {storage.describe(name)}: {error}") from error
    if is_there:
        raise CheckpointExists(
            f"{storage.describe(name)} is committed already, and committed files never change: "
            "delete that checkpoint first if it is to be replaced"
        )


def commit(
    storage: Storage,
    name: str,
    draft: Manifest,
    written: Iterable[WrittenFile],
    check: Callable[[], None],
) -> Manifest:
    """Make a checkpoint of the files in a folder; return its manifest once that is durable.

    Args:
        storage: where it is.
        name: the folder.
        draft: the manifest without tensors and files.
        written: all files of it.
        check: raises CannotSave when this process must not commit any more, see `Lock.check`.

    Raises:
        CannotSave: the storage refused, or `check` did.
    """
    files: dict[str, FileRecord] = {}
    records: dict[str, dict[str, TensorRecord]] = {}
    for file in written:
        files[file.name] = file.record
        of_source = records.setdefault(file.record.source, {})
        for key, one in file.tensors.items():
            before = of_source[key].chunks if key in of_source else ()
            chunk = Chunk(file.name, one.offsets, one.part, one.digest)
            of_source[key] = TensorRecord(one.dtype, one.shape, (*before, chunk))
    tensors = {source: _in_order(of_source) for source, of_source in records.items()}
    for source, of_source in tensors.items():
        tree = draft.sources[source]
        if not (isinstance(tree, dict) and RANKS in tree):
            files |= _write_index(storage, name, source, of_source)
    manifest = replace(draft, tensors=tensors, files=files)
    data = manifest.to_bytes()
    _best_effort(marking.write_unsynced, storage, f"{name}/{COPY}", data)
    commit_while(storage, f"{name}/{MANIFEST}", data, check)
    _best_effort(marking.delete_unsynced, storage, f"{name}/{UNFINISHED}")
    return manifest


def _best_effort(act: Callable[..., None], *arguments: Any) -> None:
    """Do what a checkpoint is whole without."""
    try:
        act(*arguments)
    except CannotSave as error:
        logger.warning("The checkpoint is whole without this: %s", error)


def _in_order(records: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    return {
        key: replace(one, chunks=tuple(sorted(one.chunks, key=lambda chunk: chunk.offsets)))
        for key, one in records.items()
    }


def _write_index(
    storage: Storage, name: str, source: str, tensors: Mapping[str, TensorRecord]
) -> dict[str, FileRecord]:
    """Write which file has which tensor, if there are several and each has whole ones only."""
    where: dict[str, str] = {}
    for key, record in tensors.items():
        if not record.is_whole:
            return {}
        where[key] = record.chunks[0].file
    if len(set(where.values())) == 1:
        return {}
    size = sum(math.prod(one.shape) * DTYPES[one.dtype].itemsize for one in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    data = json.dumps(index, indent=2).encode()
    storage.write(f"{name}/{index_file(source)}", [data])
    return {index_file(source): FileRecord(source, len(data), str(Digest(data)))}


def delete(storage: Storage, name: str) -> None:
    """Delete a checkpoint: from the first moment on it is no checkpoint any more.

    The manifest becomes the mark of the deletion, so that what an interrupted deletion leaves is
    never taken for a checkpoint that lost its manifest.
    """
    marking.turn_into_mark(storage, name, MANIFEST, UNFINISHED)
    marking.delete_marked_folder(storage, name, UNFINISHED)


def drop_sources(storage: Storage, name: str, manifest: Manifest, kept: frozenset[str]) -> Manifest:
    """Drop sources from a committed checkpoint; it is complete, then thin, and never neither."""
    thinned = manifest.without(kept)
    # A copy is that of the manifest beside it, or is not there.
    _best_effort(marking.delete_unsynced, storage, f"{name}/{COPY}")
    data = thinned.to_bytes()
    storage.commit(f"{name}/{MANIFEST}", data)
    _best_effort(marking.write_unsynced, storage, f"{name}/{COPY}", data)
    for file in leftovers(storage.files(name), thinned):
        storage.delete(f"{name}/{file}")
    return thinned


def leftovers(files: Iterable[str], manifest: Manifest) -> list[str]:
    """Files of ours in a committed checkpoint that it does not need: thinning was interrupted.

    Args:
        files: what lies in its folder.
        manifest: what the checkpoint says of itself.
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
