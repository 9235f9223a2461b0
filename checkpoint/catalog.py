"""The checkpoints of one run as they lie on disk, and what each says of itself."""

import logging
from contextlib import suppress
from typing import Any

from . import reader
from .errors import CheckpointError, CorruptCheckpoint
from .layout import MANIFEST, Position, set_aside_name
from .manifest import Manifest
from .storage import Storage

logger = logging.getLogger(__name__)


class Catalog:
    """Lists checkpoints; never believes its own memory over the disk.

    Args:
        storage: where they lie.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[Position, tuple[Any, Manifest]] = {}

    def committed(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return self._positions(committed=True)

    def interrupted(self) -> list[Position]:
        """Positions of folders whose save never got to its commit, oldest first."""
        return self._positions(committed=False)

    def is_committed(self, position: Position) -> bool:
        """Whether there is a manifest."""
        return self.storage.stamp(f"{position.name}/{MANIFEST}") is not None

    def manifest(self, position: Position) -> Manifest:
        """Read a manifest and check that it is the one of that place.

        Raises:
            CheckpointError: see `reader.read_manifest`.
        """
        manifest = reader.read_manifest(self.storage, position.name)
        self.check(manifest, position)
        return manifest

    def check(self, manifest: Manifest, position: Position) -> None:
        """Refuse a manifest that was put into another folder than its own.

        Raises:
            CorruptCheckpoint: it was.
        """
        if manifest.position != position:
            where = self.storage.describe(f"{position.name}/{MANIFEST}")
            raise CorruptCheckpoint(f"{where} is damaged: it is that of {manifest.position.name}")

    def outlines(self) -> dict[Position, Manifest]:
        """Outlines of the committed checkpoints, oldest first, without the damaged ones.

        A manifest that has not changed on disk is not read again: with many, that takes seconds.
        """
        known, self._known = self._known, {}
        for position in self.committed():
            with suppress(CheckpointError):
                stamp = self.storage.stamp(f"{position.name}/{MANIFEST}")
                found = known.get(position)
                if found is None or found[0] != stamp:
                    head = reader.read_head(self.storage, position.name)
                    self.check(head, position)
                    found = stamp, head.outline()
                self._known[position] = found
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

    def _positions(self, *, committed: bool) -> list[Position]:
        found = (Position.parse(name) for name in self.storage.folders())
        chosen = [
            position
            for position in found
            if position is not None and self.is_committed(position) == committed
        ]
        return sorted(chosen, key=lambda position: position.order)
