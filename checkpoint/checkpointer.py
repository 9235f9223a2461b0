"""The checkpoints of one run: when to save, what to load, how many to keep."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from . import reader, retention, schedule, writer
from .errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint
from .layout import CHECKPOINTS, MANIFEST, Position, set_aside_name
from .manifest import Manifest
from .ranks import ALONE, Ranks
from .reader import Loaded
from .storage import LocalStorage, Storage

logger = logging.getLogger(__name__)


_ATTEMPTS = 20
"""How often a reader looks again while a run saves and flushes under it."""


class _Gone(Exception):
    """A checkpoint went away while it was read."""


class Checkpointer:
    """Saves, finds, loads and flushes the checkpoints of one experiment.

    Args:
        folder: the experiment's folder; checkpoints lie in its `checkpoints` folder.
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
        folder: Path,
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
        self.storage: Storage = LocalStorage(folder / CHECKPOINTS)
        self._save_last = save_last
        self._save_every = save_every
        self._keep_last = keep_last
        self._keep_every_states = keep_every_states
        self._always_kept = frozenset(always_kept)
        self._every_steps = every_steps
        self._every_minutes = every_minutes
        self._ranks = ranks
        self._saved_at = time.monotonic()
        # Of the checkpoint that was saved or loaded last.
        self._digests: dict[str, str] = {}
        self.unchanged: frozenset[str] = frozenset()
        self._known: dict[Position, tuple[Any, Manifest]] = {}

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
        if self._keep_every_states and not {schedule.ROLLING, schedule.THRESHOLD} & {*reasons}:
            kept = {*self._keep_every_states, *self._always_kept}
            state = {name: value for name, value in state.items() if name in kept}
        if not finite:
            reasons = (*reasons, schedule.NONFINITE)
        position = Position(epoch, step, stages)
        if Position.parse(position.name) != position or type(epoch) is not int:
            raise ValueError(f"epoch {epoch!r} and step {step!r} are no position of a run")
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
        return self._positions(committed=True)

    def interrupted(self) -> list[str]:
        """Folders of saves that never got to their commit."""
        return [self.storage.describe(p.name) for p in self._positions(committed=False)]

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
        self._check(loaded.manifest, position)
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
                if not self._ranks.first(partial(self._is_committed, position)):
                    raise _Gone from error
                logger.warning("Passing over a damaged checkpoint: %s", error)
                damaged.append((position, error))
                continue
            if set_aside:
                for bad, _ in damaged:
                    self._ranks.first(partial(self._set_aside, bad))
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
        return self._plan(self._outlines())

    def _plan(self, outlines: Mapping[Position, Manifest]) -> list[retention.Verdict]:
        return retention.plan(
            [
                retention.Existing(position, frozenset(one.reasons), frozenset(one.sources))
                for position, one in outlines.items()
            ],
            keep_last=self._keep_last,
            keep_every_states=self._keep_every_states,
            always_kept=self._always_kept,
        )

    def flush(self) -> None:
        """Delete what is stale, and what interrupted saves before the newest checkpoint left.

        A folder that cannot be deleted is warned about and tried again at the next flush.
        """
        if not self._ranks.is_first:
            return
        outlines = self._outlines()
        for verdict in self._plan(outlines):
            name, outline = verdict.position.name, outlines[verdict.position]
            try:
                if verdict.action == "delete":
                    writer.delete(self.storage, name)
                elif verdict.action == "thin":
                    self._thin(name, verdict.kept_sources)
                elif writer.leftovers(self.storage, name, outline):
                    self._thin(name, frozenset(outline.sources))
            except CheckpointError as error:
                logger.warning("Could not flush %s: %s", name, error)
        self._delete_interrupted()

    def _thin(self, name: str, kept: frozenset[str]) -> None:
        writer.thin(self.storage, name, reader.read_manifest(self.storage, name), kept)

    def _delete_interrupted(self) -> None:
        committed = self.positions()
        for position in self._positions(committed=False):
            if committed and position.order <= committed[-1].order:
                try:
                    self.storage.delete_folder(position.name)
                except CheckpointError as error:
                    logger.warning("Could not remove an interrupted save: %s", error)

    def _outlines(self) -> dict[Position, Manifest]:
        """Outlines of the committed checkpoints, oldest first, without the damaged ones.

        A manifest that has not changed on disk is not read again: with many, that takes seconds.
        """
        known, self._known = self._known, {}
        for position in self.positions():
            with suppress(CheckpointError):
                stamp = self.storage.stamp(f"{position.name}/{MANIFEST}")
                found = known.get(position)
                if found is None or found[0] != stamp:
                    manifest = reader.read_manifest(self.storage, position.name)
                    self._check(manifest, position)
                    found = stamp, manifest.outline()
                self._known[position] = found
        return {position: outline for position, (_, outline) in self._known.items()}

    def _check(self, manifest: Manifest, position: Position) -> None:
        if manifest.position != position:
            where = self.storage.describe(f"{position.name}/{MANIFEST}")
            raise CorruptCheckpoint(f"{where} is damaged: it is that of {manifest.position.name}")

    def _positions(self, *, committed: bool) -> list[Position]:
        found = (Position.parse(name) for name in self.storage.folders())
        chosen = [
            position
            for position in found
            if position is not None and self._is_committed(position) == committed
        ]
        return sorted(chosen, key=lambda position: position.order)

    def _is_committed(self, position: Position) -> bool:
        return self.storage.stamp(f"{position.name}/{MANIFEST}") is not None

    def _set_aside(self, position: Position) -> None:
        taken = set(self.storage.folders())
        attempt = 0
        while set_aside_name(position.name, attempt) in taken:
            attempt += 1
        name = set_aside_name(position.name, attempt)
        self.storage.rename_folder(position.name, name)
        logger.warning("Set the damaged checkpoint aside as %s", self.storage.describe(name))
