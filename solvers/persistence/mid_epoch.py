"""Where in an epoch a run may be saved or stopped, so that it goes on there."""

import signal
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from omegaconf import DictConfig

from checkpoint import Position

from ..data.stage_progress import StageProgress
from ..optim.update import Window
from ..settings.errors import ConfigError
from ..settings.validate import setting
from ..state.optimizers import Optimizer, watch
from ..state.pending_gradients import GRADIENTS, GradientUse
from ..state.registry import inner_optimizers
from .durability import UNSAVED, Unsaved
from .preemption import Preemption
from .rollback import RollbackPoint
from .run_restorer import Persistence


class Interruptible(Persistence):
    """Saves in the middle of the train stage when that is due, or when a signal asks to stop."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self._preemption = Preemption(self._work_before_stop)
        # Optimizers whose updates are noted, and whether one was made in this batch.
        self._watched: dict[str, int] = {}
        self._watched_inside: dict[str, int] = {}
        self._updated = False
        self._window = Window(setting(cfg, "optim.accumulation"))
        wanted: bool = setting(cfg, "checkpoint.save_on_exception")
        # Of several ranks, one that fails cannot save with the others.
        self._on_exception = wanted and self.ranks.size == 1
        self._boundary = RollbackPoint()

    def take_interrupted(self) -> dict[str, Any] | None:
        """Give, once, how far the train stage was when the run was interrupted in it."""
        interrupted, self._progress.training = self._progress.training, None
        self._pace.stage_begins()
        # Nobody asked behind the last batch of the stage before.
        self._updated = False
        self.watch_updates()
        self.settle_generators()
        if self._on_exception:
            self._boundary.follow(self._rolled_back())
        return interrupted

    def watch_updates(self) -> None:
        """Have each optimizer tell of its updates; again, look for new ones."""
        self._gradients.look()
        mine = self._optimizers()
        for name, value in mine.items():
            if self._watched.get(name) == id(value):
                continue
            if name in self._watched:
                # Another one than before: it is believed what it says of itself.
                self._counts.forget(name)
            use = self._gradients.watch(name, value)
            before = partial(self._before_update, name, use)
            watch(value, before, partial(self._after_update, name, use))
            self._watched[name] = id(value)
        for name, value in inner_optimizers(vars(self)).items():
            is_known = self._watched_inside.get(name) == id(value)
            if not is_known and not any(value is one for one in mine.values()):
                use = self._gradients.watch(name, value)
                watch(value, _alone(use.before_update), _alone(use.after_update))
                self._watched_inside[name] = id(value)

    def _before_update(self, name: str, use: GradientUse, optimizer: Optimizer, *_: Any) -> None:
        if not self._window.is_due:
            raise ConfigError(
                f"optim.accumulation={self._window.length}, but {name!r} makes a step in each "
                "batch: give the loss to self.optimize, which gathers gradients, or make the step "
                "`if self.is_update_due`, or set optim.accumulation=1"
            )
        use.before_update()
        if self._current_stage == "train":
            self.finite_guard.before_update(name, optimizer)
        if self._on_exception:
            self._boundary.forget()

    def _after_update(self, name: str, use: GradientUse, optimizer: Optimizer, *_: Any) -> None:
        use.after_update()
        self.note_update(name, optimizer)
        self._updated, self._holds_back = True, False

    def between_updates(self, so_far: Callable[[int], StageProgress], done: int) -> None:
        """Save in the middle of the train stage, or stop there, if either is due.

        Called after each window of `optim.accumulation` batches. Gradients that wait for an update
        are saved, but for those that FSDP2 holds back in `no_sync`: a save waits for these.

        Args:
            so_far: says how far the stage is after so many batches.
            done: batches of the stage so far.
        """
        if self._on_exception:
            self._mark(so_far(done))
        self._pace.update()
        # Either stays so until there was a save.
        due = self.checkpointer.is_due(self._progress.step) or self._pace.wants_first_save
        alone = self.ranks.size == 1 and self._is_prepared
        if alone and not due and self._preemption.received is None:
            # Nobody to agree with: what most updates come to.
            self._updated = False
            return
        any_due, is_boundary = self._agree(due, not self._holds_back)
        if self._is_after_update() and not self._is_prepared:
            self.prepare_saves()
        self._updated = False
        if is_boundary and (any_due or self._preemption.asked):
            self._progress.training = so_far(done)()
            self._preemption.check()
            self._save(self.epoch, self._progress.step)
            self._progress.training = None

    def _work_before_stop(self) -> str:
        """Say which work the run finishes after a signal asked it to stop; nothing on other ranks.

        A handler of signals calls it, at any time in a run.
        """
        if not self.ranks.is_first:
            return ""
        stage = self._current_stage
        work = [f"the stage {stage} of epoch {self.epoch}" if stage else f"epoch {self.epoch}"]
        if stage == "train":
            work = [f"update {self._progress.step + 1} (epoch {self.epoch})"]
        if self._is_in_flight and self._saved is not None:
            work.append(f"the save of {self._saved.name} that is being written")
        if not self._keeps_nothing:
            work.append("a last save")
        return " and ".join([", ".join(work[:-1]), work[-1]] if len(work) > 1 else work)

    def stop_if_asked(self) -> None:
        """Stop all ranks here if a signal asks one of them to.

        Raises:
            StopAsked: one does.
        """
        self._agree(False)
        self._preemption.check()

    def _leave(self) -> NoReturn:
        """End the process after a signal asked for it, with all that was done saved.

        Raises:
            SystemExit: see `Preemption.leave`.
        """
        saved = self._save_for_good()
        asked = self._preemption.asked
        self._end_saving("stopped" if asked is None else asked.name)
        failure = self.checkpointer.failure
        self._preemption.leave(self._how_it_ends(saved), None if failure is None else UNSAVED)

    def _agree(self, due: bool, is_boundary: bool = True) -> tuple[bool, bool]:
        """What is due on one rank, or asked of it, is so on all; a boundary has to be on all.

        Returns:
            Whether a save is due, and whether all are at a boundary.
        """
        asked = int(self._preemption.received or 0)
        any_due, number, inside = self.ranks.all_reduce_max(int(due), asked, int(not is_boundary))
        if number:
            # A signal that came meanwhile is still noted.
            self._preemption.asked = signal.Signals(number)
        return bool(any_due), not inside

    def _mark(self, so_far: StageProgress) -> None:
        if self._is_after_update():
            self._boundary.mark(so_far.kept())
        elif self.ema is not None:
            # It may have taken a step, and only an update goes with that.
            self._boundary.forget()

    def _rolled_back(self) -> dict[str, Any]:
        # What nothing changes within a stage.
        kept = ("history", "xp.cfg", "xp.sig", "fsdp_best_state", "module_modes")
        sources = {name: one for name, one in self.stateful.sources.items() if name not in kept}
        return {**sources, GRADIENTS: self._gradients}

    def save_after(self, error: Exception) -> None:
        """Save where the last update ended, if nothing of the next one is in the state.

        An update that had begun cannot be taken back, and then nothing is saved. Whatever goes
        wrong here is logged: the error that is on its way is the one to be seen.
        """
        if not self._on_exception:
            return
        if not self._boundary.is_near(self._rolled_back()):
            self.logger.error("Nothing is saved after this error: an update had begun, or none was")
            return
        try:
            self._boundary.go_back()
            saved = self._save_for_good()
        except Exception as another:
            self.logger.error("Nothing could be saved after this error: %s", another)
        else:
            if self.checkpointer.failure is None:
                self._pace.end(type(error).__name__)
            self.logger.error("Ended by %s, %s", type(error).__name__, self._how_it_ends(saved))

    def say_what_is_lost(self, error: BaseException) -> None:
        """Log which updates are in no checkpoint, at the end by an error; on one process.

        Not where the error says it, or where `save_after` did.
        """
        said = self._on_exception or self._keeps_nothing or isinstance(error, Unsaved)
        lost = "" if said else self._durable.lost(self.epoch, self._progress.step)
        if lost:
            self.logger.error("%s", lost)

    def _how_it_ends(self, saved: str | None) -> str:
        """Say what is saved at an end in the middle, after a look.

        Args:
            saved: where the last save was to go; None if there was nothing to save.
        """
        failure = self.checkpointer.failure
        if saved and failure is None:
            return f"saved {saved}: the same command goes on"
        found = self._durable.describe_end(self.epoch, self._progress.step)
        if failure is None:
            return f"with nothing new to save. {found}"
        return f"and the last save failed: {failure}. {found}. Mend the cause, then start again"

    def between_stages(self, before: str) -> None:
        """Save behind the stages that are finished, so that no error later costs what they did.

        Before valid only when a save is due; before what may take longest, always.

        Args:
            before: the stage that comes next.
        """
        self.set_optimizer_modes(training=False)
        if self._on_exception:
            self._boundary.follow(self._rolled_back())
            self._boundary.mark()
        due = all(self._agree(self.checkpointer.is_due(self._progress.step), not self._holds_back))
        if due if before == "valid" else self._saves_every_epoch:
            self._save_where_it_is()

    def _is_after_update(self) -> bool:
        return self._updated or not self._watched

    def _save_for_good(self) -> str | None:
        """Save where the run is if that is needed, and wait until it is durable.

        Returns:
            Where, None if there was nothing to save. `checkpointer.failure` says whether the save
            failed, if `on_error` is `warn`.

        Raises:
            CheckpointError: the save failed.
        """
        saved = self._save_where_it_is()
        self._settle()
        return saved

    def _save_where_it_is(self) -> str | None:
        """Save in the middle of the epoch, if something happened since the last save.

        Also before an epoch, if the end of the one before it is in no checkpoint.
        """
        self._settle()
        if self._keeps_nothing:
            return None
        stages = self.ranks.broadcast(len(self._pending_metrics))
        here = Position(self.epoch, self._progress.step, stages)
        begun = self._progress.training is not None or "train" in self._pending_metrics
        is_behind = self._saved_step != (self._progress.step or self._saved_step)
        is_new = self._saved != here if begun else is_behind
        if not self.ranks.broadcast(is_new):
            return None
        self._save(here.epoch, here.step)
        return self.checkpointer.storage.describe(here.name)


def _alone(action: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: action()
