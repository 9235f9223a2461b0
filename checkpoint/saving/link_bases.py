"""The two newest good checkpoints, to whose files a new checkpoint is linked in turn."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import CheckpointError
from ..format.manifest import Manifest
from ..format.tensor_index import WrittenChunk, WrittenFile
from ..layout import NONFINITE
from ..run_folder.catalog import Catalog

_LINEAGES = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviousCheckpoint:
    """A committed checkpoint that this process saved, or found on disk.

    Attributes:
        name: name of its folder.
        files: its files; at least those that this process wrote.
        versions: versions of its stable sources, if they are known.
        beginnings: by source and name, bytes that a tensor began with, where they are known.
    """

    name: str
    files: Sequence[WrittenFile]
    versions: Mapping[str, Hashable] = field(default_factory=dict)
    prefixes: Mapping[tuple[str, str], bytes] = field(default_factory=dict)

    @classmethod
    def found(cls, name: str, manifest: Manifest) -> "PreviousCheckpoint":
        """Build it from a manifest."""
        held: dict[str, dict[str, WrittenChunk]] = {}
        for tensors in manifest.tensors.values():
            for key, record in tensors.items():
                for chunk in record.chunks:
                    part = (chunk.offsets, chunk.shape, chunk.digest)
                    content = WrittenChunk(record.dtype, record.shape, *part)
                    held.setdefault(chunk.file, {})[key] = content
        files = [WrittenFile(file, manifest.files[file], one) for file, one in held.items()]
        return cls(name, files)


class LinkBases:
    """Knows the newest two good checkpoints, from the saves of this process or from the disk.

    Args:
        catalog: the checkpoints on disk.
        are_used: whether files are linked at all.
    """

    def __init__(self, catalog: Catalog, are_used: bool) -> None:
        self._catalog, self._are_used = catalog, are_used
        # The newest first; None until this object has looked at the disk.
        self._earlier: list[PreviousCheckpoint] | None = None

    def newest(self) -> Sequence[PreviousCheckpoint]:
        """Return up to two checkpoints, the newest first."""
        if not self._are_used:
            return ()
        if self._earlier is None:
            try:
                self._earlier = self._on_disk()
            except CheckpointError as error:
                # The next save writes every file, which is correct and only takes longer.
                logger.info("Nothing is linked in the next save: %s", error)
                self._earlier = []
        return self._earlier

    def remember(self, saved: PreviousCheckpoint, reasons: Sequence[str]) -> None:
        """Remember a save as the newest checkpoint, if it will still exist at the next save."""
        if NONFINITE not in reasons:
            self._earlier = [saved, *self.newest()[: _LINEAGES - 1]]

    def forget(self) -> None:
        """Drop the cached list: another process may have changed the folder, or a save failed."""
        self._earlier = None

    def _on_disk(self) -> list[PreviousCheckpoint]:
        found: list[PreviousCheckpoint] = []
        for position in reversed(self._catalog.committed()):
            if self._catalog.is_left(position):
                continue
            manifest = self._catalog.manifest(position)
            # A checkpoint with NaN is deleted after the next save, so it must not count here.
            if NONFINITE not in manifest.reasons:
                found.append(PreviousCheckpoint.found(position.name, manifest))
            if len(found) == _LINEAGES:
                break
        return found
