"""Mend what is damaged, from other checkpoints that hold the same bytes; put aside what cannot be.

Every step leaves the checkpoints no worse than they were, and a repair that was killed is finished
by the next one.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, CorruptCheckpoint
from ..format.digest import digest_like
from ..format.safetensors_reader import read_blocks
from ..format.tensor_index import FileRecord
from ..layout import COPY, MANIFEST, UNFINISHED, Position, is_quarantined
from ..run_folder import deletion
from ..run_folder import folder_contents as remains
from ..run_folder.catalog import Catalog, storage_of
from ..run_folder.manifest_file import is_committed, read_head, read_manifest
from ..run_folder.move_folder import move_folder
from ..storage import Storage, guarded, locked
from .scan import Progress, Scanner
from .verify import Damage, Verified, committed, verify_one

Kind = Literal["mended", "set aside", "brought back", "removed"]


@dataclass(frozen=True)
class Act:
    """Something that a repair did, or would do.

    Attributes:
        kind: `mended`: a file has the bytes again that were saved; `set aside`: a checkpoint that
            cannot be mended was renamed; `brought back`: one that was set aside is good again;
            `removed`: what an interrupted save or flush left.
        path: full path of the file or folder.
        what: where the bytes came from, the new name, or what it was.
    """

    kind: Kind
    path: str
    what: str


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Attributes:
        found: what was damaged.
        acts: what was done about it, in order; with a dry run, what would be.
        left: what is damaged still.
    """

    found: tuple[Damage, ...]
    acts: tuple[Act, ...]
    left: tuple[Damage, ...]


def repair(
    folder: str | Path | Storage,
    others: Sequence[str | Path | Storage] = (),
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Mend the checkpoints of an experiment as far as that can be done.

    A damaged or missing file is restored from any checkpoint whose manifest lists the same bytes,
    and which has them; it gets a new file of its own, since others may share the damaged one. A
    checkpoint that cannot be mended is set aside, but only where a good one stays: a run whose
    checkpoints are all bad must not start over in silence. Nothing that is only unreadable is given
    up. Those that were set aside before are brought back when they can be mended.

    Args:
        folder: the experiment's folder, or a storage in whose root the checkpoints lie.
        others: the same, of copies and other experiments that may hold the bytes.
        dry_run: change nothing.
        progress: is told what is read.

    Raises:
        CannotSave: a run that uses the folder is alive, or the storage refused.
    """
    storage, *donors = (storage_of(one) for one in (folder, *others))
    if dry_run:
        return _Repairer(storage, donors, dry_run, progress).run()
    with locked(storage) as lock:
        # To read all of it may take hours.
        return _Repairer(guarded(storage, lock.check), donors, dry_run, progress).run()


class _Repairer:
    def __init__(
        self,
        storage: Storage,
        others: Sequence[Storage],
        dry_run: bool,
        progress: Progress | None,
    ) -> None:
        self._storage, self._dry_run, self._progress = storage, dry_run, progress
        self._catalog = Catalog(storage)
        self._scanner = Scanner(progress=progress)
        self._donors = _donors([storage, *others])
        self._acts: list[Act] = []
        # Damaged file -> the name of what took its place, so that what was shared is shared again.
        self._mended: dict[tuple[Hashable, str], str] = {}

    def run(self) -> Repair:
        good: list[str] = []
        bad: list[tuple[str, tuple[Damage, ...]]] = []
        found: list[Damage] = []
        for name in committed(self._storage):
            verified = verify_one(self._storage, name, self._scanner)
            found += verified.damages
            left = self._mend(verified)
            if left:
                bad.append((name, left))
            else:
                good.append(name)
        for name, left in bad:
            self._set_aside(name, left, good)
        self._bring_back()
        self._clean()
        return Repair(tuple(found), tuple(self._acts), tuple(d for _, left in bad for d in left))

    def _did(self, kind: Kind, name: str, what: str) -> None:
        self._acts.append(Act(kind, self._storage.describe(name), what))

    def _mend(self, verified: Verified) -> tuple[Damage, ...]:
        """Mend the files of a checkpoint; return what is damaged still."""
        if not verified.damages:
            return ()
        left = tuple(one for one in verified.damages if not self._mend_file(one))
        if left or self._dry_run:
            return left
        # Read what was written: the medium may be bad just there.
        again = verify_one(self._storage, verified.name, Scanner(progress=self._progress))
        # Only with its manifest one can say what else a checkpoint lacks.
        had_none = any(one.file == MANIFEST for one in verified.damages)
        return self._mend(again) if had_none else again.damages

    def _mend_file(self, damage: Damage) -> bool:
        name = f"{damage.checkpoint}/{damage.file}"
        if damage.file in (MANIFEST, COPY):
            return self._mend_record(damage.checkpoint, damage.file)
        record = read_manifest(self._storage, damage.checkpoint).files[damage.file]
        before = self._storage.identity(name)
        source = self._share(name, record, before) or self._copy(name, record)
        if source is None:
            return False
        self._did("mended", name, f"from {source}")
        if before is not None:
            self._mended.setdefault((before, record.digest), name)
        return True

    def _mend_record(self, name: str, file: str) -> bool:
        """Make one commit record out of the other one."""
        source = MANIFEST if file == COPY else COPY
        if file == MANIFEST and not remains.needs_copy(self._storage, name):
            return False
        if not self._dry_run:
            if file == COPY:
                remains.renew_copy(self._storage, name)
            elif not remains.put_back(self._storage, name):
                return False
        self._did("mended", f"{name}/{file}", f"from {self._storage.describe(f'{name}/{source}')}")
        return True

    def _share(self, name: str, record: FileRecord, before: Hashable) -> str | None:
        """Link to what took the place of the same damaged file in another checkpoint."""
        mended = self._mended.get((before, record.digest))
        if mended is None:
            return None
        if not self._dry_run and not self._storage.link(mended, name, replace=True):
            return None
        return self._storage.describe(mended)

    def _copy(self, name: str, record: FileRecord) -> str | None:
        """Copy from the first checkpoint that has the bytes; return the path that they lie at."""
        for storage, donor in self._donors.get((record.digest, record.size), ()):
            with suppress(CorruptCheckpoint):
                if self._has(storage, donor, record):
                    if not self._dry_run:
                        self._storage.replace(name, _bytes(storage, donor, record))
                    return storage.describe(donor)
        return None

    def _has(self, storage: Storage, donor: str, record: FileRecord) -> bool:
        try:
            scan = self._scanner.scan(storage, donor, record)
        except CheckpointError:
            return False
        return (scan.size, scan.digest) == (record.size, record.digest)

    def _set_aside(self, name: str, left: tuple[Damage, ...], good: Sequence[str]) -> None:
        position = Position.parse(name)
        is_lost = all(one.kind in ("damaged", "missing") for one in left)
        # A checkpoint with a name of its own is never taken for the newest one, so it stays.
        if position is None or not is_lost or not any(map(Position.parse, good)):
            return
        new = "" if self._dry_run else self._catalog.quarantine(position)
        self._did("set aside", name, f"as {new}" if new else "it cannot be mended")

    def _bring_back(self) -> None:
        for name in filter(is_quarantined, self._storage.folders()):
            if not self._dry_run and remains.needs_copy(self._storage, name):
                self._mend_record(name, MANIFEST)
            if is_committed(self._storage, name):
                self._bring_one_back(name)

    def _bring_one_back(self, name: str) -> None:
        try:
            own = read_manifest(self._storage, name).position.name
        except CheckpointError:
            return
        if own in self._storage.folders() or self._mend(
            verify_one(self._storage, name, self._scanner)
        ):
            return
        if not self._dry_run:
            move_folder(self._storage, name, own)
        self._did("brought back", name, f"as {own}")

    def _clean(self) -> None:
        """Remove what interrupted saves and flushes left, as the run itself does."""
        for position in self._catalog.abandoned():
            found = remains.examine(self._storage, position.name)
            if found.may_be_deleted and self._catalog.is_ours(position):
                if not self._dry_run:
                    self._storage.delete_marked_folder(position.name, UNFINISHED)
                self._did("removed", position.name, "an interrupted save or deletion")
        for name in committed(self._storage):
            for file in self._leftovers(name):
                if not self._dry_run:
                    self._storage.delete(f"{name}/{file}")
                self._did("removed", f"{name}/{file}", "left by an interrupted step")

    def _leftovers(self, name: str) -> list[str]:
        try:
            manifest = read_manifest(self._storage, name)
        except CheckpointError:
            return []
        return deletion.leftovers(self._storage.files(name), manifest)


def _donors(storages: Sequence[Storage]) -> dict[tuple[str, int], list[tuple[Storage, str]]]:
    """List the files by the digest and size that they should have."""
    found: dict[tuple[str, int], list[tuple[Storage, str]]] = {}
    for storage in storages:
        for name in storage.folders():
            with suppress(CheckpointError):
                for file, record in read_head(storage, name).files.items():
                    key = (record.digest, record.size)
                    found.setdefault(key, []).append((storage, f"{name}/{file}"))
    return found


def _bytes(storage: Storage, name: str, record: FileRecord) -> Iterator[memoryview]:
    """Give the bytes of a file; at their end, refuse them when they are not those of the record."""
    digest = digest_like(record.digest)
    try:
        with storage.open(name) as opened:
            for piece in read_blocks(opened):
                digest.update(piece)
                yield piece
    except CheckpointError as error:
        raise CorruptCheckpoint(str(error)) from error
    if str(digest) != record.digest:
        raise CorruptCheckpoint(f"{storage.describe(name)} has changed meanwhile")
