"""What a process knows of its saves: the last one, and which checkpoints the next one links to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..format.manifest import Manifest
from ..layout import Position
from ..run_folder.catalog import Catalog
from .link_bases import LinkBases, PreviousCheckpoint
from .save_job import SaveJob
from .staging import Files


@dataclass(frozen=True)
class Saved:
    """A save that is durable.

    Attributes:
        position: where in the run.
        where: full path of the checkpoint.
        seconds: from the call to when it was durable.
        stall: seconds of these in which the caller waited.
        new_bytes: bytes that were written, by all ranks; what was linked does not count.
        unchanged: sources whose tensors are what they were in the save before.
    """

    position: Position
    where: str
    seconds: float
    stall: float
    new_bytes: int
    unchanged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _LastSave:
    """What is known after a save: in one object, so that an interrupt leaves all of it or none.

    Attributes:
        digests: of each source.
        files: names of the tensors in each file of each source, of this rank.
        saved: what became of it.
        token: of the job that did it.
    """

    digests: Mapping[str, str] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    saved: Saved | None = None
    token: object = None


class KnownSaves:
    """Knows the last save of one Saver, and what it links to.

    Args:
        catalog: what is on disk.
        links: whether what did not change is linked to older checkpoints.

    Attributes:
        lineages: the checkpoints that the next save links to.
    """

    def __init__(self, catalog: Catalog, links: bool) -> None:
        self.link_bases = LinkBases(catalog, links)
        self._last = _LastSave()

    @property
    def saved(self) -> Saved | None:
        """The last save that became durable; None before that."""
        return self._last.saved

    @property
    def files(self) -> Files:
        """Names of the tensors in each file of each source of the last save, of this rank."""
        return self._last.files

    def saved_by(self, job: SaveJob) -> Saved | None:
        """Return what this job saved; None if that was not remembered."""
        return self._last.saved if self._last.token is job.token else None

    def unchanged(self, digests: Mapping[str, str]) -> frozenset[str]:
        """Sources whose digests are what they were in the save before."""
        return frozenset(source for source, _ in self._last.digests.items() & digests.items())

    def remember(self, job: SaveJob, saved: Saved, digests: Mapping[str, str]) -> None:
        """Take what a job saved for the newest.

        Args:
            job: is committed.
            saved: what became of it.
            digests: of each source.
        """
        files: dict[str, list[list[str]]] = {}
        for one in job.files:
            files.setdefault(one.record.source, []).append(list(one.tensors))
        earlier = PreviousCheckpoint(job.name, job.files, job.versions, job.prefixes)
        self.link_bases.remember(earlier, job.reasons)
        self._last = _LastSave(digests, files, saved, job.token)

    def restored(self, manifest: Manifest) -> None:
        """Take a checkpoint for the save before the next one, to see what has changed by then."""
        self._last = replace(self._last, digests=manifest.digests())
        # Damaged ones may have been set aside.
        self.link_bases.forget()

    def forget(self) -> None:
        """Forget all: what is known is of another process."""
        self.link_bases.forget()
        self._last = _LastSave()
