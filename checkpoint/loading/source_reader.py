"""Reads one source of a checkpoint: its tensors, with every byte checked, and its values."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from typing import Any, cast

import torch

from ..errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
    StateMismatch,
    UnsupportedFormat,
)
from ..format.codec import encode, rank_key
from ..format.compression import Decompressed, check_known
from ..format.decode import RANKS, Json, decode
from ..format.digest import Digest
from ..format.json_text import not_too_deep
from ..format.manifest import Manifest
from ..format.safetensors_header import DTYPES
from ..format.safetensors_reader import (
    Header,
    Readable,
    buffered,
    map_tensors,
    read_header,
    read_in_order,
    read_in_two_threads,
    read_tensor,
)
from ..format.tensor_index import Chunk, FileRecord, TensorRecord
from ..io.page_memory import new_memory
from ..layout import MANIFEST
from ..machine_errors import is_machine_error, reading, unreadable_checkpoint
from ..ranks import Ranks, is_sharded
from ..run_folder.file_trust import FileTrust
from ..storage import Storage
from .destinations import Destinations, LiveTensors

Tensors = dict[str, torch.Tensor]
_Listed = dict[str, tuple[TensorRecord, Chunk]]


def layouts_of(source: str, state: Any) -> Tensors:
    """Return the DTensors of a state by the names that they have in a checkpoint."""
    if state is None:
        return {}
    _, tensors, aliases = encode(source, state)
    named = tensors | {alias: tensors[key] for alias, key in aliases.items()}
    return {key: tensor for key, tensor in named.items() if is_sharded(tensor)}


class SourceReader:
    """Reads one source of a checkpoint, on one rank."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        manifest: Manifest,
        source: str,
        ranks: Ranks,
        trust: FileTrust | None = None,
    ) -> None:
        self._storage, self._name, self._manifest = storage, name, manifest
        self._trust = FileTrust(storage) if trust is None else trust
        self._source, self._ranks, self._where = source, ranks, storage.describe(name)
        self._tree = self._own(manifest.sources[source])
        self._records = {
            key: record
            for key, record in manifest.tensors.get(source, {}).items()
            if self._is_mine(key)
        }
        self._headers: dict[str, Header] = {}

    def _own(self, tree: Json) -> Json:
        """Return the tree of this rank, if as many ranks load as saved; else all trees."""
        trees = tree.get(RANKS) if isinstance(tree, dict) else None
        self._is_own = isinstance(trees, list) and len(trees) == self._ranks.size
        return trees[self._ranks.rank] if self._is_own else tree  # type: ignore[index]

    def _is_mine(self, key: str) -> bool:
        own = rank_key(self._ranks.rank)
        return not self._is_own or key == own or key.startswith(f"{own}.")

    def read(self, live: LiveTensors | None = None) -> Tensors:
        """Read all tensors as a whole, and each of their files from the first byte to the last."""
        self._check_readable()
        with reading(self._where):
            windowed = () if live is None else self._windowed()
            targets = Destinations(self._source, self._records, live, windowed)
            for file, listed in self._by_file().items():
                path = f"{self._name}/{file}"
                before = self._trust.look(path)
                self._read_file(file, listed, targets)
                self._trust.read_whole(path, self._manifest.files[file].digest, before)
                targets.finish()
            return targets.tensors

    def _windowed(self) -> set[str]:
        with not_too_deep(self._tree):
            return set(_windowed(self._tree))

    def _by_file(self) -> dict[str, _Listed]:
        """Return the records of the tensors in each file that holds a tensor of this rank."""
        files: dict[str, _Listed] = {}
        for key, record in self._manifest.tensors.get(self._source, {}).items():
            for chunk in record.chunks:
                files.setdefault(chunk.file, {})[key] = record, chunk
        mine = {chunk.file for record in self._records.values() for chunk in record.chunks}
        return {file: listed for file, listed in sorted(files.items()) if file in mine}

    def map(self) -> Tensors:
        """Return tensors that the system reads when they are used, and that are not verified.

        Sizes and headers are checked. A tensor in several chunks is read now.
        """
        self._check_readable()
        targets = Destinations(self._source, self._records)
        whole: Tensors = {}
        for file, listed in self._by_file().items():
            mapped = self._map_file(file, listed)
            for key, (record, chunk) in listed.items():
                if key in self._records and record.is_whole:
                    whole[key] = mapped[key]
                elif key in self._records:
                    targets.memory(key, chunk).copy_(mapped[key])
                    targets.finish()
        return targets.tensors | whole

    def _map_file(self, file: str, listed: _Listed) -> Tensors:
        record = self._manifest.files[file]
        if record.encoding is not None:
            raise UnsupportedFormat(
                f"{self._storage.describe(f'{self._name}/{file}')} is compressed: it cannot be "
                "loaded lazily, only as a whole"
            )
        with self._opened(file) as opened:
            digest = Digest()
            header = read_header(opened, record.plain_size, digest, len(listed))
            self._check_header(record, header, str(digest), listed)
            return map_tensors(cast(BufferedReader, opened), header)

    def read_laid_out(self, layouts: Tensors) -> Tensors:
        """Read the part of this rank of each tensor with a layout, and other tensors as a whole."""
        from .sharded_read import read_shards

        self._ranks.run_everywhere(self._check_readable)
        targets = self._ranks.run_everywhere(partial(self._targets, layouts))
        with reading(self._where):
            read_shards(
                *(targets, self._source, self._where),
                *(self._records, self._read_chunk, self._ranks),
            )
        return targets

    def _targets(self, layouts: Tensors) -> Tensors:
        with reading(self._where):
            windowed = self._windowed()
            return {
                key: _target(record, None if key in windowed else _layout(key, record, layouts))
                for key, record in self._records.items()
            }

    def decode(self, tensors: Tensors) -> Any:
        """Build the state of the source.

        Raises:
            CorruptCheckpoint: it is described wrongly.
            StateMismatch: it is of a class that the process does not have.
            UnreadableCheckpoint: memory is short, or torch refuses for a reason of its own.
        """
        try:
            return decode(self._source, self._tree, tensors)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{self._where}/{MANIFEST} is damaged: {error}") from error
        except StateMismatch as error:
            raise StateMismatch(f"{self._where}: {error}") from error
        except (MemoryError, OSError, RuntimeError) as error:
            # The bytes are verified, so the cause is the machine.
            raise unreadable_checkpoint(
                f"source {self._source!r} of {self._where}", error
            ) from error

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

    def _read_file(self, file: str, listed: _Listed, targets: Destinations) -> None:
        record = self._manifest.files[file]
        with self._opened(file) as opened:
            digest = Digest()
            header = read_header(opened, record.plain_size, digest, len(listed))
            self._check_header(record, header, str(digest), listed)
            memory = {
                key: targets.memory(key, chunk)
                if key in self._records
                # A tensor of another rank in the same file, which is part of the same digest.
                else new_memory(chunk.shape, DTYPES[one.dtype])
                for key, (one, chunk) in listed.items()
            }
            if not record.header:
                read_in_order(opened, header, memory, digest)
                found = opened.digest() if isinstance(opened, Decompressed) else str(digest)
                if found != record.digest:
                    raise CorruptCheckpoint(f"its digest is {found} instead of {record.digest}")
                return
        digests = {key: chunk.digest for key, (_, chunk) in listed.items()}
        read_in_two_threads(partial(self._opened, file), header, memory, digests)

    def _check_header(
        self, record: FileRecord, header: Header, digest: str, listed: _Listed
    ) -> None:
        if record.header and digest != record.header:
            raise CorruptCheckpoint(
                f"the digest of its header is {digest} instead of {record.header}"
            )
        expected = {key: (one.dtype, chunk.shape) for key, (one, chunk) in listed.items()}
        if {key: (entry.dtype, entry.shape) for key, entry in header.entries.items()} != expected:
            raise CorruptCheckpoint(
                f"its tensors are not those of source {self._source!r} that {MANIFEST} lists"
            )

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
            with self._storage.open(path) as raw, buffered(raw) as opened:
                yield Decompressed(opened, record.content_size) if record.encoding else opened
        except MissingCheckpoint as error:
            raise CorruptCheckpoint(f"a file of the checkpoint is missing: {error}") from error
        except (CorruptCheckpoint, UnsupportedFormat) as error:
            # An unknown dtype that the manifest does not list is damage, not a future format.
            raise self._damaged(file, str(error)) from error
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, CheckpointError) or not is_machine_error(error):
                raise
            raise unreadable_checkpoint(self._storage.describe(path), error) from error

    def _damaged(self, file: str, why: str) -> CorruptCheckpoint:
        path = f"{self._name}/{file}"
        self._trust.condemn(path)
        return CorruptCheckpoint(f"{self._storage.describe(path)} is damaged: {why}")


def _layout(key: str, record: TensorRecord, layouts: Tensors) -> torch.Tensor | None:
    found = layouts.get(key, layouts.get(key.rpartition(".")[0]))
    return found if found is not None and tuple(found.shape) == record.shape else None


def _target(record: TensorRecord, layout: torch.Tensor | None) -> torch.Tensor:
    dtype = DTYPES[record.dtype]
    if layout is None:
        return new_memory(record.shape, dtype)
    return torch.empty_like(layout, dtype=dtype, requires_grad=False)


def _windowed(tree: Any) -> Iterator[str]:
    """Name the tensors that contain views of other names: every rank needs them as a whole."""
    if isinstance(tree, dict):
        if next(iter(tree), "") == "$tensor" and "window" in tree:
            yield tree["$tensor"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _windowed(item)
