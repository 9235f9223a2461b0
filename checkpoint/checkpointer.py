"""The checkpoints of one run: when to save, what to load, how many to keep."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import reader, retention, schedule, writer
from .catalog import Catalog
from .errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint
from .keeper import Keeper
from .layout import CHECKPOINTS, Position
from .ranks import ALONE, Ranks
from .reader import Loaded
from .storage import LocalStorage, Lock, Storage

logger = logging.getLogger(__name__)


_ATTEMPTS = 20
"""How often a reader looks again while a run saves and flushes under it."""


class _Gone(Exception):
    """A checkpoint went away while it was read."""


class Checkpointer:
    """Saves, finds, loads and flushes the checkpoints of one experiment.

    Args:
        folder: the experiment's folder; checkpoints lie in its `checkpoints` folder. Or a storage,
            in whose root they lie.
        save_last: keep a rolling checkpoint: the newest and, to fall back to, the one before.
        save_every: also keep the end of every N-th epoch; None for none.
        keep_last: how many of those periodic ones stay; None for all.
        keep_every_states: sources that a periodic one keeps once it is not a rolling one any more;
            None for all.
        always_kept: small sources that thinning never drops.
        every_steps: also save after every N-th optimizer update; None for none.
        every_minutes: also save when the last save is so long ago; None for none.
        ranks: who saves and loads together. Each of them calls `check`, `save`, `load`,
            `load_newest` and `flush` at the same time.

    Attributes:
        unchanged: sources whose tensors are, in the last save, what they were in the one before.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        folder: Path | Storage,
        *,
        save_last: bool = True,
        save_every: int | None = None,
        keep_last: int | None = None,
        keep_every_states: Sequence[str] | None = None,
        always_kept: Collection[str] = (),
        every_steps: int | None = None,
        every_minutes: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        counts = {"save_every": save_every, "keep_last": keep_last, "every_steps": every_steps}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}: give at least 1, or null for none")
        self.storage: Storage = (
            LocalStorage(folder / CHECKPOINTS) if isinstance(folder, Path) else folder
        )
        self._catalog = Catalog(self.storage)
        policy = retention.Policy(
            keep_last=keep_last,
            keep_every_states=tuple(keep_every_states) if keep_every_states else None,
            always_kept=frozenset(always_kept),
        )
        self._keeper = Keeper(self._catalog, policy)
        self._kept_sources = policy.kept_sources
        self._lock: Lock | None = None
        self._save_last = save_last
        self._save_every = save_every
        self._every_steps = every_steps
        self._every_minutes = every_minutes
        self._ranks = ranks
        self._saved_at = time.monotonic()
        # Of the checkpoint that was saved or loaded last.
        self._digests: dict[str, str] = {}
        self.unchanged: frozenset[str] = frozenset()

    def is_due(self, step: int) -> bool:
        """Say whether it is time to save in the middle of an epoch, at this update of the run."""
        seconds = time.monotonic() - self._saved_at
        return schedule.is_due(
            step, seconds, every_steps=self._every_steps, every_minutes=self._every_minutes
        )

    def reasons_to_save(self, epoch: int, crossed: bool = False) -> tuple[str, ...]:
        """Say why the end of this epoch is to be saved; empty when it is not."""
        return schedule.reasons_to_save(
            epoch, save_last=self._save_last, save_every=self._save_every, crossed=crossed
        )

    def save(
        self,
        state: Mapping[str, Any],
        *,
        epoch: int,
        step: int | None = None,
        stages: int = 0,
        crossed: bool = False,
        finite: bool = True,
        info: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Save the state if this is the time for it; return where once it is durable, else None.

        Args:
            state: the state of each source by name.
            epoch: the epoch that has ended, or that is in progress when `step` is given.
            step: optimizer updates since the start of the run, in the middle of an epoch.
            stages: how many stages of that epoch are finished, in the middle of an epoch.
            crossed: whether a metric crossed its threshold in the epoch that has ended.
            finite: whether all weights are; if not, it never takes the place of one that is good.
            info: plain values to keep with it: metrics, config, sig, lineage.

        Raises:
            CannotSave, UnsupportedState, CheckpointExists: nothing that was committed is touched.
            ValueError: epoch or step cannot be.
        """
        reasons = self.reasons_to_save(epoch, crossed) if step is None else (schedule.ROLLING,)
        if not reasons:
            return None
        kept = self._kept_sources
        if kept is not None and not {schedule.ROLLING, schedule.THRESHOLD} & {*reasons}:
            state = {name: value for name, value in state.items() if name in kept}
        if not finite:
            reasons = (*reasons, schedule.NONFINITE)
        position = Position(epoch, step, stages)
        if Position.parse(position.name) != position or type(epoch) is not int:
            raise ValueError(f"epoch {epoch!r} and step {step!r} are no position of a run")
        self.lock()
        manifest = writer.save(
            self.storage,
            position.name,
            state,
            position=position,
            reasons=reasons,
            info=info,
            ranks=self._ranks,
        )
        # The first rank alone has it.
        new = self._ranks.share({} if manifest is None else manifest.digests())
        before, self._digests = self._digests, new
        same = before.items() & self._digests.items()
        self.unchanged = frozenset(source for source, _ in same)
        self._saved_at = time.monotonic()
        return self.storage.describe(position.name)

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that `save` could not save, before anything is trained.

        Raises:
            UnsupportedState: the message names source and key.
        """
        self._ranks.together(lambda: writer.encoded(state, self._ranks))

    def positions(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return self._catalog.committed()

    def interrupted(self) -> list[str]:
        """Folders of saves that never got to their commit."""
        return [self.storage.describe(p.name) for p in self._catalog.interrupted()]

    def load(
        self,
        position: Position,
        sources: Collection[str] | None = None,
        without: Collection[str] = (),
        *,
        like: Mapping[str, Any] | None = None,
    ) -> Loaded:
        """Load one checkpoint, or some of its sources; see `reader.load`."""
        loaded = reader.load(
            self.storage, position.name, sources, without, ranks=self._ranks, like=like
        )
        self._catalog.check(loaded.manifest, position)
        return loaded

    def load_newest(
        self,
        sources: Collection[str] | None = None,
        without: Collection[str] = (),
        *,
        set_aside: bool = False,
        like: Mapping[str, Any] | None = None,
    ) -> Loaded | None:
        """Load the newest good checkpoint; None when there are none at all.

        Damaged ones are passed over with a warning that names file and damage.

        Args:
            sources: names of the sources to load; None for all.
            without: names of sources that are not loaded.
            set_aside: rename the damaged ones out of the way of new ones. For a run that is going
                to save; a reader leaves another's folder as it is.
            like: how tensors are to be laid out over the ranks, see `reader.load`.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none is good.
            UnreadableCheckpoint: the storage refused, so that nobody can say which is good.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self._load_newest(sources, without, set_aside, like)
            except _Gone:
                logger.info("Looking again: another process deleted a checkpoint meanwhile")
        return self._load_newest(sources, without, set_aside, like)

    def _load_newest(
        self,
        sources: Collection[str] | None,
        without: Collection[str],
        set_aside: bool,
        like: Mapping[str, Any] | None,
    ) -> Loaded | None:
        damaged: list[tuple[Position, CheckpointError]] = []
        for position in reversed(self._ranks.first(self.positions)):
            try:
                loaded = self.load(position, sources, without, like=like)
            except (CorruptCheckpoint, MissingCheckpoint) as error:
                if not self._ranks.first(partial(self._catalog.is_committed, position)):
                    raise _Gone from error
                logger.warning("Passing over a damaged checkpoint: %s", error)
                damaged.append((position, error))
                continue
            if set_aside:
                for bad, _ in damaged:
                    self._ranks.first(partial(self._catalog.set_aside, bad))
            self._digests = loaded.manifest.digests()
            return loaded
        if damaged:
            raise CorruptCheckpoint(
                f"none of the {len(damaged)} checkpoints in {self.storage.describe()} is good: "
                + "; ".join(str(error) for _, error in damaged)
                + ". Restore that folder from a backup, or move it away to start from the beginning"
            )
        return None

    def plan(self) -> list[retention.Verdict]:
        """Say which checkpoints stay, and why, from what is on disk; touches nothing."""
        return self._keeper.plan()

    def flush(self) -> None:
        """Delete what is stale; see `Keeper.flush`."""
        if self._ranks.is_first:
            self._hold()
            self._keeper.flush()

    def lock(self) -> None:
        """Keep other processes from saving into this folder, until `close`; on all ranks.

        Raises:
            CannotSave: another process does.
        """
        self._ranks.first(self._hold)

    def close(self) -> None:
        """Let others save into this folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _hold(self) -> None:
        if self._lock is None:
            self._lock = self.storage.lock()
