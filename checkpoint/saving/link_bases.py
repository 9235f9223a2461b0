"""The two lineages of checkpoints that new ones are linked to, in turn."""

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
    """A committed checkpoint that this process saved before, or found.

    Attributes:
        name: of its folder.
        files: at least those that this process wrote.
        versions: of its stable sources, where they are known.
        beginnings: by source and name, bytes that a tensor began with, where they are known.
    """

    name: str
    files: Sequence[WrittenFile]
    versions: Mapping[str, Hashable] = field(default_factory=dict)
    prefixes: Mapping[tuple[str, str], bytes] = field(default_factory=dict)

    @classmethod
    def found(cls, name: str, manifest: Manifest) -> "PreviousCheckpoint":
        """Take what a manifest says."""
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
    """Knows the newest two good checkpoints: by memory of what was saved, or else by the disk.

    Args:
        catalog: what is on disk.
        are_used: whether anything is to be linked at all.
    """

    def __init__(self, catalog: Catalog, are_used: bool) -> None:
        self._catalog, self._are_used = catalog, are_used
        # The newest first; None until the disk was looked at.
        self._earlier: list[PreviousCheckpoint] | None = None

    def newest(self) -> Sequence[PreviousCheckpoint]:
        """Give up to two checkpoints, the newest first."""
        if not self._are_used:
            return ()
        if self._earlier is None:
            try:
                self._earlier = self._on_disk()
            except CheckpointError as error:
                # Nothing to link to, then.
                logger.info("Nothing is linked in the next save: %s", error)
                self._earlier = []
        return self._earlier

    def remember(self, saved: PreviousCheckpoint, reasons: Sequence[str]) -> None:
        """Take what was just saved for the newest, if it will be there at the next save."""
        if NONFINITE not in reasons:
            self._earlier = [saved, *self.newest()[: _LINEAGES - 1]]

    def forget(self) -> None:
        """Look at the disk again: others may have changed it, or a save ended nobody knows how."""
        self._earlier = None

    def _on_disk(self) -> list[PreviousCheckpoint]:
        found: list[PreviousCheckpoint] = []
        for position in reversed(self._catalog.committed()):
            if self._catalog.is_left(position):
                continue
            manifest = self._catalog.manifest(position)
            # One that is not finite goes soon, and the two around it are the newest then.
            if NONFINITE not in manifest.reasons:
                found.append(PreviousCheckpoint.found(position.name, manifest))
            if len(found) == _LINEAGES:
                break
        return found
