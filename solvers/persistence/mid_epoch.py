"""Where in an epoch a run may be saved or stopped, so that it goes on there."""

import signal
from collections.abc import Callable
from typing import Any, NoReturn

from checkpoint import Position

from ..data.stage_progress import StageProgress
from ..health.update_watch import UpdateWatch
from ..run_context import RunContext
from ..state.pending_gradients import GRADIENTS
from ..state.progress import Progress
from ..state.registry import StateRegistry
from ..weights.shadow_weights import ShadowWeights
from .durability import UNSAVED, Unsaved
from .found_state import FoundState
from .preemption import Preemption
from .rollback import RollbackPoint
from .run_saver import RunSaver

# Sources that nothing changes within a stage.
_KEPT_IN_A_STAGE = ("history", "xp.cfg", "xp.sig", "fsdp_best_state", "module_modes")


class MidEpochSaver:
    """Saves in the middle of the train stage when that is due, or when a signal asks to stop.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        saver: makes the saves.
        weights: have an EMA or not, and set the modes of optimizers.
        found: generators that a stage may make anew.
        watch: tells whether an update was made.

    Attributes:
        signals: a context manager that notes the signals that ask to stop.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        saver: RunSaver,
        *,
        weights: ShadowWeights,
        found: FoundState,
        watch: UpdateWatch,
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self._saver, self._weights, self._found, self._watch = saver, weights, found, watch
        self.signals = Preemption(self._work_before_stop)
        # Of several ranks, a rank that fails cannot save with the others.
        wanted = context.settings.checkpoint.save_on_exception
        self._on_exception = wanted and context.ranks.size == 1
        self._rollback = RollbackPoint()
        if self._on_exception:
            watch.begins = self._rollback.forget

    # The train stage.

    def begin_epoch(self) -> None:
        """Find the optimizers of the solver, whose updates are watched."""
        self._watch.look()

    def end_epoch(self) -> None:
        """Forget the last update: the end of the epoch is saved by itself."""
        self._rollback.forget()

    def take_interrupted(self) -> dict[str, Any] | None:
        """Return, once, how far the train stage was when the run was interrupted in it."""
        interrupted, self._progress.training = self._progress.training, None
        self._saver.pace.stage_begins()
        # The flag may still be set from the last batch of the previous stage.
        self._watch.made = False
        self._watch.look()
        self._found.settle_generators()
        self._follow()
        return interrupted

    def between_updates(self, so_far: Callable[[int], StageProgress], done: int) -> None:
        """Save in the middle of the train stage, or stop there, if either is due.

        Called after each window of `optim.accumulation` batches. Gradients that wait for an update
        are saved, but for those that FSDP2 holds back in `no_sync`: a save waits for these.

        Args:
            so_far: returns how far the stage is after a number of batches.
            done: batches of the stage so far.
        """
        if self._on_exception:
            self._mark(so_far(done))
        saver, watch = self._saver, self._watch
        saver.pace.update()
        # Both stay true until the next save.
        due = saver.checkpointer.is_due(self._progress.step) or saver.pace.wants_first_save
        alone = self._context.ranks.size == 1 and saver.is_prepared
        if alone and not due and self.signals.received is None:
            # One process decides by itself. Most updates end here.
            watch.made = False
            return
        any_due, is_boundary = self._agree(due, not watch.holds_back)
        if watch.is_boundary() and not saver.is_prepared:
            saver.prepare()
        watch.made = False
        if is_boundary and (any_due or self.signals.asked):
            self._progress.training = so_far(done)()
            self.signals.check()
            saver.save(self._context.epoch, self._progress.step)
            self._progress.training = None

    def _mark(self, so_far: StageProgress) -> None:
        if self._watch.is_boundary():
            self._rollback.mark(so_far.kept())
        elif self._weights.ema is not None:
            # The EMA may have taken a step, and only an update goes with that.
            self._rollback.forget()

    def _follow(self) -> None:
        if self._on_exception:
            self._rollback.follow(self._rolled_back())

    def _rolled_back(self) -> dict[str, Any]:
        kept = _KEPT_IN_A_STAGE
        sources = {name: one for name, one in self._registry.sources.items() if name not in kept}
        return {**sources, GRADIENTS: self._watch.gradients}

    # Between stages.

    def between_stages(self, before: str) -> None:
        """Save the stages that are finished, so that no later error costs their work.

        Before valid only when a save is due; before evaluate and generate, which may take longest,
        always.

        Args:
            before: the stage that comes next.
        """
        self._weights.modes.set(training=False)
        if self._on_exception:
            self._follow()
            self._rollback.mark()
        is_due = self._saver.checkpointer.is_due(self._progress.step)
        due = all(self._agree(is_due, not self._watch.holds_back))
        if due if before == "valid" else self._context.settings.checkpoint.save_last:
            self._save_where_it_is()

    # Stops.

    def _work_before_stop(self) -> str:
        """Describe the work that the run finishes after a signal; nothing on other ranks.

        A handler of signals calls this, at any time in a run.
        """
        context = self._context
        if not context.ranks.is_first:
            return ""
        stage, epoch = context.stage(), context.epoch
        work = [f"the stage {stage} of epoch {epoch}" if stage else f"epoch {epoch}"]
        if stage == "train":
            work = [f"update {self._progress.step + 1} (epoch {epoch})"]
        if self._saver.is_in_flight and self._saver.saved is not None:
            work.append(f"the save of {self._saver.saved.name} that is being written")
        if not context.keeps_nothing:
            work.append("a last save")
        return " and ".join([", ".join(work[:-1]), work[-1]] if len(work) > 1 else work)

    def stop_if_asked(self) -> None:
        """Stop all ranks here if a signal asks one of them to.

        Raises:
            StopAsked: a signal does.
        """
        self._agree(False)
        self.signals.check()

    def stop_if_any_is_asked(self) -> None:
        """Stop as `stop_if_asked` does, after a stage of several ranks with unequal batches."""
        if self._context.ranks.size > 1:
            self.stop_if_asked()

    def leave(self) -> NoReturn:
        """End the process after a signal asked for it, with all finished work saved.

        Raises:
            SystemExit: see `Preemption.leave`.
        """
        saved = self._save_for_good()
        asked = self.signals.asked
        self._saver.end("stopped" if asked is None else asked.name)
        failure = self._saver.checkpointer.failure
        self.signals.leave(self._how_it_ends(saved), None if failure is None else UNSAVED)

    def _agree(self, due: bool, is_boundary: bool = True) -> tuple[bool, bool]:
        """Agree over the ranks: one rank that asks is enough, and a boundary must be on all.

        Returns:
            Whether a save is due, and whether all ranks are at a boundary.
        """
        asked = int(self.signals.received or 0)
        any_due, number, inside = self._context.ranks.all_reduce_max(
            int(due), asked, int(not is_boundary)
        )
        if number:
            # A signal that came meanwhile is still noted.
            self.signals.asked = signal.Signals(number)
        return bool(any_due), not inside

    # Errors.

    def save_after(self, error: Exception) -> None:
        """Save where the last update ended, if nothing of the next update is in the state.

        An update that had begun cannot be taken back, and then nothing is saved. Any other error
        here is logged, because the caller raises the first error.
        """
        if not self._on_exception:
            return
        logger = self._context.logger
        if not self._rollback.is_near(self._rolled_back()):
            logger.error("Nothing is saved after this error: an update had begun, or none was")
            return
        try:
            self._rollback.go_back()
            saved = self._save_for_good()
        except Exception as another:
            logger.error("Nothing could be saved after this error: %s", another)
        else:
            if self._saver.checkpointer.failure is None:
                self._saver.pace.end(type(error).__name__)
            logger.error("Ended by %s, %s", type(error).__name__, self._how_it_ends(saved))

    def say_what_is_lost(self, error: BaseException) -> None:
        """Log which updates are in no checkpoint, at the end by an error; on one process.

        Waits for the save in flight first, so that what was committed is there when the error is
        seen. Says nothing where the error says it, or where `save_after` did.
        """
        if self._context.ranks.size > 1:
            return
        self._saver.checkpointer.join()
        said = self._on_exception or self._context.keeps_nothing or isinstance(error, Unsaved)
        step = self._progress.step
        lost = "" if said else self._saver.durable.lost(self._context.epoch, step)
        if lost:
            self._context.logger.error("%s", lost)

    def _how_it_ends(self, saved: str | None) -> str:
        """Describe what is saved at an end in the middle, after a look at the checkpoints.

        Args:
            saved: where the last save was to go; None if there was nothing to save.
        """
        failure = self._saver.checkpointer.failure
        if saved and failure is None:
            return f"saved {saved}: the same command goes on"
        found = self._saver.durable.describe_end(self._context.epoch, self._progress.step)
        if failure is None:
            return f"with nothing new to save. {found}"
        return f"and the last save failed: {failure}. {found}. Mend the cause, then start again"

    # Saves of the place where the run is.

    def _save_for_good(self) -> str | None:
        """Save where the run is if that is needed, and wait until it is durable.

        Returns:
            Where, None if there was nothing to save. `checkpointer.failure` says whether the save
            failed, if `on_error` is `warn`.

        Raises:
            CheckpointError: the save failed.
        """
        saved = self._save_where_it_is()
        self._saver.wait()
        return saved

    def _save_where_it_is(self) -> str | None:
        """Save in the middle of the epoch, if something happened since the last save.

        Also before an epoch, if the end of the epoch before it is in no checkpoint.
        """
        saver, step, ranks = self._saver, self._progress.step, self._context.ranks
        saver.wait()
        if self._context.keeps_nothing:
            return None
        metrics = self._context.metrics()
        here = Position(self._context.epoch, step, ranks.broadcast(len(metrics)))
        begun = self._progress.training is not None or "train" in metrics
        is_behind = saver.saved_step != (step or saver.saved_step)
        is_new = saver.saved != here if begun else is_behind
        if not ranks.broadcast(is_new):
            return None
        saver.save(here.epoch, here.step)
        return saver.checkpointer.storage.describe(here.name)
