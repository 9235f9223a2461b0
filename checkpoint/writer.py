"""Write one checkpoint: everything durable first, the manifest last."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .codec import Json, encode
from .errors import (
    CannotSave,
    CheckpointError,
    CheckpointExists,
    UnreadableCheckpoint,
    UnsupportedState,
)
from .layout import MANIFEST, TEMPORARY, Position, tensor_file
from .manifest import Chunk, FileRecord, Manifest, TensorRecord
from .storage import LocalStorage, Storage
from .tensorfile import DTYPE_NAMES, TensorFile

Encoded = tuple[Json, dict[str, torch.Tensor], dict[str, str]]
"""A source's tree, its tensors by name, and the aliases among these."""


def save(
    storage: Storage,
    name: str,
    state: Mapping[str, Any],
    *,
    position: Position,
    reasons: tuple[str, ...] = (),
    info: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the state of all sources into folder `name` and commit it.

    Returns once the checkpoint is durable. Whatever happens before that leaves no checkpoint, and
    every other one as it was.

    Raises:
        UnsupportedState: a value that the format cannot hold; nothing was written.
        CheckpointExists: there is a committed checkpoint of that name.
        CannotSave: the storage refused, or another process is saving there; the partial folder is
            removed.
    """
    parts = encoded(state)
    with storage.saving():
        _make_room(storage, name)
        try:
            return _write(storage, name, parts, position, reasons, info or {})
        except BaseException:
            # Never acknowledged, so it must not count, not even when only the last fsync failed.
            with suppress(CheckpointError):
                delete(storage, name)
            raise


def encoded(state: Mapping[str, Any]) -> dict[str, Encoded]:
    """Turn each source into what is written of it.

    Raises:
        UnsupportedState: a value or a name that the format cannot hold.
    """
    for source in state:
        if type(source) is not str or not source.isprintable() or not source:
            raise UnsupportedState(f"{source!r} cannot be the name of a source")
    return {source: encode(source, value) for source, value in state.items()}


def save_checkpoint(
    path: Path, state: Mapping[str, Any], *, epoch: int, info: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint into a folder of the file system that does not exist yet; see `save`."""
    save(LocalStorage(path.parent), path.name, state, position=Position(epoch), info=info)


def _make_room(storage: Storage, name: str) -> None:
    try:
        if storage.stamp(f"{name}/{MANIFEST}") is not None:
            raise CheckpointExists(
                f"{storage.describe(name)} is committed already, and committed files never change: "
                "delete that checkpoint first if it is to be replaced"
            )
        # What an interrupted save of the same name has left.
        if name in storage.folders():
            storage.delete_folder(name)
    except UnreadableCheckpoint as error:
        raise CannotSave(f"cannot save into {storage.describe(name)}: {error}") from error
    storage.new_folder(name)


def _write(
    storage: Storage,
    name: str,
    parts: Mapping[str, Encoded],
    position: Position,
    reasons: tuple[str, ...],
    info: Mapping[str, Any],
) -> Manifest:
    files: dict[str, FileRecord] = {}
    records: dict[str, dict[str, TensorRecord]] = {}
    for source, (_, tensors, aliases) in parts.items():
        if tensors:
            file = tensor_file(source)
            content = TensorFile(tensors, aliases)
            storage.write(f"{name}/{file}", content.parts())
            files[file] = FileRecord(source, content.size, content.digest)
            records[source] = {
                key: TensorRecord(
                    DTYPE_NAMES[tensor.dtype],
                    tuple(tensor.shape),
                    (Chunk(file, (0,) * tensor.dim(), content.tensor_digests[key]),),
                )
                for key, tensor in tensors.items()
            }
    trees = {source: tree for source, (tree, _, _) in parts.items()}
    manifest = Manifest(position, reasons, trees, records, files, info)
    storage.commit(f"{name}/{MANIFEST}", manifest.to_bytes())
    return manifest


def delete(storage: Storage, name: str) -> None:
    """Delete a checkpoint: from the first moment on it is no checkpoint any more."""
    storage.delete(f"{name}/{MANIFEST}")
    storage.delete_folder(name)


def thin(storage: Storage, name: str, manifest: Manifest, kept: frozenset[str]) -> Manifest:
    """Drop sources from a committed checkpoint; it is complete, then thin, and never neither."""
    thinned = manifest.without(kept)
    storage.commit(f"{name}/{MANIFEST}", thinned.to_bytes())
    for file in leftovers(storage, name, thinned):
        storage.delete(f"{name}/{file}")
    return thinned


def leftovers(storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Files of ours in a committed checkpoint that it does not need: thinning was interrupted."""
    dropped = {tensor_file(source) for source in manifest.dropped} - manifest.files.keys()
    files = storage.files(name)
    return [file for file in files if file in dropped or file.startswith(TEMPORARY)]
