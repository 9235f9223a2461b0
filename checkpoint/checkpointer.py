"""The checkpoints of one run: when to save, what to load, how many to keep."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from .errors import CannotSave, CheckpointError
from .format.compression import ZSTD, check_known
from .format.manifest import Manifest
from .layout import Position
from .loading.destinations import Live
from .loading.newest import describe_newest
from .loading.newest_loader import Loader, Wanted
from .loading.reader import Choice, Loaded
from .machine_errors import reading, saving, told
from .ranks import ALONE, Ranks
from .retention import plan as retention
from .retention.flusher import Keeper
from .retention.free_space import warn_of_little_room
from .retention.policy import Policy, Rules
from .run_folder.catalog import Catalog, storage_of
from .run_folder.claims import in_turn
from .run_folder.file_trust import Trust
from .run_folder.run_stats import RunStats, read_run_stats, write_run_stats
from .saving.memory import Saved
from .saving.saver import Saver
from .saving.shards import size_of
from .scheduling import triggers
from .storage import Storage

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves, finds, loads and flushes the checkpoints of one experiment.

    Threads may share one, or have one each on the same folder: their saves take turns. Processes
    may not: the first one that saves has the lock. A fork of it may load and save again once its
    parent has ended.

    Args:
        folder: the experiment's folder; checkpoints lie in its `checkpoints` folder. Or a storage,
            in whose root they lie.
        save_last: keep rolling checkpoints: the newest and, to fall back to, the one before.
        save_every: also keep the end of every N-th epoch; None for none.
        every_steps: also save after every N-th optimizer update; None for none.
        every_minutes: also save when the last save is so long ago; None for none.
        background: `save` returns once the state is copied away, and the rest is done while
            training goes on. One save is in flight at a time: another one waits for it, and
            `is_due` puts off what is due. What fails is raised by the next `save`, `wait` or
            `close`; the process does not end before it is done.
        compress: sources whose files are compressed by zstd, which needs the extra `zstd`.
        verify_after_save: read back what was saved, and compare.
        on_error: what to do when the storage refuses to save: `stop`, which raises, or `warn`,
            which logs the error and goes on until the next save.
        ranks: who saves and loads together. Each of them calls `check`, `save`, `wait`, `load`,
            `load_newest`, `lock`, `flush` and `close` at the same time.
        rules: which checkpoints stay, see `Policy`; each manifest says them too.

    Attributes:
        failure: why the last save failed, if it did and `on_error` is `warn`; else None.
        every_minutes: may be changed at any time, by who chooses it while the run goes on.

    Raises:
        ValueError: an argument is out of range; the message names it.
        UnsupportedFormat: `compress` needs a package that is not installed.
    """

    def __init__(
        self,
        folder: str | Path | Storage,
        *,
        save_last: bool = True,
        save_every: int | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        background: bool = False,
        compress: Collection[str] = (),
        verify_after_save: bool = False,
        on_error: Literal["stop", "warn"] = "stop",
        ranks: Ranks = ALONE,
        **rules: Unpack[Rules],
    ) -> None:
        counts = {"save_every": save_every, "every_steps": every_steps}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}: give at least 1, or null for none")
        self.storage: Storage = storage_of(folder)
        self._catalog = Catalog(self.storage)
        self._policy = Policy.of(**rules)
        self._keeper = Keeper(self._catalog, self._policy)
        # Name of the checkpoint that this run goes on from.
        self._resumed: str | None = None
        if compress:
            check_known(ZSTD)
        self._save_last = save_last
        self._save_every = save_every
        self._every_steps = every_steps
        self.every_minutes = every_minutes
        self._ranks = ranks
        self._saved_at = time.monotonic()
        self._is_background = background
        self._on_error = on_error
        self.failure: CannotSave | None = None
        trust = Trust(self.storage)
        self._loader = Loader(self._catalog, ranks, trust)
        self._saver = Saver(
            self._catalog,
            ranks,
            trust=trust,
            background=background,
            links=self._leaves_two,
            compress=frozenset(compress),
            verify=verify_after_save,
        )
        self._is_owed = False

    @property
    def _leaves_two(self) -> bool:
        """Whether a save always leaves the one before; else the newest two might share files."""
        return self._save_last or self._policy.keep_last != 1

    @property
    def last_saved(self) -> Saved | None:
        """The last save that became durable; None before that."""
        return self._saver.last_saved

    def is_due(self, step: int) -> bool:
        """Say whether it is time to save in the middle of an epoch, at this update of the run.

        What is due while a save is in flight is so when that is done.
        """
        seconds = time.monotonic() - self._saved_at
        self._is_owed = self._is_owed or triggers.is_due(
            step, seconds, every_steps=self._every_steps, every_minutes=self.every_minutes
        )
        return self._is_owed and not self._saver.is_busy

    def reasons_to_save(self, epoch: int, crossed: bool = False) -> tuple[str, ...]:
        """Say why the end of this epoch is to be saved; empty when it is not."""
        return triggers.reasons_to_save(
            epoch, save_last=self._save_last, save_every=self._save_every, crossed=crossed
        )

    @in_turn
    def save(
        self,
        state: Mapping[str, Any],
        *,
        epoch: int,
        step: int | None = None,
        stages: int = 0,
        crossed: bool = False,
        finite: bool | Callable[[], bool] = True,
        info: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Save the state if this is the time for it; return where, else None.

        It is durable on return, or with `background` once `wait` has returned.

        Args:
            state: the state of each source by name.
            epoch: the epoch that has ended, or that is in progress when `step` is given.
            step: optimizer updates since the start of the run, in the middle of an epoch.
            stages: how many stages of that epoch are finished, in the middle of an epoch.
            crossed: whether a metric crossed its threshold in the epoch that has ended.
            finite: whether all weights are; if not, it never takes the place of one that is good.
                Or what tells: called on all ranks once the state is staged, so that it has time
                until then; what it raises ends this.
            info: plain values to keep with it: metrics by stage, config, sig, lineage. The policy,
                and which checkpoint the run goes on from, are added.

        Raises:
            CannotSave: the storage refused; the message says which checkpoint is the newest
                committed one. With `background`, it may be the save before this one that failed.
            UnsupportedState, CheckpointExists: nothing was written.
            ValueError: epoch or step cannot be.
        """
        self.wait()
        reasons = self.reasons_to_save(epoch, crossed) if step is None else (triggers.ROLLING,)
        if not reasons:
            return None
        kept = self._policy.kept_sources
        if kept is not None and not {triggers.ROLLING, triggers.THRESHOLD} & {*reasons}:
            state = {name: value for name, value in state.items() if name in kept}
        position = Position(epoch, step, stages)
        if Position.parse(position.name) != position or type(epoch) is not int:
            raise ValueError(f"epoch {epoch!r} and step {step!r} are no position of a run")
        info = {**(info or {}), "policy": self._policy.to_plain(), "resumed": self._resumed}
        self.failure = None
        try:
            self._ranks.run_on_rank0(partial(self._make_ready, position))
            self._catalog.leave(position, False)
            self._saver.save(state, position, lambda: _judged(reasons, finite), info)
        except CannotSave as error:
            self._failed(error)
            return None
        self._saved_at, self._is_owed = time.monotonic(), False
        where = self.storage.describe(position.name)
        if self._is_background:
            logger.debug("Saving %s in the background", where)
        else:
            self.wait()
        return where

    def _make_ready(self, position: Position) -> None:
        self._saver.lock.hold()
        self._catalog.make_way(position)

    @in_turn
    def wait(self) -> Saved | None:
        """Wait until what is being saved is durable; on all ranks.

        Returns:
            What was saved; None if there was nothing to wait for, or if it failed and `on_error`
            is `warn`.

        Raises:
            CheckpointError: saving failed, see `save`.
        """
        try:
            return self._saver.wait()
        except CannotSave as error:
            self._failed(error)
            return None

    def _failed(self, error: CannotSave) -> None:
        found = describe_newest(self.storage)
        if self._on_error == "stop":
            error.args = (f"{error}. {found}",)
            raise error
        self.failure = error
        self._saved_at, self._is_owed = time.monotonic(), False
        logger.error("Going on without this checkpoint, until the next save: %s. %s", error, found)

    def on_durable(self, action: Callable[[], None]) -> None:
        """Do something once what is being saved is durable; not if that fails, or has failed."""
        if self.failure is None:
            self._saver.on_durable(action)

    def join(self) -> None:
        """Wait for what this process is saving, whatever becomes of it; `wait` still tells."""
        self._saver.join()

    def wait_until_read(self) -> None:
        """Wait until the values of `Stable` sources may change."""
        self._saver.wait_until_read()

    @told(saving)
    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get the memory that saves of such a state in the background need; on all ranks.

        Another thread does, and the first save is as fast as the others. What is in the state does
        not matter, only shapes and dtypes. Without this, the first save gets the memory.

        Raises:
            UnsupportedState: see `check`.
        """
        self._saver.prepare(state)

    @told(saving)
    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that `save` could not save, before anything is trained.

        Warns when the disk has no room for the checkpoints to come.

        Raises:
            UnsupportedState: the message names source and key. Also for a name that is too long for
                the files of the source, once these are split and numbered.
        """
        sources = self._saver.encoded(state, self.storage.describe())
        if self._ranks.is_first:
            size = sum(map(size_of, sources.values()))
            warn_of_little_room(self.storage, self._policy, size, len(self.positions()))

    @told(reading)
    def positions(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return self._catalog.committed()

    def read_run_stats(self, manifest: Manifest) -> RunStats:
        """Return what the run knew of itself at a checkpoint, and of what came right after it."""
        return read_run_stats(self.storage, manifest)

    @in_turn
    def write_run_stats(self, position: Position, record: RunStats) -> None:
        """Note a start or an end of the run beside its newest checkpoint.

        Best effort: where that cannot be written, also since the lock was lost, the log says so,
        and the run goes on.

        Raises:
            CannotSave: another process saves into this folder.
        """
        was_held = self._saver.lock.is_held
        try:
            self._saver.lock.hold()
        except CannotSave as error:
            if not was_held:
                raise
            # Nothing that was saved is in danger, and the next save raises this.
            logger.warning("This start or end of the run is not noted: %s", error)
            return
        try:
            write_run_stats(self.storage, position.name, record)
        except (CheckpointError, OSError, MemoryError) as error:
            logger.info("This start or end of the run is not noted: %s", error)

    @told(reading)
    def interrupted(self) -> list[str]:
        """Folders of saves that never got to their commit."""
        return [self.storage.describe(p.name) for p in self._catalog.interrupted()]

    @in_turn
    @told(reading)
    def load(
        self,
        position: Position,
        sources: Choice = None,
        without: Collection[str] = (),
        *,
        like: Mapping[str, Any] | None = None,
        into: Mapping[str, Any] | None = None,
    ) -> Loaded:
        """Load one checkpoint, or some of its sources; see `load_newest`, and `reader.load`."""
        self._saver.join()
        self._saver.lock.look()
        wanted = Wanted(sources, without, like, Live(into or {}))
        return self._loader.one(position, wanted)

    @in_turn
    @told(reading)
    def load_newest(
        self,
        sources: Choice = None,
        without: Collection[str] = (),
        *,
        quarantine: bool = False,
        like: Mapping[str, Any] | None = None,
        into: Mapping[str, Any] | None = None,
    ) -> Loaded | None:
        """Load the newest good checkpoint; None when there are none at all.

        Damaged ones are passed over with a warning that names file and damage, and so are newer
        folders without a manifest, and files that are missing. A manifest that is missing or
        damaged is read from its copy. What is being saved is waited for.

        Args:
            sources: names of the sources to load, or what chooses them by the manifest; None for
                all.
            without: names of sources that are not loaded.
            quarantine: rename the damaged ones out of the way of new ones, put lost manifests back
                from their copies, and say in what is saved
                from now on that the run goes on from this one. For a run that is going to save:
                it takes the lock before it reads, see `lock`; where the storage refuses that, as
                one that is read-only does, it changes nothing. A reader takes no lock, and leaves
                the folder of another as it is.
            like: how tensors are to be laid out over the ranks, see `reader.load`.
            into: the live state by source, as it was given to `save`. Dense tensors on the CPU that
                share memory with no other in it are read into where name, dtype and shape fit: no
                memory is taken for them, and to load them costs nothing more. When this raises,
                they may hold half of a checkpoint: load again, or start again.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none is good; or the good one lacks a
                source that a damaged one was read into the live tensors of.
            MissingCheckpoint: others deleted all of them, one of which was being read into live
                tensors.
            UnreadableCheckpoint: the storage refused, so that nobody can say which is good.
            CannotSave: with `quarantine`, another process saves there.
        """
        self._saver.join()
        may_change = quarantine and self._ranks.run_on_rank0(self._saver.lock.hold_anew)
        self._saver.lock.look()
        wanted = Wanted(sources, without, like, Live(into or {}))
        if quarantine:
            # Before the disk changes: an interrupt must not leave an old memory of it.
            self._saver.forget()
        loaded = self._loader.newest(wanted, change=self._saver.lock.check if may_change else None)
        if loaded is not None:
            if quarantine:
                self._resumed = loaded.manifest.position.name
            self._saver.restored(loaded.manifest)
        return loaded

    @told(reading)
    def plan(self) -> list[retention.Verdict]:
        """Say which checkpoints stay, and why, from what is on disk; touches nothing."""
        self._saver.join()
        return self._keeper.plan()

    @in_turn
    def flush(self) -> None:
        """Delete what is stale, once what is being saved is durable; see `Keeper.flush`.

        Not while another process saves there, which is warned about.
        """
        if not self._ranks.is_first:
            return
        try:
            self._saver.lock.hold()
        except (CannotSave, OSError, MemoryError) as error:
            # As with all that a flush cannot do: other ranks would not know of an error.
            logger.warning("Could not flush: %s", error)
        else:
            self._saver.on_durable(partial(self._keeper.flush, self._saver.lock.check))

    @in_turn
    @told(saving)
    def lock(self) -> None:
        """Keep other processes from saving into this folder, until `close`; on all ranks.

        Call it before `load_newest`, or give that `quarantine`, which does so: what is loaded is
        then still the newest at the first save. Every `save`, `note` and `flush` holds the lock,
        and makes sure that this process has not lost it, such as when the folder was moved.

        Raises:
            CannotSave: another process saves there; or this process has lost the lock, or had
                loaded a checkpoint without it, and another process may have saved since. Nothing
                was saved or deleted.
        """
        self._ranks.run_on_rank0(self._saver.lock.hold)

    @in_turn
    def close(self) -> None:
        """Wait for what is being saved, then let others save into this folder.

        When an interrupt ends the wait, the save goes on and keeps the lock: close again.

        Raises:
            CheckpointError: saving failed.
        """
        try:
            self.wait()
        finally:
            if not self._saver.is_busy:
                self._saver.lock.release()


def _judged(reasons: tuple[str, ...], finite: bool | Callable[[], bool]) -> tuple[str, ...]:
    is_finite = finite() if callable(finite) else finite
    return reasons if is_finite else (*reasons, triggers.NONFINITE)
