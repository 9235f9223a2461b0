"""The checkpoints of one run on disk, and the manifest of each."""

import logging
from pathlib import Path

from ..errors import (
    CannotSave,
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
)
from ..format.manifest import Manifest
from ..layout import CHECKPOINTS, MANIFEST, Position, may_be_of_save
from ..storage import LocalStorage, Storage, with_defaults
from ..storage.log_once import LogOnce
from . import folder_contents as remains
from .manifest_file import read_head, read_manifest
from .pins import is_pin

logger = logging.getLogger(__name__)


class Catalog:
    """Lists the checkpoints of a run; the disk decides, not the memory of this object.

    Args:
        storage: storage of the checkpoints.

    Attributes:
        unread: the checkpoints that the last call of `outlines` left out, and why.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[Position, tuple[tuple[int, int], Manifest]] = {}
        self.unread: dict[Position, str] = {}
        self._left: set[Position] = set()
        self._once = LogOnce(logger)

    def committed(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return [position for position, stamp in self._stamps().items() if stamp]

    def newest_stamp(self) -> tuple[Position, tuple[int, int]] | None:
        """Position of the newest committed checkpoint, and size and time of its manifest."""
        stamps = [(position, stamp) for position, stamp in self._stamps().items() if stamp]
        return stamps[-1] if stamps else None

    def newest_first(self) -> list[tuple[Position, bool]]:
        """Positions of all folders, newest first, and whether each has a manifest."""
        return [(position, bool(stamp)) for position, stamp in reversed(self._stamps().items())]

    def interrupted(self) -> list[Position]:
        """Positions of folders without a manifest, oldest first."""
        return [position for position, stamp in self._stamps().items() if stamp is None]

    def abandoned(self) -> list[Position]:
        """Positions of folders without a manifest that are older than a committed checkpoint."""
        stamps = self._stamps()
        newest = max((at.order for at, stamp in stamps.items() if stamp), default=())
        return [at for at, stamp in stamps.items() if stamp is None and at.order <= newest]

    def is_ours(self, position: Position) -> bool:
        """Whether a folder without a manifest holds only files of saves and pins.

        Raises:
            UnreadableCheckpoint: the storage refused.
        """
        return all(may_be_of_save(f) or is_pin(f) for f in self.storage.files(position.name))

    def manifest(self, position: Position) -> Manifest:
        """Read a manifest and check that it belongs to its folder.

        Raises:
            CheckpointError: see `read_manifest`.
        """
        manifest = read_manifest(self.storage, position.name)
        self.check(manifest, position)
        return manifest

    def newest(self) -> Manifest:
        """Read the newest manifest that is not damaged; a warning names each damaged one.

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
        """Refuse a manifest in the folder of another checkpoint.

        Raises:
            CorruptCheckpoint: the manifest has another position than its folder.
        """
        if manifest.position != position:
            where = self.storage.describe(f"{position.name}/{MANIFEST}")
            raise CorruptCheckpoint(f"{where} is damaged: it is that of {manifest.position.name}")

    def outlines(self) -> dict[Position, Manifest]:
        """Outlines of the committed checkpoints, oldest first.

        A checkpoint that is damaged or cannot be read is left out, see `unread`. A manifest that
        has not changed on disk is not read again, because many manifests take seconds to read.
        """
        known, self._known, self.unread = self._known, {}, {}
        for position in self._positions():
            try:
                stamp = self._stamp(position)
                if stamp is None or position in self._left:
                    continue
                found = known.get(position)
                if found is None or found[0] != stamp:
                    head = read_head(self.storage, position.name)
                    self.check(head, position)
                    found = stamp, head.outline()
                self._known[position] = found
            except CheckpointError as error:
                self.unread[position] = str(error)
        return {position: outline for position, (_, outline) in self._known.items()}

    def quarantine(self, position: Position) -> str:
        """Rename a damaged checkpoint out of the way of new ones; return its new name.

        Raises:
            CannotSave, UnreadableCheckpoint: the storage refused.
        """
        name = remains.quarantine(self.storage, position.name)
        logger.warning("Set the damaged checkpoint aside as %s", self.storage.describe(name))
        return name

    def try_to_quarantine(self, position: Position) -> str:
        """Rename a damaged checkpoint; return an empty text, or why that failed."""
        try:
            self.quarantine(position)
        except CheckpointError as error:
            logger.warning(
                "%s is damaged and cannot be set aside: it stays there, and does not count. %s",
                *(self.storage.describe(position.name), error),
            )
            return str(error)
        return ""

    def leave(self, position: Position, is_left: bool) -> None:
        """Remember whether a damaged checkpoint stays in its place; it then does not count."""
        (self._left.add if is_left else self._left.discard)(position)

    def is_left(self, position: Position) -> bool:
        """Whether a checkpoint is damaged and could not be renamed."""
        return position in self._left

    def make_way(self, position: Position) -> None:
        """Rename a damaged checkpoint that stayed in place, if a new one needs its name.

        Raises:
            CannotSave: the storage still refuses to rename it.
        """
        if position not in self._left or position.name not in self.storage.folders():
            return
        try:
            self.quarantine(position)
        except CheckpointError as error:
            where = self.storage.describe(position.name)
            raise CannotSave(
                f"cannot save {where}: a damaged checkpoint has that name, and it cannot be set "
                f"aside: {error}. Move that folder away by hand, then start again"
            ) from error

    def _stamps(self) -> dict[Position, tuple[int, int] | None]:
        """Size and time of the manifest of each folder, oldest first; None without a manifest."""
        return {position: self._stamp(position) for position in self._positions()}

    def _positions(self) -> list[Position]:
        """Positions of all folders, oldest first."""
        found = filter(None, map(Position.parse, self.storage.folders()))
        return sorted(found, key=lambda position: position.order)

    def _stamp(self, position: Position) -> tuple[int, int] | None:
        return self.storage.stamp(f"{position.name}/{MANIFEST}")


def storage_of(folder: str | Path | Storage) -> Storage:
    """Return the storage of an experiment's checkpoints, given its folder or that storage."""
    if isinstance(folder, str | Path):
        return LocalStorage(Path(folder) / CHECKPOINTS)
    return with_defaults(folder)
