"""Write one checkpoint: everything durable first, the manifest last."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .codec import RANKS, Encoded, Json, encode, rank_key
from .errors import (
    CannotSave,
    CheckpointError,
    CheckpointExists,
    UnreadableCheckpoint,
    UnsupportedState,
)
from .layout import MANIFEST, TEMPORARY, Position, is_of_source, tensor_file
from .manifest import Chunk, FileRecord, Manifest, TensorRecord
from .ranks import ALONE, PerRank, Ranks, is_sharded, whole
from .storage import LocalStorage, Storage
from .tensorfile import DTYPE_NAMES, Digest, TensorFile, tensor_bytes


def save(
    storage: Storage,
    name: str,
    state: Mapping[str, Any],
    *,
    position: Position,
    reasons: tuple[str, ...] = (),
    info: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Manifest | None:
    """Write the state of all sources into folder `name` and commit it; all ranks call it.

    The caller holds the storage's lock.

    Returns once the checkpoint is durable, with its manifest on rank 0. Whatever happens before
    that, on any rank, leaves no checkpoint, and every other one as it was.

    Raises:
        UnsupportedState: a value that the format cannot hold; nothing was written.
        CheckpointExists: there is a committed checkpoint of that name.
        CannotSave: the storage refused, or another process is saving there; the partial folder is
            removed.
    """
    parts = ranks.together(lambda: encoded(state, ranks))
    draft = Manifest(position, reasons, {}, {}, {}, info or {}, world_size=ranks.size)
    ranks.first(lambda: _make_room(storage, name))
    try:
        if ranks.size > 1:
            from .sharded import write_shards

            return write_shards(storage, name, parts, draft, ranks)
        return _write(storage, name, parts, draft)
    except BaseException:
        # Never acknowledged, so it must not count, not even when only the last fsync failed.
        if ranks.is_first:
            with suppress(CheckpointError):
                delete(storage, name)
        raise


def encoded(state: Mapping[str, Any], ranks: Ranks = ALONE) -> dict[str, Encoded]:
    """Turn each source into what is written of it.

    Raises:
        UnsupportedState: a value or a name that the format cannot hold.
    """
    for source in state:
        if type(source) is not str or not source.isprintable() or not source:
            raise UnsupportedState(f"{source!r} cannot be the name of a source")
    return {source: _encoded(source, value, ranks) for source, value in state.items()}


def _encoded(source: str, value: Any, ranks: Ranks) -> Encoded:
    if not isinstance(value, PerRank):
        return encode(source, value)
    if ranks.size == 1:
        return encode(source, value.value)
    # Under a key of its own, so that the names of the tensors say whose they are.
    own = rank_key(ranks.rank)
    tree, tensors, aliases = encode(source, {own: value.value})
    return {RANKS: [tree[own]]}, tensors, aliases  # type: ignore[index,call-overload]


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each source, of all that this rank has whole.

    Args:
        state: by source, as `save` takes it.

    Raises:
        UnsupportedState: a value or a name that the format cannot hold.
    """
    return {name: _digest(*part) for name, part in encoded(state).items()}


def _digest(tree: Json, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> str:
    digest = Digest(json.dumps([tree, aliases]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        if not is_sharded(tensor):
            digest.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return str(digest)


def save_checkpoint(
    path: Path, state: Mapping[str, Any], *, epoch: int, info: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint into a folder of the file system that does not exist yet; see `save`."""
    storage = LocalStorage(path.parent)
    lock = storage.lock()
    try:
        save(storage, path.name, state, position=Position(epoch), info=info)
    finally:
        lock.release()


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
    draft: Manifest,
) -> Manifest:
    files: dict[str, FileRecord] = {}
    records: dict[str, dict[str, TensorRecord]] = {}
    for source, (_, tensors, aliases) in parts.items():
        if tensors:
            file = tensor_file(source)
            tensors = {key: whole(tensor) for key, tensor in tensors.items()}
            content = TensorFile(tensors, aliases)
            storage.write(f"{name}/{file}", content.parts())
            files[file] = FileRecord(source, content.size, content.digest)
            records[source] = {
                key: _record(file, tensor, content.tensor_digests[key])
                for key, tensor in tensors.items()
            }
    trees = {source: tree for source, (tree, _, _) in parts.items()}
    manifest = replace(draft, sources=trees, tensors=records, files=files)
    storage.commit(f"{name}/{MANIFEST}", manifest.to_bytes())
    return manifest


def _record(file: str, tensor: torch.Tensor, digest: str) -> TensorRecord:
    shape = tuple(tensor.shape)
    chunk = Chunk(file, (0,) * len(shape), shape, digest)
    return TensorRecord(DTYPE_NAMES[tensor.dtype], shape, (chunk,))


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
    return [
        file
        for file in storage.files(name)
        if file.startswith(TEMPORARY)
        or (
            file not in manifest.files
            and any(is_of_source(file, source) for source in manifest.dropped)
        )
    ]
