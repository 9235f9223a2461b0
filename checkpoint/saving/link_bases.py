"""The two lineages of checkpoints that new ones are linked to, in turn."""

import logging
from collections.abc import Sequence

from ..errors import CheckpointError
from ..run_folder.catalog import Catalog
from ..scheduling.triggers import NONFINITE
from .file_writer import Earlier

_LINEAGES = 2

logger = logging.getLogger(__name__)


class Lineages:
    """Knows the newest two good checkpoints: by memory of what was saved, or else by the disk.

    Args:
        catalog: what is on disk.
        are_used: whether anything is to be linked at all.
    """

    def __init__(self, catalog: Catalog, are_used: bool) -> None:
        self._catalog, self._are_used = catalog, are_used
        # The newest first; None until the disk was looked at.
        self._earlier: list[Earlier] | None = None

    def newest(self) -> Sequence[Earlier]:
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

    def remember(self, saved: Earlier, reasons: Sequence[str]) -> None:
        """Take what was just saved for the newest, if it will be there at the next save."""
        if NONFINITE not in reasons:
            self._earlier = [saved, *self.newest()[: _LINEAGES - 1]]

    def forget(self) -> None:
        """Look at the disk again: others may have changed it, or a save ended nobody knows how."""
        self._earlier = None

    def _on_disk(self) -> list[Earlier]:
        found: list[Earlier] = []
        for position in reversed(self._catalog.committed()):
            if self._catalog.is_left(position):
                continue
            manifest = self._catalog.manifest(position)
            # One that is not finite goes soon, and the two around it are the newest then.
            if NONFINITE not in manifest.reasons:
                found.append(Earlier.found(position.name, manifest))
            if len(found) == _LINEAGES:
                break
        return found
