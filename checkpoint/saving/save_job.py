"""One save, from tensors in memory to a committed checkpoint, at once or in the background."""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from .. import errors
from ..errors import CannotSave, CheckpointError, RankFailed
from ..format.manifest import Manifest
from ..format.tensor_index import FileRecord, WrittenChunk, WrittenFile
from ..io.worker import OneTimeEvent
from ..layout import TEMPORARY, Position
from ..machine_errors import saving
from ..ranks import Ranks, portable
from ..run_folder.claims import saving_alone
from ..run_folder.commit import commit, create_folder
from ..run_folder.deletion import delete
from ..run_folder.file_trust import FileTrust
from ..storage import Storage
from .file_writer import FileWriter
from .link_bases import PreviousCheckpoint
from .shards import SourceShard

_LOOK_AGAIN = 0.01  # seconds
_GRACE = 20.0  # seconds that other processes have when this one has ended

FindEarlier = Callable[[], Sequence[PreviousCheckpoint]]
IsBusy = Callable[[], bool]
"""Whether the thread that saves still runs."""


class SaveJob:
    """Writes the files of one checkpoint on each rank, and commits it on rank 0.

    Args:
        storage: storage of the checkpoint.
        name: name of its folder.
        draft: the manifest without tensors and files.
        parts: tensors that this rank writes.
        ranks: processes that save together.
        check: raises CannotSave if this process no longer holds the lock of the storage, and so
            must not commit or delete; see `Lock.check`.
        has_room: whether the folder exists already.
        trust: files that may be linked.
        compress: sources whose files are compressed.
        verify: read every file back and compare it.

    Attributes:
        manifest: the committed manifest; on rank 0 only.
        files: files that this rank wrote.
        prefixes: digests of the first bytes of its tensors, see `PreviousCheckpoint`.
        token: identifies this job.
        new_bytes: bytes that all ranks wrote, without links; on rank 0 only.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        draft: Manifest,
        parts: Iterable[SourceShard],
        ranks: Ranks,
        *,
        check: Callable[[], None],
        has_room: bool = False,
        trust: FileTrust | None = None,
        compress: Collection[str] = (),
        verify: bool = False,
    ) -> None:
        self._storage, self.name, self._draft, self._ranks = storage, name, draft, ranks
        self._parts, self._trust = list(parts), trust
        self._compress, self._verify = compress, verify
        self._stable_read, self._written = OneTimeEvent(), OneTimeEvent()
        self._check, self._has_room = check, has_room
        self._is_abandoned = False
        self._process = os.getpid()
        self._failure: Exception | None = None
        self._is_acknowledged = False
        # Identifies the job for callers that must not keep its tensors alive.
        self.token = object()
        self.manifest: Manifest | None = None
        self.files: list[WrittenFile] = []
        self.prefixes: Mapping[tuple[str, str], bytes] = {}
        self.new_bytes = 0

    @property
    def where(self) -> str:
        """Full path of the checkpoint."""
        return self._storage.describe(self.name)

    @property
    def position(self) -> Position:
        """Position of the checkpoint in the run."""
        return self._draft.position

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the checkpoint is saved."""
        return self._draft.reasons

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint is committed, as far as this rank knows."""
        return self.manifest is not None or self._is_acknowledged

    @property
    def is_of_another_process(self) -> bool:
        """Whether this process was forked from the one that saves."""
        return self._process != os.getpid()

    @property
    def versions(self) -> dict[str, Any]:
        """Versions of the stable sources of this rank."""
        return {part.source: part.version for part in self._parts if part.version is not None}

    def run_collective(self, earlier: FindEarlier) -> None:
        """Save now; every rank calls this.

        Args:
            earlier: returns the previous checkpoint and the one before it.

        Raises:
            CheckpointError: the error of the lowest rank that failed, on all ranks; there is no
                checkpoint.
        """
        with saving(self.where), saving_alone(self.where):
            try:
                self._ranks.run_everywhere(lambda: self._write(earlier))
                everyone = self._ranks.all_gather(self.files)
                self._ranks.run_on_rank0(
                    lambda: self._commit(one for files in everyone for one in files)
                )
                self._is_acknowledged = True
            except BaseException:
                self._discard()
                raise

    def run_detached(self, earlier: FindEarlier) -> None:
        """Save without a collective, so that a thread may call this; every rank does.

        Each rank reports the files that it wrote to rank 0, by a file in the folder.

        Args:
            earlier: see `run_collective`; called here, where training does not wait for it.

        Raises:
            CheckpointError: this rank failed, or on rank 0 any rank; there is no checkpoint.
        """
        try:
            with saving(self.where), saving_alone(self.where):
                self._apart(earlier)
        except Exception as error:
            self._failure = error
            raise
        except BaseException as error:
            # For example SystemExit, which must not end the thread that waits for this one.
            self._failure = self._ended_by(error)
            raise self._failure from error
        finally:
            self._written.come()
            self._stable_read.come()

    def _apart(self, earlier: FindEarlier) -> None:
        try:
            self._write(earlier)
            if self._ranks.is_first:
                self._commit([*self.files, *self._reported()])
            else:
                self._report({"files": [asdict(one) for one in self.files]})
                self._is_acknowledged = True
        except BaseException as error:
            self.fail(error)
            self._discard()
            raise

    def fail(self, error: BaseException) -> None:
        """Report to rank 0 that this rank cannot write its part."""
        if not self._ranks.is_first:
            kind, text = portable(error)
            with suppress(CheckpointError, OSError, MemoryError):
                self._report({"failed": [kind.__name__, text]})
        self._failure = error if isinstance(error, Exception) else self._ended_by(error)

    def _ended_by(self, error: BaseException) -> CannotSave:
        return CannotSave(f"cannot save {self.where}: {error!r} ended its thread. Save again")

    def wait_until_stable_is_read(self, is_busy: IsBusy) -> None:
        """Wait until stable sources may change."""
        self._stable_read.wait(is_busy)

    def wait_until_written(self, is_busy: IsBusy) -> None:
        """Wait until this rank has written its part in the background, or has failed.

        Raises:
            Exception: the error of this rank.
        """
        self._written.wait(is_busy)
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Stop to wait for other ranks, because one of them failed."""
        self._is_abandoned = True

    def _write(self, earlier: FindEarlier) -> None:
        try:
            with saving(self.where):
                self._write_files(earlier)
        except BaseException as error:
            self._failure = error if isinstance(error, Exception) else self._ended_by(error)
            raise
        finally:
            self._stable_read.come()
            if self._ranks.is_first:
                self._written.come()

    def _write_files(self, earlier: FindEarlier) -> None:
        if not self._has_room:
            create_folder(self._storage, self.name)
            self._has_room = True
        writer = FileWriter(
            self._storage,
            self.name,
            self._parts,
            earlier(),
            trust=self._trust,
            compress=self._compress,
            verify=self._verify,
            writers=self._ranks.size,
            on_stable=self._stable_read.come,
        )
        self.files, self.prefixes = writer.write(), writer.prefixes

    def _commit(self, files: Iterable[WrittenFile]) -> None:
        files = list(files)
        self.new_bytes = sum(one.record.size for one in files if one.is_new)
        with saving(self.where):
            self.manifest = commit(self._storage, self.name, self._draft, files, self._check)

    def _discard(self) -> None:
        # The save was not acknowledged, so the checkpoint must not count, even if only the last
        # fsync failed. A committed checkpoint stays, because other ranks may know of it. A folder
        # of another save stays too: `check` fails if another process holds the lock now.
        if self._ranks.is_first and self._has_room and self.manifest is None:
            with suppress(CheckpointError, OSError, MemoryError):
                self._check()
                delete(self._storage, self.name)

    def _report(self, what: dict[str, Any]) -> None:
        file = _report_file(self._ranks.rank)
        self._storage.commit(f"{self.name}/{file}", json.dumps(what).encode())

    def _reported(self) -> list[WrittenFile]:
        """Wait for the reports of the other ranks, and take them from the folder."""
        files = []
        for rank in range(1, self._ranks.size):
            name = f"{self.name}/{_report_file(rank)}"
            self._wait_for(name, rank)
            with self._storage.open(name) as opened:
                report = json.loads(opened.readall())
            if "failed" in report:
                kind, text = report["failed"]
                raise vars(errors).get(kind, RankFailed)(f"rank {rank}: {text}")
            files += [_file(fields) for fields in report["files"]]
            self._storage.delete(name)
        return files

    def _wait_for(self, name: str, rank: int) -> None:
        ended_at: float | None = None
        while self._storage.stamp(name) is None:
            if not threading.main_thread().is_alive():
                ended_at = ended_at or time.monotonic()
            is_late = ended_at is not None and time.monotonic() - ended_at > _GRACE
            if self._is_abandoned or is_late:
                raise CannotSave(
                    f"cannot save {self.where}: rank {rank} did not write "
                    "its part: see the log of that rank"
                )
            time.sleep(_LOOK_AGAIN)


def _report_file(rank: int) -> str:
    return f"{TEMPORARY}rank-{rank:05d}.json"


def _file(fields: dict[str, Any]) -> WrittenFile:
    tensors = {key: WrittenChunk(**_with_tuples(one)) for key, one in fields["tensors"].items()}
    record = FileRecord(**fields["record"])
    return WrittenFile(fields["name"], record, tensors, fields["is_new"])


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
