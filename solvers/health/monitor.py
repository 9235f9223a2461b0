"""Checks at each save: finite weights, weights that change, updates that are counted."""

from typing import Any

from checkpoint.integration import describe_newest

from ..run_context import RunContext
from ..settings.unread_keys import Reads, unrecorded, without_effect
from ..state.optimizers import Optimizer
from ..state.progress import Progress
from ..state.registry import StateRegistry
from .nonfinite_guard import FiniteGuard, NonFinite
from .unregistered_state import UnregisteredState
from .update_counts import UpdateActivity, UpdateCounts, trained_by, unchanged_sources


class HealthMonitor:
    """Finds training that goes wrong without an error, and settings that no code reads.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        reads: the record of the settings that code read.
        unregistered: compares the attributes of the solver that are in no source.

    Attributes:
        guard: looks at gradients and losses of each update.
        counts: of the updates of each optimizer.
        reads: see above.
        unregistered: see above.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        reads: Reads,
        unregistered: UnregisteredState,
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self.reads, self.unregistered = reads, unregistered
        ranks = context.ranks
        self.guard = FiniteGuard(
            context.settings.optim.on_nonfinite,
            context.folder,
            ranks.rank,
            progress,
            (lambda number: ranks.all_reduce_max(number)[0]) if ranks.size > 1 else None,
        )
        self.counts = UpdateCounts()
        # Of each optimizer: since the last save, and between the last save and the one before.
        self._activity: dict[str, UpdateActivity] = {}
        self._saved_activity: dict[str, UpdateActivity] = {}
        self._is_autocast_noted = False
        # Whether this process compared at the end of an epoch already.
        self._has_compared = False

    # Updates.

    def note_update(self, name: str, optimizer: Optimizer) -> None:
        """Count an update that an optimizer just made."""
        self.counts.note(name, optimizer)
        if (activity := self._activity.get(name)) is None:
            activity = self._activity[name] = UpdateActivity()
        activity.note(optimizer)

    # Before and after each save.

    def before_save(self) -> None:
        """Check all that is saved but the weights, which `is_finite` checks.

        Raises:
            NonFinite: a gradient or a loss was not finite, and `optim.on_nonfinite` is `stop`.
        """
        self.guard.look()
        for text in self.counts.differences(self._registry.optimizers()):
            self._context.logger.error(
                "%s: updates were made elsewhere, or its state was replaced", text
            )
        self._progress.updates = {name: list(one) for name, one in self.counts.counts.items()}

    def is_finite(self, odd_here: list[str]) -> bool:
        """Return whether all weights are finite, on all ranks.

        Args:
            odd_here: what `StateRegistry.odd_weights` returned on this rank.

        Raises:
            NonFinite: a weight is not finite, and `optim.on_nonfinite` is `stop`.
        """
        odd = self._context.on_any_rank(odd_here)
        if odd and self.guard.policy == "stop":
            raise NonFinite(
                f"nothing is saved: {odd[0]} is not finite any more ({len(odd)} such tensors), and "
                f"optim.on_nonfinite is stop. {describe_newest(self._context.folder)}"
            )
        if odd:
            self._context.logger.warning(
                "%s is not finite: this checkpoint takes the place of no good one", odd[0]
            )
        return not odd

    def note_save(self) -> None:
        """Begin to count the updates between this save and the next one."""
        self._saved_activity, self._activity = self._activity, {}

    def after_save(self, unchanged: frozenset[str]) -> None:
        """Log what training should have changed between the last two saves, and did not.

        Args:
            unchanged: sources whose tensors are the same in both checkpoints.
        """
        owners = trained_by(self._registry.live(), self._registry.optimizers())
        for source, updates, rate in unchanged_sources(unchanged, owners, self._saved_activity):
            if not rate:
                self._context.logger.warning("%r stands still: the learning rate is 0", source)
                continue
            self._context.logger.error(
                "%r is bit by bit what it was at the save before, after %d updates: nothing is "
                "learned. Does the optimizer have these very parameters, do gradients reach them, "
                "and is the learning rate large enough for their type?",
                *(source, updates),
            )

    # State that no source holds.

    def refuse_unregistered(self) -> None:
        """Refuse, after the first update of a process, modules that changed and that nothing saves.

        Raises:
            ValueError: the message names the modules.
        """
        modules, values = self.unregistered.compare(first=True)
        if modules:
            raise ValueError(self.unregistered.describe_modules(modules))
        self._warn_of(values)

    def compare_unregistered(self) -> str | None:
        """Log what changed since the last comparison and is in no source; at the end of an epoch.

        Returns:
            Why the run must not go on: a module changes. Only the first comparison returns this.
        """
        mine, values = self.unregistered.compare()
        self._warn_of(values)
        modules, is_first = self._context.on_any_rank(mine), not self._has_compared
        self._has_compared = True
        if not modules:
            return None
        found = self.unregistered.describe_modules(modules)
        if is_first:
            return found
        self._context.logger.error("%s", found)
        return None

    def _warn_of(self, values: list[list[str]]) -> None:
        for paths in values:
            self._context.logger.warning(
                "%s changes, and no checkpoint holds it, so a restart loses it: %s",
                *(", ".join(f"self.{path}" for path in paths), self.unregistered.advice(paths)),
            )

    # Settings.

    def note_autocast(self, is_on: bool) -> None:
        """Note that the solver used `autocast`; only the first call does something."""
        if not self._is_autocast_noted:
            self._is_autocast_noted = True
            self.reads.note("autocast", *(["autocast_dtype"] if is_on else []))

    def name_unread_settings(self, cfg: Any) -> None:
        """Warn of settings that no code read since the start; once, after a whole epoch.

        Args:
            cfg: the configuration of the solver.
        """
        if not self.reads.is_complete:
            return
        xp = self._context.xp
        # Keys that `dora.exclude` names are in the arguments alone.
        given = [one.lstrip("+").partition("=")[0] for one in xp.argv]
        overridden = {key for key, _ in xp.delta or ()} | set(given)
        with unrecorded():
            found = without_effect(cfg, self.reads.keys(), overridden)
        self.reads.stop()
        for sentence in found if self._context.ranks.is_first else ():
            self._context.logger.warning("%s", sentence)
