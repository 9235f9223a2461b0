"""How the state of a run gets to disk: when, which state, and how the run ends."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from checkpoint import Checkpointer, Position
from checkpoint.integration import (
    Saved,
)

from ..experiment.history_projection import HistoryProjection
from ..health.monitor import HealthMonitor
from ..health.update_watch import UpdateWatch
from ..run_context import RunContext
from ..state.progress import Progress
from ..state.registry import StateRegistry
from ..weights.shadow_weights import ShadowWeights
from .checkpoint_contents import CheckpointContents
from .durability import Durable, Unsaved
from .found_state import FoundState
from .rank_comparison import compare_models
from .resume_check import ResumeCheck
from .save_interval import new_save_interval
from .score_threshold import ScoreThreshold
from .side_thread import beside


class RunSaver:
    """Saves the sources of a solver, and writes `history.json` after them.

    Args:
        context: of the run.
        checkpointer: of the run.
        registry: of the sources.
        progress: of the run.
        weights: must not be swapped during a save.
        monitor: checks before and after each save.
        found: generators and modules, which are looked up before each save.
        check: describes what comes next, for the check of a resumed run.
        watch: knows the gradients that wait for an update.
        state_dict: returns the state of the solver by source.
        register_found: registers schedules and a grad scaler that the solver did not register.

    Attributes:
        checkpointer: see above.
        state_dict: see above.
        pace: chooses how often to save in the middle of an epoch.
        durable: knows which updates are in a durable checkpoint.
        projection: `history.json`.
        total_updates: optimizer updates in the whole run.
        saved: position of the newest save that did not fail; None before the first save, and if
            the newest save failed.
        saved_step: the updates before that save.
        lineage: the checkpoint that the run continues from, as plain values.
        is_prepared: whether another thread got the memory for saves.
        is_in_flight: whether a save may not be durable yet.
    """

    def __init__(
        self,
        context: RunContext,
        checkpointer: Checkpointer,
        registry: StateRegistry,
        progress: Progress,
        *,
        weights: ShadowWeights,
        monitor: HealthMonitor,
        found: FoundState,
        check: ResumeCheck,
        watch: UpdateWatch,
        state_dict: Callable[[], dict[str, Any]],
        register_found: Callable[[], None],
    ) -> None:
        self._context, self.checkpointer = context, checkpointer
        self._registry, self._progress = registry, progress
        self._weights, self._monitor, self._found = weights, monitor, found
        self._watch, self._register_found = watch, register_found
        self.state_dict = state_dict
        self._contents = CheckpointContents(
            *(context, registry, progress, weights, check, watch, state_dict)
        )
        self._settings = context.settings.checkpoint
        self.pace = new_save_interval(self._settings, checkpointer, context.ranks)
        self.durable = Durable(checkpointer)
        self.projection = HistoryProjection(context.xp.link.history_file, context.logger)
        self._threshold = ScoreThreshold(context, progress)
        # Whether the score of this epoch crosses its threshold.
        self._crossed = False
        self.is_prepared = False
        self.total_updates = 0
        self.saved: Position | None = None
        self.saved_step: int | None = None
        self.is_in_flight = False
        self._checked: Saved | None = None
        self.lineage: dict[str, Any] | None = None
        weights.best.before_change = checkpointer.wait_until_read

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: all sources, without configuration and signature."""
        return self._contents.state()

    # Saves.

    def check_savable(self) -> None:
        """Refuse, before the first epoch, a state that no checkpoint can hold.

        Raises:
            UnsupportedState: the message names the source and the key.
        """
        if not self._context.keeps_nothing:
            self.checkpointer.check(self._contents.to_save())

    def prepare(self) -> None:
        """Let another thread get the memory for saves, once optimizers have their state.

        Raises:
            ValueError: the first update changed a module that nothing saves.
        """
        self.is_prepared = True
        self._found.look()
        self._monitor.refuse_unregistered()
        if self._settings.async_ and not self._context.keeps_nothing:
            self.checkpointer.prepare(self._contents.to_save())

    def save(self, epoch: int, step: int | None = None, added: int = 0) -> None:
        """Save the end of an epoch, or the middle of one if `step` is given, and flush.

        Args:
            epoch: that has ended, or is in progress.
            step: updates of the run so far.
            added: number of stages that were added to the epoch before, at the end of a run.

        Raises:
            CheckpointError: the save before this one failed, or this one did.
            ValueError: a module changes that nothing saves. All the rest is saved before.
        """
        if self._context.keeps_nothing:
            return
        began = time.monotonic()
        self.wait()
        escaped = self._check_before_save(is_end=step is None)
        metrics = self._context.history[-1] if added else self._context.metrics()
        self._progress.stages = dict(self._context.metrics()) if step is not None else {}
        stages = added or self._context.ranks.broadcast(len(self._progress.stages))
        position = Position(epoch, step, stages)
        self.durable.saving(position, self._progress.step)
        look = partial(self._registry.odd_weights, list(self._registry.sources))
        # Another thread reads the weights for this while they are copied.
        with beside(look, "finite") as odd:
            where = self.checkpointer.save(
                self._contents.with_gradients(self._contents.to_save()),
                epoch=epoch,
                step=step,
                stages=stages,
                crossed=self._crossed,
                finite=lambda: self._monitor.is_finite(odd()),
                info=self._contents.info(metrics, self.lineage, self.pace.to_plain()),
            )
        if where is not None:
            self._note_save(position, began)
        elif self.checkpointer.failure is not None:
            self.saved = self.saved_step = None
        if escaped:
            # After the save, so that the work of the epoch is not lost too.
            raise ValueError(escaped)

    def _check_before_save(self, *, is_end: bool) -> str | None:
        """Check what is to be saved; return why the run must not go on after the save."""
        if self._weights.is_swapped:
            raise RuntimeError(
                "a checkpoint was to be saved inside swap_best_state or swap_ema_state: it would "
                "hold those weights instead of the trained ones; save outside of the block"
            )
        if self._context.ranks.size > 1:
            self._weights.broadcast()
            compare_models(self._context.ranks, self._registry)
        self._weights.check_kept()
        self._monitor.before_save()
        self._register_found()
        self._found.look(everywhere=is_end)
        return self._monitor.compare_unregistered() if is_end else None

    def _note_save(self, position: Position, began: float) -> None:
        self.saved, self.is_in_flight = position, True
        self.saved_step = self._progress.step
        self._monitor.note_save()
        self._watch.gradients.note_save()
        self.checkpointer.flush()
        self.pace.saving(began)
        if not self._settings.async_:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, and take in its result.

        Raises:
            CheckpointError: it failed.
        """
        self.checkpointer.wait()
        saved = self.checkpointer.last_saved
        if self.is_in_flight and saved is self._checked:
            # It failed, and `checkpoint.on_error` is `warn`.
            self.saved = self.saved_step = None
        self.is_in_flight = False
        if saved is not None and saved is not self._checked:
            self._checked = saved
            self.durable.saved(saved.position)
            self._monitor.after_save(saved.unchanged)
            self.pace.saved(saved)

    # Epochs and their history.

    def begin_epoch(self) -> None:
        """Count a start of the run; before each epoch, and only the first one counts."""
        if not self._context.keeps_nothing:
            self.pace.begin(self.total_updates)

    def note_scores(self) -> None:
        """Note whether a metric of this epoch crosses its threshold; once, at the end of it."""
        self._crossed = self._threshold.observe()

    def write_history(self, anyway: bool = False) -> None:
        """Write `history.json` once the checkpoint is durable that the file is a projection of.

        Args:
            anyway: also if the write takes long, and the last write is not long ago.
        """
        if not self._context.ranks.is_first or self._context.keeps_nothing:
            return
        history = self._context.history
        if anyway or self.projection.is_due(len(history)):
            self.checkpointer.on_durable(partial(self.projection.write, list(history)))

    def save_added_stages(self, added: int) -> None:
        """Save the metrics that were added to the last epoch, where that epoch was saved.

        Args:
            added: number of stages that were added so far.
        """
        context = self._context
        if context.keeps_nothing:
            return
        if self.checkpointer.reasons_to_save(len(context.history)):
            self.pace.begin(self.total_updates)
            self.save(context.epoch, self._progress.step, added)
            # Durable before the next stage runs, so that no stage has to run again.
            self.wait()
        self.write_history(anyway=True)

    # The end of a run.

    def end(self, how: str) -> None:
        """Wait until everything is durable, and release the folder.

        Args:
            how: why the run ends, for its record. A run whose last save failed has no such record.

        Raises:
            CheckpointError: the last save failed.
        """
        self.wait()
        if self.projection.is_behind(len(self._context.history)):
            self.write_history(anyway=True)
        if self.checkpointer.failure is None:
            self.pace.end(how)
        self.checkpointer.close()

    def finish(self) -> None:
        """End a run whose last epoch is done.

        Raises:
            Unsaved: the last save failed, and `checkpoint.on_error` is `warn`; the message says
                what is lost.
            CheckpointError: the last save failed.
        """
        self.end("finished")
        if self.checkpointer.failure is not None:
            raise Unsaved(
                f"the run is done, and its last save failed: {self.checkpointer.failure}. "
                f"{self.durable.describe_end(self._context.epoch - 1, self._progress.step)}. Mend "
                "the cause, then give the same command again: it trains what is lost"
            )
