"""Flushing: does what the retention plan says to the checkpoints on disk."""

import logging

from . import retention, writer
from .catalog import Catalog
from .errors import CheckpointError
from .layout import Position
from .manifest import Manifest

logger = logging.getLogger(__name__)


class Keeper:
    """Keeps the checkpoints of a run that a policy wants, and deletes the others.

    Args:
        catalog: the checkpoints.
        policy: which stay.
    """

    def __init__(self, catalog: Catalog, policy: retention.Policy) -> None:
        self._catalog, self._policy = catalog, policy

    def plan(self) -> list[retention.Verdict]:
        """Say which checkpoints stay, and why, from what is on disk; touches nothing."""
        return self._plan(self._catalog.outlines())

    def flush(self) -> None:
        """Delete what is stale, and what interrupted saves before the newest checkpoint left.

        What cannot be looked at or deleted is warned about and tried again at the next flush.
        """
        try:
            self._flush()
        except CheckpointError as error:
            # Nothing that was saved is in danger, and other ranks would not know of an error.
            logger.warning("Could not flush: %s", error)

    def _flush(self) -> None:
        outlines = self._catalog.outlines()
        for verdict in self._plan(outlines):
            try:
                self._apply(verdict, outlines[verdict.position])
            except CheckpointError as error:
                logger.warning("Could not flush %s: %s", verdict.position.name, error)
        self._delete_interrupted()

    def _plan(self, outlines: dict[Position, Manifest]) -> list[retention.Verdict]:
        existing = [
            retention.Existing(position, frozenset(one.reasons), frozenset(one.sources))
            for position, one in outlines.items()
        ]
        return retention.plan(existing, self._policy)

    def _apply(self, verdict: retention.Verdict, outline: Manifest) -> None:
        storage, name = self._catalog.storage, verdict.position.name
        if verdict.action == "delete":
            writer.delete(storage, name)
        elif verdict.action == "thin":
            self._thin(verdict.position, verdict.kept_sources)
        elif writer.leftovers(storage, name, outline):
            self._thin(verdict.position, frozenset(outline.sources))

    def _thin(self, position: Position, kept: frozenset[str]) -> None:
        manifest = self._catalog.manifest(position)
        writer.thin(self._catalog.storage, position.name, manifest, kept)

    def _delete_interrupted(self) -> None:
        committed = self._catalog.committed()
        for position in self._catalog.interrupted():
            if committed and position.order <= committed[-1].order:
                try:
                    self._catalog.storage.delete_folder(position.name)
                except CheckpointError as error:
                    logger.warning("Could not remove an interrupted save: %s", error)
