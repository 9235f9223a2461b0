"""Writes the files of one process, or links them if an earlier checkpoint has the same bytes.

It calls no other process, so that it can run in a thread.
"""

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from ..errors import CannotSave, CheckpointError
from ..format.compression import SUFFIX, ZSTD, Compressed
from ..format.digest import Digest
from ..format.safetensors_header import DTYPE_NAMES
from ..format.safetensors_writer import TensorFile, tensor_digest
from ..format.tensor_index import FileRecord, WrittenChunk, WrittenFile, file_content_key
from ..io.byte_blocks import tensor_bytes
from ..layout import shard_file
from ..run_folder.file_trust import FileTrust
from ..storage import Storage
from ..units import format_bytes
from .file_groups import group_by_change
from .link_bases import PreviousCheckpoint
from .shards import SourceShard, TensorShard

_ROOM_TO_SPARE = 16 * 1024  # bytes, for the manifest and for the file system itself
_PREFIX = 4096  # bytes of a tensor; most changes show in them

logger = logging.getLogger(__name__)


@dataclass
class _FilePlan:
    """A file to write: its tensors, and the earlier file to which it may be a link."""

    name: str
    part: SourceShard
    keys: list[str]
    twin: WrittenFile | None = None


class FileWriter:
    """Writes the tensors of one process into the folder of a checkpoint.

    A file that did not change is linked to the checkpoint before the previous one, and never to a
    file of the previous one. So the newest two checkpoints share no file, and one damaged file
    leaves one of them whole. A file is linked only if its bytes are known to be right, see
    `FileTrust`.

    Args:
        storage: storage of the folder; this process holds its lock.
        name: name of the folder, which exists.
        parts: tensors to write.
        earlier: the previous checkpoint and the one before it, in this order.
        trust: files that are known to be whole; learns the files that are written.
        compress: sources whose files are compressed by zstd.
        verify: read every file back from the medium and compare it.
        writers: number of processes that write as much at the same time, for the check of space.
        on_stable: called after the tensors of stable sources were read.

    Attributes:
        prefixes: digests of the first bytes of the tensors, see `PreviousCheckpoint`.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        parts: Iterable[SourceShard],
        earlier: Sequence[PreviousCheckpoint] = (),
        *,
        trust: FileTrust | None = None,
        compress: Collection[str] = (),
        verify: bool = False,
        writers: int = 1,
        on_stable: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._name = storage, name
        self._trust = FileTrust(storage) if trust is None else trust
        # Stable sources come first, because their owners wait until they are read.
        self._parts = sorted(parts, key=lambda part: part.version is None)
        self._previous, self._base = [*earlier[:2], None, None][:2]
        self._compress = frozenset(compress)
        self._verify, self._writers, self._on_stable = verify, writers, on_stable
        self.prefixes: dict[tuple[str, str], bytes] = {}

    def write(self) -> list[WrittenFile]:
        """Write or link all files; they are durable after the folder is synced.

        Raises:
            CannotSave: the storage refused, is full, or returns other bytes than were written.
        """
        try:
            files = [file for part in self._parts for file in self._files(part)]
            self._refuse_without_room(files)
            written = []
            for file in files:
                if file.part.version is None:
                    self._on_stable()
                written.append(self._link(file) or self._write(file))
            return written
        finally:
            self._on_stable()

    def _files(self, part: SourceShard) -> list[_FilePlan]:
        """Group the tensors of a source into files, and find the files that exist already."""
        known = self._known(part)
        if known is not None:
            return known
        before = self._before(part.source)
        contents = self._contents(part, before)
        groups = group_by_change(
            {key: piece.tensor.nbytes for key, piece in part.pieces.items()},
            {key: file for key, (file, _) in before.items()},
            {key for key in part.pieces if key not in before or before[key][1] != contents[key]},
        )
        twins = {one.content: one for one in self._linkable(part.source)}
        files = []
        for index, keys in enumerate(groups, start=1):
            encoding = ZSTD if part.source in self._compress else None
            held = {key: contents[key] for key in keys}
            twin = twins.get(file_content_key(part.source, encoding, held))
            name = _file_name(part, index, len(groups)) + (SUFFIX if encoding else "")
            files.append(_FilePlan(name, part, keys, twin))
        return files

    def _contents(
        self, part: SourceShard, before: Mapping[str, tuple[str, WrittenChunk]]
    ) -> dict[str, WrittenChunk | None]:
        """Return what each tensor would be in a file; None for a tensor that has changed.

        A change usually shows in the first bytes. Such a tensor is hashed while it is written, and
        not a second time before that.
        """
        known = {} if self._previous is None else self._previous.prefixes
        contents: dict[str, WrittenChunk | None] = {}
        for key, piece in part.pieces.items():
            one = part.source, key
            if (begins := _prefix(piece.tensor)) is not None:
                self.prefixes[one] = begins
            is_new = key not in before or known.get(one, begins) != begins
            contents[key] = None if is_new else _content(piece, tensor_digest(piece.tensor))
        return contents

    def _known(self, part: SourceShard) -> list[_FilePlan] | None:
        """Return the files of a stable source if its version is that of two saves ago."""
        base = self._base
        if base is None or part.version is None or base.versions.get(part.source) != part.version:
            return None
        there = self._linkable(part.source)
        files = [_FilePlan(one.name, part, list(one.tensors), one) for one in there]
        keys = {key for file in files for key in file.keys}
        return files if keys == part.pieces.keys() else None

    def _before(self, source: str) -> dict[str, tuple[str, WrittenChunk]]:
        """File and content of each tensor of a source in the previous checkpoint."""
        files = () if self._previous is None else self._previous.files
        return {
            key: (file.name, content)
            for file in files
            if file.record.source == source
            for key, content in file.tensors.items()
        }

    def _linkable(self, source: str) -> list[WrittenFile]:
        """Files of the checkpoint before the previous one that the previous one does not share."""
        if self._base is None or self._previous is None:
            return []
        taken = {
            self._storage.identity(f"{self._previous.name}/{file.name}")
            for file in self._previous.files
            if file.record.source == source
        }
        return [
            file
            for file in self._base.files
            if file.record.source == source and self._is_free(self._base.name, file, taken)
        ]

    def _is_free(self, folder: str, file: WrittenFile, taken: Collection[Hashable]) -> bool:
        """Whether a file exists, is not in the previous checkpoint, and is not damaged."""
        # If the file cannot be looked at, it is written again.
        seen = self._trust.look(f"{folder}/{file.name}")
        if seen is None or seen.identity in taken or seen.stamp[0] != file.record.size:
            return False
        return not self._trust.is_damaged(seen)

    def _refuse_without_room(self, files: Iterable[_FilePlan]) -> None:
        needed = sum(
            file.part.pieces[key].tensor.nbytes
            for file in files
            if file.twin is None
            for key in file.keys
        )
        free = self._storage.free()
        if free is not None and needed * self._writers + _ROOM_TO_SPARE > free:
            raise CannotSave(
                f"cannot save {self._storage.describe(self._name)}: it needs "
                f"{format_bytes(needed * self._writers)} and {format_bytes(free)} are free; free "
                "some space, or lower what `checkpoint.*` keeps"
            )

    def _link(self, file: _FilePlan) -> WrittenFile | None:
        if file.twin is None or self._base is None:
            return None
        old, new = f"{self._base.name}/{file.twin.name}", f"{self._name}/{file.name}"
        digest = file.twin.record.digest
        if self._verify:
            # With `verify_after_save`, every byte of a checkpoint is read back, links too.
            self._trust.doubt_file(old)
        if not self._trust.is_whole(old, digest) or not self._storage.link(old, new):
            return None
        return replace(file.twin, name=file.name, is_new=False)

    def _write(self, file: _FilePlan) -> WrittenFile:
        pieces = {key: file.part.pieces[key] for key in file.keys}
        aliases = {a: key for a, key in file.part.aliases.items() if key in pieces}
        content = TensorFile(
            {key: piece.tensor for key, piece in pieces.items()},
            aliases,
            is_private=file.part.is_private,
        )
        record = self._write_content(file, content)
        path = f"{self._name}/{file.name}"
        if self._verify and (found := self._read_back(path, record.digest)) != record.digest:
            self._trust.condemn(path)
            where = self._storage.describe(path)
            raise CannotSave(
                f"cannot save {where}: what is read back has the digest {found} instead of "
                f"{record.digest}: the disk, or the memory, loses bits: check both, then start "
                "again"
            )
        self._trust.wrote(path, record.digest)
        tensors = {
            key: _content(piece, content.tensor_digests[key]) for key, piece in pieces.items()
        }
        return WrittenFile(file.name, record, tensors)

    def _write_content(self, file: _FilePlan, content: TensorFile) -> FileRecord:
        path, source = f"{self._name}/{file.name}", file.part.source
        with closing(content.blocks()) as parts:
            if not file.name.endswith(SUFFIX):
                self._storage.write(path, parts)
                return FileRecord(
                    source, content.size, content.digest, header=content.header_digest
                )
            packed = Compressed(parts, content.size)
            self._storage.write(path, packed.blocks())
        logger.info(
            "%s has %.0f %% of its size by zstd",
            *(self._storage.describe(path), 100 * packed.size / max(content.size, 1)),
        )
        return FileRecord(source, packed.size, packed.digest, ZSTD, content.size)

    def _read_back(self, path: str, expected: str) -> str:
        try:
            return self._trust.digest_of(path, expected)
        except CheckpointError as error:
            raise CannotSave(f"cannot read back what was saved: {error}") from error


def _content(piece: TensorShard, digest: str) -> WrittenChunk:
    dtype, part = DTYPE_NAMES[piece.tensor.dtype], tuple(piece.tensor.shape)
    return WrittenChunk(dtype, piece.shape, piece.offsets, part, digest)


def _prefix(tensor: torch.Tensor) -> bytes | None:
    """Digest of the first bytes of a tensor; None if reading them would need a copy."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return Digest(tensor_bytes(tensor)[:_PREFIX]).raw()


def _file_name(part: SourceShard, index: int, count: int) -> str:
    if part.count == 1:
        return shard_file(part.source, index, count)
    return shard_file(part.source, part.number, part.count, index if count > 1 else None)
