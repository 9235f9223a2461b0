"""Read one committed checkpoint: the manifest, then files, each byte checked before it is used."""

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .codec import RANKS, Json, decode, encode, rank_key
from .errors import CorruptCheckpoint, MissingCheckpoint, UnreadableCheckpoint, UnsupportedFormat
from .layout import MANIFEST
from .manifest import MAX_BYTES, Manifest
from .ranks import ALONE, Ranks, is_sharded
from .records import Chunk, FileRecord, TensorRecord
from .storage import LocalStorage, Storage
from .tensorfile import (
    DTYPE_NAMES,
    DTYPES,
    Header,
    Readable,
    read_header,
    read_tensor,
    read_tensors,
)
from .zstd import Decompressed, check_known


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


def read_manifest(storage: Storage, name: str, *, uncached: bool = False) -> Manifest:
    """Read the commit record of the checkpoint in folder `name`, with `uncached` from the medium.

    Raises:
        MissingCheckpoint: there is none, so no checkpoint either.
        CorruptCheckpoint: it is damaged.
        UnsupportedFormat: it is of a version from the future.
        UnreadableCheckpoint: the storage refused.
    """
    return _read(storage, name, Manifest.from_bytes, uncached)


def read_head(storage: Storage, name: str) -> Manifest:
    """Read a commit record without its tensors, see `Manifest.head`, in a fraction of the time.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return _read(storage, name, Manifest.head)


def _read(
    storage: Storage, name: str, take: Callable[[bytes], Manifest], uncached: bool = False
) -> Manifest:
    file = f"{name}/{MANIFEST}"
    stamp = storage.stamp(file)
    if stamp is None:
        raise MissingCheckpoint(
            f"{storage.describe(name)} holds no committed checkpoint: it has no {MANIFEST}"
        )
    if stamp[0] > MAX_BYTES:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: it has {stamp[0]} bytes")
    try:
        with storage.open(file, uncached=uncached) as opened:
            data = opened.readall()
        return take(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: {error}") from error
    except ValueError as error:
        raise type(error)(f"{storage.describe(file)} cannot be read: {error}") from error


def load(
    storage: Storage,
    name: str,
    sources: Collection[str] | None = None,
    without: Collection[str] = (),
    *,
    ranks: Ranks = ALONE,
    like: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read a checkpoint, or only some of its sources, and verify what is read.

    Args:
        storage: where it lies.
        name: its folder.
        sources: names of the sources to read; None for all. Names that it lacks are skipped.
        without: names of sources that are not read.
        ranks: who loads it together; all of them call this.
        like: by source, a state whose DTensors say how tensors of the same name and shape, and
            those right below that name, are to be laid out: each rank reads its part. Others are
            read whole by every rank.

    Raises:
        MissingCheckpoint: there is no committed checkpoint.
        CorruptCheckpoint: a file is missing or damaged; the message names it.
        UnsupportedFormat: it holds tensors of a dtype that this code does not know.
        UnreadableCheckpoint: the storage refused, or memory is short.
    """
    manifest = ranks.first(lambda: read_manifest(storage, name))
    wanted = [s for s in manifest.sources if (sources is None or s in sources) and s not in without]
    state = {}
    for source in wanted:
        part = _Source(storage, name, manifest, source, ranks)
        layouts = _layouts(source, (like or {}).get(source))
        tensors = part.read_laid_out(layouts) if layouts else ranks.together(part.read)
        state[source] = ranks.together(partial(part.decode, tensors))
    return Loaded(state, manifest, storage.describe(name))


def load_checkpoint(path: Path, sources: Collection[str] | None = None) -> Loaded:
    """Read the checkpoint in a folder of the file system; see `load`."""
    return load(LocalStorage(path.parent), path.name, sources)


Tensors = dict[str, torch.Tensor]


def _layouts(source: str, state: Any) -> Tensors:
    """Give the DTensors of a state, by the names that they have in a checkpoint."""
    if state is None:
        return {}
    _, tensors, aliases = encode(source, state)
    named = tensors | {alias: tensors[key] for alias, key in aliases.items()}
    return {key: tensor for key, tensor in named.items() if is_sharded(tensor)}


class _Source:
    """One source of a checkpoint, as one of its readers sees it."""

    def __init__(
        self, storage: Storage, name: str, manifest: Manifest, source: str, ranks: Ranks
    ) -> None:
        self._storage, self._name, self._manifest = storage, name, manifest
        self._source, self._ranks = source, ranks
        self._tree = self._own(manifest.sources[source])
        self._records = {
            key: record
            for key, record in manifest.tensors.get(source, {}).items()
            if self._is_mine(key)
        }
        self._headers: dict[str, Header] = {}

    def _own(self, tree: Json) -> Json:
        """Choose what this rank had of a source, where as many ranks load as saved."""
        trees = tree.get(RANKS) if isinstance(tree, dict) else None
        self._is_own = isinstance(trees, list) and len(trees) == self._ranks.size
        return trees[self._ranks.rank] if self._is_own else tree  # type: ignore[index]

    def _is_mine(self, key: str) -> bool:
        own = rank_key(self._ranks.rank)
        return not self._is_own or key == own or key.startswith(f"{own}.")

    def read(self) -> Tensors:
        """Read all tensors whole, and each file that holds them from its first byte to its last."""
        self._check_readable()
        pieces: dict[tuple[str, str], torch.Tensor] = {}
        for file in sorted({c.file for record in self._records.values() for c in record.chunks}):
            pieces |= {(file, key): tensor for key, tensor in self._read_file(file).items()}
        return {key: _joined(key, record, pieces) for key, record in self._records.items()}

    def read_laid_out(self, layouts: Tensors) -> Tensors:
        """Read this rank's part of the tensors that have a layout, and the others whole."""
        from .sharded import read_shards

        self._ranks.together(self._check_readable)
        windowed = set(_windowed(self._tree))
        targets = self._ranks.together(
            lambda: {
                key: _target(record, None if key in windowed else _layout(key, record, layouts))
                for key, record in self._records.items()
            }
        )
        read_shards(targets, self._source, self._records, self._read_chunk, self._ranks)
        return targets

    def decode(self, tensors: Tensors) -> Any:
        """Build the state of the source."""
        try:
            return decode(self._source, self._tree, tensors)
        except CorruptCheckpoint as error:
            where = self._storage.describe(self._name)
            raise CorruptCheckpoint(f"{where}/{MANIFEST} is damaged: {error}") from error

    def _check_readable(self) -> None:
        encodings = {f.encoding for f in self._manifest.files.values() if f.source == self._source}
        for encoding in encodings - {None}:
            check_known(encoding)
        for key, one in self._records.items():
            if one.dtype not in DTYPES:
                raise UnsupportedFormat(
                    f"{self._storage.describe(self._name)} cannot be read: its tensor {key!r} of "
                    f"source {self._source!r} is of dtype {one.dtype!r}, and this code reads "
                    f"{', '.join(DTYPES)}"
                )

    def _read_file(self, file: str) -> Tensors:
        listed = {
            key: (record.dtype, chunk.shape)
            for key, record in self._manifest.tensors[self._source].items()
            for chunk in record.chunks
            if chunk.file == file
        }
        record = self._manifest.files[file]
        with self._opened(file) as opened:
            tensors, found = read_tensors(opened, record.plain_size, len(listed))
            if isinstance(opened, Decompressed):
                found = opened.digest()
        if found != record.digest:
            raise self._damaged(file, f"its digest is {found} instead of {record.digest}")
        if {key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()} != listed:
            raise CorruptCheckpoint(
                f"{self._storage.describe(self._name)} is damaged: the tensors of source "
                f"{self._source!r} are not those that its {MANIFEST} lists"
            )
        return tensors

    def _read_chunk(self, key: str, record: TensorRecord, chunk: Chunk) -> torch.Tensor:
        with self._opened(chunk.file) as opened:
            if chunk.file not in self._headers:
                size = self._manifest.files[chunk.file].plain_size
                self._headers[chunk.file] = read_header(opened, size)
            entry = self._headers[chunk.file].entries.get(key)
            if entry is None or (entry.dtype, entry.shape) != (record.dtype, chunk.shape):
                raise CorruptCheckpoint(f"it does not hold tensor {key!r} as {MANIFEST} lists it")
            tensor, found = read_tensor(opened, self._headers[chunk.file], entry)
        if found != chunk.digest:
            raise self._damaged(
                chunk.file, f"the digest of tensor {key!r} is {found} instead of {chunk.digest}"
            )
        return tensor

    @contextmanager
    def _opened(self, file: str) -> Iterator[Readable]:
        path, record = f"{self._name}/{file}", self._manifest.files[file]
        size = record.size
        try:
            stamp = self._storage.stamp(path)
            if stamp is not None and stamp[0] != size:
                raise CorruptCheckpoint(f"it has {stamp[0]} bytes instead of {size}")
            with self._storage.open(path) as opened:
                yield self._decoded(opened, record)
        except MissingCheckpoint as error:
            raise CorruptCheckpoint(f"a file of the checkpoint is missing: {error}") from error
        except (CorruptCheckpoint, UnsupportedFormat) as error:
            # Of dtypes that the manifest does not list: damage, and not the future.
            raise self._damaged(file, str(error)) from error
        except MemoryError as error:
            where = self._storage.describe(path)
            raise UnreadableCheckpoint(
                f"cannot read {where}: {error or 'out of memory'}"
            ) from error

    @staticmethod
    def _decoded(opened: io.RawIOBase, record: FileRecord) -> Readable:
        return Decompressed(opened, record.content_size) if record.encoding else opened

    def _damaged(self, file: str, why: str) -> CorruptCheckpoint:
        where = self._storage.describe(f"{self._name}/{file}")
        return CorruptCheckpoint(f"{where} is damaged: {why}")


def _joined(
    key: str, record: TensorRecord, pieces: Mapping[tuple[str, str], torch.Tensor]
) -> torch.Tensor:
    """Put a tensor together from its chunks."""
    if record.is_whole:
        return pieces[record.chunks[0].file, key]
    tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
    for chunk in record.chunks:
        sides = zip(chunk.offsets, chunk.shape, strict=True)
        place = tuple(slice(offset, offset + length) for offset, length in sides)
        tensor[place] = pieces[chunk.file, key]
    return tensor


def _layout(key: str, record: TensorRecord, layouts: Tensors) -> torch.Tensor | None:
    found = layouts.get(key, layouts.get(key.rpartition(".")[0]))
    return found if found is not None and tuple(found.shape) == record.shape else None


def _target(record: TensorRecord, layout: torch.Tensor | None) -> torch.Tensor:
    dtype = DTYPES[record.dtype]
    try:
        if layout is None:
            return torch.empty(record.shape, dtype=dtype)
        return torch.empty_like(layout, dtype=dtype, requires_grad=False)
    except RuntimeError as error:
        raise UnreadableCheckpoint(f"no memory for a tensor of shape {record.shape}") from error


def _windowed(tree: Any) -> Iterator[str]:
    """Name the tensors into which others are windows: these have to be whole."""
    if isinstance(tree, dict):
        if next(iter(tree), "") == "$tensor" and "window" in tree:
            yield tree["$tensor"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _windowed(item)
