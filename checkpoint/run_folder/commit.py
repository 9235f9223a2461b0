"""Creates the folder of a checkpoint, and commits it: the manifest is written last."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..errors import CannotSave, CheckpointExists, UnreadableCheckpoint
from ..format.decode import RANKS
from ..format.digest import Digest
from ..format.manifest import Manifest
from ..format.safetensors_header import DTYPES
from ..format.tensor_index import Chunk, FileRecord, TensorRecord, WrittenFile
from ..layout import (
    COPY,
    MANIFEST,
    UNFINISHED,
    index_file,
)
from ..storage import Storage
from .deletion import best_effort
from .folder_contents import examine, quarantine
from .manifest_file import is_committed

logger = logging.getLogger(__name__)


def create_folder(storage: Storage, name: str) -> None:
    """Create the folder of a new checkpoint, marked as unfinished.

    It first deletes the rest of an interrupted save or deletion of that name. Any other folder
    without a manifest is renamed: it may be a checkpoint that lost its manifest, or a copy that is
    in progress.

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
    storage.new_marked_folder(name, UNFINISHED)


def _clear(storage: Storage, name: str) -> None:
    found = examine(storage, name)
    if found.may_be_deleted:
        storage.delete_marked_folder(name, UNFINISHED)
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
    """Commit the files in a folder as a checkpoint; return its manifest when it is durable.

    Args:
        storage: storage of the folder.
        name: name of the folder.
        draft: the manifest without tensors and files.
        written: all files of the checkpoint, of all ranks.
        check: raises CannotSave if this process no longer holds the lock, see `Lock.check`.

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
    # The copy comes first, so that the sync of the folder in `commit_while` covers its name. Its
    # bytes are not synced: a copy that a power cut spoilt is found by its own digest.
    best_effort(storage.write_unsynced, f"{name}/{COPY}", data)
    storage.commit_while(f"{name}/{MANIFEST}", data, check)
    # The mark does not count while the manifest is there, so a failure here does no harm now;
    # `folder_contents.tidy` removes an old mark.
    best_effort(storage.delete_unsynced, f"{name}/{UNFINISHED}")
    return manifest


def _in_order(records: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    return {
        key: replace(one, chunks=tuple(sorted(one.chunks, key=lambda chunk: chunk.offsets)))
        for key, one in records.items()
    }


def _write_index(
    storage: Storage, name: str, source: str, tensors: Mapping[str, TensorRecord]
) -> dict[str, FileRecord]:
    """Write the Hugging Face index of a source, if it has several files with whole tensors only."""
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
