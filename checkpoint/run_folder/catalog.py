"""The checkpoints of one run as they lie on disk, and what each says of itself."""

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
        self._left: set[Position] = set()
        self._once = LogOnce(logger)

    def committed(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return [position for position, stamp in self._stamps().items() if stamp]

    def newest_stamp(self) -> tuple[Position, tuple[int, int]] | None:
        """Position of the newest committed checkpoint, and the stamp of its manifest."""
        stamps = [(position, stamp) for position, stamp in self._stamps().items() if stamp]
        return stamps[-1] if stamps else None

    def newest_first(self) -> list[tuple[Position, bool]]:
        """Positions of all folders, and whether each has a manifest; see `folder_contents`."""
        return [(position, bool(stamp)) for position, stamp in reversed(self._stamps().items())]

    def interrupted(self) -> list[Position]:
        """Positions of folders without a manifest, oldest first; see `folder_contents`."""
        return [position for position, stamp in self._stamps().items() if stamp is None]

    def abandoned(self) -> list[Position]:
        """Positions of folders without a manifest that a later checkpoint was committed after."""
        stamps = self._stamps()
        newest = max((at.order for at, stamp in stamps.items() if stamp), default=())
        return [at for at, stamp in stamps.items() if stamp is None and at.order <= newest]

    def is_ours(self, position: Position) -> bool:
        """Whether a folder without a manifest holds only what saves and marks may have put there.

        Raises:
            UnreadableCheckpoint: the storage refused.
        """
        return all(may_be_of_save(f) or is_pin(f) for f in self.storage.files(position.name))

    def manifest(self, position: Position) -> Manifest:
        """Read a manifest and check that it is the one of that place.

        Raises:
            CheckpointError: see `read_manifest`.
        """
        manifest = read_manifest(self.storage, position.name)
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

        Without the damaged ones, and those that cannot be read: a warning names each once. A
        manifest that has not changed on disk is not read again: with many, that takes seconds.
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
        """Rename a checkpoint that is not whole out of the way of new ones; return its new name.

        Raises:
            CannotSave, UnreadableCheckpoint: the storage refused.
        """
        name = remains.quarantine(self.storage, position.name)
        logger.warning("Set the damaged checkpoint aside as %s", self.storage.describe(name))
        return name

    def try_to_quarantine(self, position: Position) -> str:
        """Set a damaged checkpoint aside; return why that cannot be done, or an empty text."""
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
        """Note whether a damaged checkpoint stays where it is; if so, it does not count."""
        (self._left.add if is_left else self._left.discard)(position)

    def is_left(self, position: Position) -> bool:
        """Whether a checkpoint is damaged, and is where it is only because it cannot be moved."""
        return position in self._left

    def make_way(self, position: Position) -> None:
        """Set a damaged checkpoint aside that was left, and whose name a new one needs.

        Raises:
            CannotSave: the storage refuses that still.
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
        """Look for each folder's manifest, the oldest first; None where there is none."""
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
