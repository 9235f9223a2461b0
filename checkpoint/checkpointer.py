"""The checkpoints of one run: when to save, what to load, how many to keep."""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .errors import CannotSave
from .format.compression import ZSTD, check_known
from .layout import ROLLING, THRESHOLD, Position
from .loading.run_reader import RunReader
from .machine_errors import reading, saving, translating_errors
from .ranks import ALONE, Ranks
from .retention.flusher import Flusher
from .retention.free_space import warn_of_little_room
from .retention.plan import Verdict
from .retention.rules import Policy
from .run_folder.catalog import Catalog, storage_of
from .run_folder.claims import in_turn
from .run_folder.file_trust import FileTrust
from .run_folder.newest import describe_newest
from .run_folder.run_stats import RunStats
from .saving.known_saves import Saved
from .saving.saver import Saver
from .saving.shards import size_of
from .scheduling.triggers import SaveClock, check_count, reasons_to_save, with_finite
from .storage import Storage

logger = logging.getLogger(__name__)


class Checkpointer(RunReader):
    """Saves, finds, loads and flushes the checkpoints of one experiment.

    Threads may share one, or use one each for a folder: their saves take turns. Only one process
    may save into a folder: it holds the lock. A fork may save after its parent has ended.

    Args:
        folder: folder of the experiment, whose `checkpoints` folder holds the checkpoints; or a
            storage with the checkpoints in its root.
        save_last: keep rolling checkpoints: the newest one, and the one before it as a fallback.
        save_every: also keep the end of every N-th epoch; None for none.
        every_steps: also save after every N-th optimizer update; None for none.
        every_minutes: also save this many minutes after the last save; None for none.
        background: `save` returns when the state is copied; the files are written while training
            goes on. The next save waits for it, and `is_due` is false until it is done. The next
            `save`, `wait` or `close` raises its error. The process does not end before.
        compress: sources whose files are compressed by zstd, which needs the extra `zstd`.
        verify_after_save: read each file back after it was saved, and compare it.
        on_error: `stop` raises the error of a save; `warn` logs it, and the run goes on.
        ranks: processes that save and load together. All of them call `check`, `save`, `wait`,
            `load`, `load_newest`, `lock`, `flush` and `close` at the same time.
        policy: which checkpoints stay. Each manifest holds it.
        rules: fields of a `Policy`, in place of `policy`.

    Attributes:
        failure: error of the last save, if that failed and `on_error` is `warn`; else None.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: there is no rule of that name, or both a policy and rules were given.
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
        policy: Policy | None = None,
        **rules: Any,
    ) -> None:
        if policy is not None and rules:
            raise TypeError(f"give a policy, or the rules {', '.join(rules)}, and not both")
        check_count("save_every", save_every)
        self._clock = SaveClock(every_steps, every_minutes)
        self._policy = Policy.of(**rules) if policy is None else policy
        if compress:
            check_known(ZSTD)
        self._save_last, self._save_every = save_last, save_every
        self._is_background, self._on_error = background, on_error
        self.failure: CannotSave | None = None
        catalog = Catalog(storage_of(folder))
        trust = FileTrust(catalog.storage)
        self._saver = Saver(
            catalog,
            ranks,
            trust=trust,
            background=background,
            # If a save may delete the checkpoint before it, the newest two could share files.
            links=save_last or self._policy.keep_last != 1,
            compress=frozenset(compress),
            verify=verify_after_save,
        )
        super().__init__(catalog, ranks, trust, self._saver)
        self._flusher = Flusher(catalog, self._policy)

    @property
    def last_saved(self) -> Saved | None:
        """The last save that became durable; None before that."""
        return self._saver.last_saved

    @property
    def every_minutes(self) -> float | None:
        """Minutes between two saves; it may be changed at any time."""
        return self._clock.every_minutes

    @every_minutes.setter
    def every_minutes(self, minutes: float | None) -> None:
        self._clock.every_minutes = minutes

    def is_due(self, step: int) -> bool:
        """Return whether to save after this update; false while a save is in flight."""
        return self._clock.is_due(step, self._saver.is_busy)

    def reasons_to_save(self, epoch: int, crossed: bool = False) -> tuple[str, ...]:
        """Return why the end of this epoch is saved; empty if it is not saved."""
        return reasons_to_save(
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
        """Save the state if a rule asks for it; return the path of the checkpoint, else None.

        The checkpoint is durable on return; with `background`, it is durable after `wait`.

        Args:
            state: the state of each source by name.
            epoch: the epoch that has ended, or that is in progress when `step` is given.
            step: optimizer updates since the start of the run, in the middle of an epoch.
            stages: number of finished stages of that epoch, in the middle of an epoch.
            crossed: whether a metric crossed its threshold in the epoch that has ended.
            finite: whether all weights are finite; if not, the checkpoint never takes the place of
                a good one. Or a function that returns this, called on all ranks after the state was
                copied; an exception from it ends the save.
            info: plain values to keep in the manifest: metrics by stage, config, sig, lineage.

        Raises:
            CannotSave: the storage refused, in the background maybe the save before this one; the
                message names the newest committed checkpoint.
            UnsupportedState, CheckpointExists: nothing was written.
            ValueError: epoch or step are not a position in a run.
        """
        self.wait()
        reasons = self.reasons_to_save(epoch, crossed) if step is None else (ROLLING,)
        if not reasons:
            return None
        kept = self._policy.kept_sources
        if kept is not None and not {ROLLING, THRESHOLD} & {*reasons}:
            state = {name: value for name, value in state.items() if name in kept}
        position = Position.checked(epoch, step, stages)
        info = {**(info or {}), "policy": self._policy.to_plain(), "resumed": self._resumed}
        self.failure = None
        try:
            self._ranks.run_on_rank0(partial(self._make_ready, position))
            self._catalog.leave(position, False)
            self._saver.save(state, position, lambda: with_finite(reasons, finite), info)
        except CannotSave as error:
            self._failed(error)
            return None
        self._clock.restart()
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
        """Wait until the save in flight is durable, and return it; on all ranks.

        It returns None if none was in flight, or if it failed and `on_error` is `warn`.

        Raises:
            CheckpointError: the save failed, see `save`.
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
        self._clock.restart()
        logger.error("Going on without this checkpoint, until the next save: %s. %s", error, found)

    def on_durable(self, action: Callable[[], None]) -> None:
        """Run a function after the save in flight is durable; not if that save fails or failed."""
        if self.failure is None:
            self._saver.on_durable(action)

    def join(self) -> None:
        """Wait until this process has ended its save in flight; `wait` still raises its error."""
        self._saver.join()

    def wait_until_read(self) -> None:
        """Wait until the values of `Stable` sources may change."""
        self._saver.wait_until_read()

    @translating_errors(saving)
    def prepare(self, state: Mapping[str, Any]) -> None:
        """Allocate the memory for background saves of such a state, in a thread; on all ranks.

        Only shapes and dtypes matter. Without this call, the first save allocates it, and is slow.

        Raises:
            UnsupportedState: see `check`.
        """
        self._saver.prepare(state)

    @translating_errors(saving)
    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that `save` could not save, before the training begins.

        It warns if the disk has no room for the next checkpoints.

        Raises:
            UnsupportedState: the message names source and key. Also for a source name that is too
                long for its files, which have numbers in their names.
        """
        sources = self._saver.states.encoded(state, self.storage.describe())
        if self._ranks.is_first:
            size = sum(map(size_of, sources.values()))
            warn_of_little_room(self.storage, self._policy, size, len(self.positions()))

    @in_turn
    def write_run_stats(self, position: Position, stats: RunStats) -> None:
        """Write statistics beside the newest checkpoint; see `RunLock.write_run_stats`."""
        self._saver.lock.write_run_stats(position, stats)

    @translating_errors(reading)
    def plan(self) -> list[Verdict]:
        """Return which checkpoints on disk stay, and why."""
        self._saver.join()
        return self._flusher.plan()

    @in_turn
    def flush(self) -> None:
        """Delete the stale checkpoints after the save in flight is durable; see `Flusher.flush`."""
        # Only rank 0 deletes, and it raises nothing: the other ranks would not know of an error.
        if self._ranks.is_first and (check := self._saver.lock.try_to_hold()) is not None:
            self._saver.on_durable(partial(self._flusher.flush, check))

    @in_turn
    @translating_errors(saving)
    def lock(self) -> None:
        """Keep other processes from saving into this folder, until `close`; on all ranks.

        Call it before `load_newest`, or pass `quarantine` to that: the loaded checkpoint is then
        still the newest at the first save. Every save and flush takes the lock too, and checks that
        it was not lost, for example because the folder was moved.

        Raises:
            CannotSave: another process saves there; or this process lost the lock, or loaded
                without it and another process may have saved since. Nothing was changed.
        """
        self._ranks.run_on_rank0(self._saver.lock.hold)

    @in_turn
    def close(self) -> None:
        """Wait for the save in flight, then let other processes save into this folder.

        It raises the error of that save. After an interrupt, the save goes on and keeps the lock:
        call this again.
        """
        try:
            self.wait()
        finally:
            if not self._saver.is_busy:
                self._saver.lock.release()
