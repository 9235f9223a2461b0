"""The checkpoints of one run as they lie on disk, and what each says of itself."""

import logging
from pathlib import Path

from . import reader
from .errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint
from .layout import CHECKPOINTS, MANIFEST, Position, may_be_of_save, set_aside_name
from .manifest import Manifest
from .marks import is_mark
from .storage import LocalStorage, Storage

logger = logging.getLogger(__name__)


class Catalog:
    """Lists checkpoints; never believes its own memory over the disk.

    Args:
        storage: where they lie.

    Attributes:
        unread: why `outlines` left some out when it was last called.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[Position, tuple[tuple[int, int], Manifest]] = {}
        self.unread: dict[Position, str] = {}

    def committed(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return [position for position, stamp in self._stamps().items() if stamp]

    def newest_stamp(self) -> tuple[Position, tuple[int, int]] | None:
        """Position of the newest committed checkpoint, and the stamp of its manifest."""
        stamps = [(position, stamp) for position, stamp in self._stamps().items() if stamp]
        return stamps[-1] if stamps else None

    def interrupted(self) -> list[Position]:
        """Positions of folders whose save never got to its commit, oldest first."""
        return [position for position, stamp in self._stamps().items() if stamp is None]

    def abandoned(self) -> list[Position]:
        """Positions of interrupted saves that a later checkpoint was committed after."""
        stamps = self._stamps()
        newest = max((at.order for at, stamp in stamps.items() if stamp), default=())
        return [at for at, stamp in stamps.items() if stamp is None and at.order <= newest]

    def is_ours(self, position: Position) -> bool:
        """Whether a folder without a manifest holds only what saves and marks may have put there.

        Raises:
            UnreadableCheckpoint: the storage refused.
        """
        return all(may_be_of_save(f) or is_mark(f) for f in self.storage.files(position.name))

    def manifest(self, position: Position) -> Manifest:
        """Read a manifest and check that it is the one of that place.

        Raises:
            CheckpointError: see `reader.read_manifest`.
        """
        manifest = reader.read_manifest(self.storage, position.name)
        self.check(manifest, position)
        return manifest

    def newest(self) -> Manifest:
        """Read the newest manifest that is not damaged; of the others, a warning says so.

        Raises:
            MissingCheckpoint: there is none.
        """
        for position in reversed(self.committed()):
            try:
                return self.manifest(position)
            except CorruptCheckpoint as error:
                logger.warning("Passing over a damaged checkpoint: %s", error)
        raise MissingCheckpoint(f"{self.storage.describe()} holds no checkpoint that can be read")

    def check(self, manifest: Manifest, position: Position) -> None:
        """Refuse a manifest that was put into another folder than its own.

        Raises:
            CorruptCheckpoint: it was.
        """
        if manifest.position != position:
            where = self.storage.describe(f"{position.name}/{MANIFEST}")
            raise CorruptCheckpoint(f"{where} is damaged: it is that of {manifest.position.name}")

    def outlines(self) -> dict[Position, Manifest]:
        """Outlines of the committed checkpoints, oldest first, without those of `unread`.

        A manifest that has not changed on disk is not read again: with many, that takes seconds.
        """
        known, self._known, self.unread = self._known, {}, {}
        for position, stamp in self._stamps().items():
            if stamp is None:
                continue
            found = known.get(position)
            try:
                if found is None or found[0] != stamp:
                    head = reader.read_head(self.storage, position.name)
                    self.check(head, position)
                    found = stamp, head.outline()
                self._known[position] = found
            except CheckpointError as error:
                self.unread[position] = str(error)
        return {position: outline for position, (_, outline) in self._known.items()}

    def set_aside(self, position: Position) -> str:
        """Rename a damaged checkpoint out of the way of new ones; return its new name."""
        taken = set(self.storage.folders())
        attempt = 0
        while set_aside_name(position.name, attempt) in taken:
            attempt += 1
        name = set_aside_name(position.name, attempt)
        self.storage.rename_folder(position.name, name)
        logger.warning("Set the damaged checkpoint aside as %s", self.storage.describe(name))
        return name

    def _stamps(self) -> dict[Position, tuple[int, int] | None]:
        """Look for each folder's manifest, the oldest first; None where there is none."""
        found = filter(None, map(Position.parse, self.storage.folders()))
        return {
            position: self.storage.stamp(f"{position.name}/{MANIFEST}")
            for position in sorted(found, key=lambda position: position.order)
        }


def storage_of(folder: str | Path | Storage) -> Storage:
    """Return the storage of an experiment's checkpoints: of its folder, or as it was given."""
    return LocalStorage(Path(folder) / CHECKPOINTS) if isinstance(folder, str | Path) else folder
