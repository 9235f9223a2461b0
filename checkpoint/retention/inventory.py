"""What the retention plan is made of, as it lies on disk now."""

import logging
import math
from collections.abc import Sequence

from ..errors import CheckpointError
from ..format.manifest import Manifest
from ..layout import MANIFEST, Position, is_of_source
from ..run_folder.catalog import Catalog
from ..run_folder.pins import is_pin, may_be_there, read_pins
from ..storage.log_once import LogOnce
from .ages import Ages
from .facts import CheckpointFacts, FileFacts

logger = logging.getLogger(__name__)


class Inventory:
    """Looks at the committed checkpoints; remembers only of files that never change.

    Args:
        catalog: the checkpoints.
        by_age: whether their ages count.
    """

    def __init__(self, catalog: Catalog, *, by_age: bool = True) -> None:
        self._catalog, self._once = catalog, LogOnce(logger)
        self._ages = Ages() if by_age else None
        self._files: dict[Position, tuple[Manifest, tuple[FileFacts, ...]]] = {}
        self._names: dict[Position, Sequence[str]] = {}

    def existing(self, outlines: dict[Position, Manifest]) -> list[CheckpointFacts]:
        """Describe each checkpoint that can be looked at, oldest first.

        A warning names each other checkpoint. The plan does not see it, so it is not touched.

        Args:
            outlines: outlines of the manifests, by position.
        """
        self._files = {at: one for at, one in self._files.items() if at in outlines}
        self._names = {}
        if self._ages is not None:
            self._ages.look(outlines)
        found = []
        for position, outline in outlines.items():
            try:
                found.append(self._describe(position, outline))
            except CheckpointError as error:
                where = position.name
                self._once.warning(f"Could not flush {where}, nor say why it stays: {error}")
        return found

    def is_marked(self, position: Position) -> bool:
        """Whether it is pinned or continued from, as of now."""
        marks = read_pins(self._catalog.storage, position.name)
        return marks.pinned is not None or any(may_be_there(where) for _, where in marks.continued)

    def names(self, position: Position) -> Sequence[str]:
        """Names of the files that `existing` found in a checkpoint's folder."""
        return self._names.get(position, ())

    def _describe(self, position: Position, outline: Manifest) -> CheckpointFacts:
        storage, ages = self._catalog.storage, self._ages
        names = self._names[position] = storage.files(position.name)
        marks = read_pins(storage, position.name, names)
        return CheckpointFacts(
            position=position,
            reasons=frozenset(outline.reasons),
            sources=frozenset(outline.sources),
            metrics=outline.info["metrics"],
            age=math.inf if ages is None else ages.of(position, outline.created),
            resumed=outline.info["resumed"],
            pinned=marks.pinned,
            continued=tuple(by for by, where in marks.continued if may_be_there(where)),
            foreign=tuple(sorted(name for name in names if _is_foreign(name, outline))),
            files=self._files_of(position, outline),
        )

    def _files_of(self, position: Position, outline: Manifest) -> tuple[FileFacts, ...]:
        known = self._files.get(position)
        # The catalog returns the same object until the manifest changes, so `is` is enough.
        if known is None or known[0] is not outline:
            known = outline, self._look(position, outline)
            self._files[position] = known
        return known[1]

    def _look(self, position: Position, outline: Manifest) -> tuple[FileFacts, ...]:
        storage = self._catalog.storage
        stamp = storage.stamp(f"{position.name}/{MANIFEST}")
        found = [("", MANIFEST, 0 if stamp is None else stamp[0])]
        found += [(one.source, name, one.size) for name, one in outline.files.items()]
        return tuple(
            FileFacts(source, storage.identity(path) or path, size)
            for source, path, size in ((s, f"{position.name}/{name}", n) for s, name, n in found)
        )


def _is_foreign(name: str, outline: Manifest) -> bool:
    # What systems drop everywhere has a dot in front, and so has what we write.
    if name in outline.files or name == MANIFEST or name.startswith(".") or is_pin(name):
        return False
    return not any(is_of_source(name, one) for one in (*outline.sources, *outline.dropped))
