"""Read one committed checkpoint: the manifest, then files, each byte checked before it is used."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .codec import decode
from .errors import CorruptCheckpoint, MissingCheckpoint, UnreadableCheckpoint, UnsupportedFormat
from .layout import MANIFEST
from .manifest import MAX_BYTES, FileRecord, Manifest
from .storage import LocalStorage, Storage
from .tensorfile import DTYPE_NAMES, DTYPES, read_tensors


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        state: the state of each source by name; tensors lie on the CPU.
        manifest: what the checkpoint says of itself.
        where: full path of its folder.
    """

    state: dict[str, Any]
    manifest: Manifest
    where: str


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read the commit record of the checkpoint in folder `name`.

    Raises:
        MissingCheckpoint: there is none, so no checkpoint either.
        CorruptCheckpoint: it is damaged.
        UnsupportedFormat: it is of a version from the future.
        UnreadableCheckpoint: the storage refused.
    """
    file = f"{name}/{MANIFEST}"
    stamp = storage.stamp(file)
    if stamp is None:
        raise MissingCheckpoint(
            f"{storage.describe(name)} holds no committed checkpoint: it has no {MANIFEST}"
        )
    if stamp[0] > MAX_BYTES:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: it has {stamp[0]} bytes")
    try:
        with storage.open(file) as opened:
            data = opened.readall()
        return Manifest.from_bytes(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: {error}") from error
    except ValueError as error:
        raise type(error)(f"{storage.describe(file)} cannot be read: {error}") from error


def load(
    storage: Storage,
    name: str,
    sources: Collection[str] | None = None,
    without: Collection[str] = (),
) -> Loaded:
    """Read a checkpoint, or only some of its sources, and verify what is read.

    Args:
        storage: where it lies.
        name: its folder.
        sources: names of the sources to read; None for all. Names that it lacks are skipped.
        without: names of sources that are not read.

    Raises:
        MissingCheckpoint: there is no committed checkpoint.
        CorruptCheckpoint: a file is missing or damaged; the message names it.
        UnsupportedFormat: it holds tensors of a dtype that this code does not know.
        UnreadableCheckpoint: the storage refused, or memory is short.
    """
    manifest = read_manifest(storage, name)
    wanted = [s for s in manifest.sources if (sources is None or s in sources) and s not in without]
    state = {source: _load_source(storage, name, manifest, source) for source in wanted}
    return Loaded(state, manifest, storage.describe(name))


def load_checkpoint(path: Path, sources: Collection[str] | None = None) -> Loaded:
    """Read the checkpoint in a folder of the file system; see `load`."""
    return load(LocalStorage(path.parent), path.name, sources)


def _load_source(storage: Storage, name: str, manifest: Manifest, source: str) -> Any:
    expected = manifest.tensors.get(source, {})
    for key, one in expected.items():
        if one.dtype not in DTYPES:
            raise UnsupportedFormat(
                f"{storage.describe(name)} cannot be read: its tensor {key!r} of source {source!r} "
                f"is of dtype {one.dtype!r}, and this code reads {', '.join(DTYPES)}"
            )
    tensors: dict[str, torch.Tensor] = {}
    for file, record in manifest.files.items():
        if record.source == source:
            count = sum(chunk.file == file for one in expected.values() for chunk in one.chunks)
            tensors.update(_load_file(storage, f"{name}/{file}", record, count))
    described = {key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
    if described != {key: (record.dtype, record.shape) for key, record in expected.items()}:
        raise CorruptCheckpoint(
            f"{storage.describe(name)} is damaged: the tensors of source {source!r} are not those "
            f"that its {MANIFEST} lists"
        )
    try:
        return decode(source, manifest.sources[source], tensors)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            f"{storage.describe(name)}/{MANIFEST} is damaged: {error}"
        ) from error


def _load_file(
    storage: Storage, file: str, record: FileRecord, count: int
) -> dict[str, torch.Tensor]:
    where = storage.describe(file)
    try:
        stamp = storage.stamp(file)
        if stamp is not None and stamp[0] != record.size:
            raise CorruptCheckpoint(f"it has {stamp[0]} bytes instead of {record.size}")
        with storage.open(file) as opened:
            tensors, found = read_tensors(opened, record.size, count)
    except MissingCheckpoint as error:
        raise CorruptCheckpoint(f"a file of the checkpoint is missing: {error}") from error
    except (CorruptCheckpoint, UnsupportedFormat) as error:
        # Of dtypes that the manifest does not list: damage, and not the future.
        raise CorruptCheckpoint(f"{where} is damaged: {error}") from error
    except MemoryError as error:
        raise UnreadableCheckpoint(f"cannot read {where}: {error or 'out of memory'}") from error
    if found != record.digest:
        raise CorruptCheckpoint(
            f"{where} is damaged: its digest is {found} instead of {record.digest}"
        )
    return tensors
