"""How a solver's state gets to disk: commit, saves, and the paths of checkpoints."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from checkpoint import Checkpointer, Position, StateMismatch
from checkpoint.integration import (
    AppendOnlyList,
    PerRank,
    RunStats,
    Saved,
    Stable,
    digests,
)

from ..distributed.wrappers import plain_state
from ..experiment import lookup
from ..experiment.history_file import HistoryLink
from ..experiment.history_projection import HistoryProjection
from ..health.monitor import Checks
from ..settings.errors import ConfigError
from ..settings.unread_keys import unrecorded
from ..settings.validate import parse, setting
from ..state.pending_gradients import GRADIENTS
from ..state.registry import unregistered_schedules, unwrap_source, with_names
from ..state.rng import RngState
from .durability import Durable, Unsaved
from .save_interval import SaveInterval
from .side_thread import beside

# What a restore must find whatever was thinned: small, and without it a run starts over.
_ALWAYS_KEPT = (
    *("history", "progress", "random_state", "loader_state", "generator_state", "module_modes"),
)
# Of these each rank has its own.
PER_RANK = ("progress", "random_state", "loader_state", "generator_state")
# Configuration and signature have a place of their own in a checkpoint.
NOT_STATE = ("xp.cfg", "xp.sig")


class Saving(Checks):
    """Saves and commits the sources of a solver."""

    def __init__(self, cfg: DictConfig) -> None:
        with unrecorded():
            parse(cfg)
        self.cfg = cfg
        self.dataloaders: dict[str, Any] = {}
        super().__init__()
        HistoryLink.put_into(self.xp)
        self.register_stateful("best_state", "fsdp_best_state")
        self.stateful.register("progress", self._progress)
        self.stateful.register("random_state", RngState())
        self.stateful.register("loader_state", self._loader_state)
        self.stateful.register("generator_state", self._generators)
        self.stateful.register("module_modes", self._module_modes)
        self.register_per_rank(*PER_RANK)
        self._of_framework_sources |= set(self.stateful.sources)
        self.checkpointer = Checkpointer(
            self.folder,
            save_last=setting(cfg, "checkpoint.save_last"),
            save_every=setting(cfg, "checkpoint.save_every"),
            every_steps=setting(cfg, "checkpoint.every_steps"),
            every_minutes=setting(cfg, "checkpoint.every_minutes"),
            background=setting(cfg, "checkpoint.async"),
            compress=setting(cfg, "checkpoint.compress") or (),
            verify_after_save=setting(cfg, "checkpoint.verify_after_save"),
            on_error=setting(cfg, "checkpoint.on_error"),
            ranks=self.ranks,
            **self._rules(),
        )
        self._saves_in_background: bool = setting(cfg, "checkpoint.async")
        self._checked: Saved | None = None
        self._is_in_flight = self._is_prepared = False
        self.best_state.before_change = self.checkpointer.wait_until_read
        self._pace = SaveInterval(
            self.checkpointer,
            auto=setting(cfg, "checkpoint.interval") == "auto",
            mtbf_hours=setting(cfg, "checkpoint.mtbf_hours"),
            max_overhead=setting(cfg, "checkpoint.max_overhead"),
            ranks=self.ranks,
        )
        self._growing = AppendOnlyList("history", self.ranks)
        self._projection = HistoryProjection(self.xp.link.history_file, self.logger)
        self._crossed = False
        self._keeps_nothing: bool = setting(cfg, "fast_dev_run")
        self._owns_run = False
        self._saved: Position | None = None
        # Updates up to the newest save that did not fail; None before the first one.
        self._saved_step: int | None = None
        self._durable = Durable(self.checkpointer)
        self._saves_every_epoch: bool = setting(cfg, "checkpoint.save_last")
        self._lineage: dict[str, Any] | None = None
        # Whether the restored checkpoint is in the middle of an epoch, until a stage begins.
        self._goes_on_in_epoch = False
        self._ranks_changed = False

    def _rules(self) -> dict[str, Any]:
        """Say which checkpoints stay, by the names of `checkpoint.policy`."""
        keep_best = setting(self.cfg, "checkpoint.keep_best")
        # Asked for only then: a subclass may not know before `build_model`.
        metric, mode = self._best_metric() if keep_best else (None, "min")
        if keep_best and metric is None:
            raise ConfigError(
                f"checkpoint.keep_best={keep_best} needs a metric: set checkpoint.best_metric, or "
                f"best_metric_name in {type(self).__name__}"
            )
        return {
            "keep_rolling": setting(self.cfg, "checkpoint.keep_rolling"),
            "keep_last": setting(self.cfg, "checkpoint.keep_last"),
            "keep_every": setting(self.cfg, "checkpoint.keep_every"),
            "keep_best": keep_best,
            "best_metric": metric,
            "best_mode": mode,
            "keep_hours": setting(self.cfg, "checkpoint.keep_hours"),
            "keep_resumed": setting(self.cfg, "checkpoint.keep_resumed"),
            "keep_every_states": setting(self.cfg, "checkpoint.keep_every_states"),
            "demote": setting(self.cfg, "checkpoint.demote"),
            "keep_demoted": setting(self.cfg, "checkpoint.keep_demoted"),
            "max_gb": setting(self.cfg, "checkpoint.max_gb"),
            "always_kept": _ALWAYS_KEPT,
        }

    def commit(self, save_checkpoints: bool = True) -> None:
        """End the epoch: history, checkpoint, flush, `history.json`, in this order."""
        self.history.append(self._pending_metrics)
        if save_checkpoints:
            self._crossed = self.crosses_threshold()
            self.save_checkpoints()
        self._start_epoch()
        self._update_history()

    def _update_history(self, anyway: bool = False) -> None:
        """Write `history.json`, once the checkpoint that it is a projection of is durable.

        Args:
            anyway: also if that takes long, and was done not long ago.
        """
        if not self.ranks.is_first or self._keeps_nothing:
            return
        if anyway or self._projection.is_due(len(self.history)):
            self.checkpointer.on_durable(partial(self._projection.write, list(self.history)))

    def save_checkpoints(self) -> None:
        """Save the end of the epoch that was just appended to the history, and flush."""
        self._save(self.epoch - 1)

    def _save(self, epoch: int, step: int | None = None, added: int = 0) -> None:
        """Save the end of an epoch, or the middle of one if `step` is given.

        Args:
            epoch: that has ended, or is in progress.
            step: updates of the run so far.
            added: how many stages were added to the epoch before, at the end of a run.
        """
        if self._keeps_nothing:
            return
        if self._swaps:
            raise RuntimeError(
                "a checkpoint was to be saved inside swap_best_state or swap_ema_state: it would "
                "hold those weights instead of the trained ones; save outside of the block"
            )
        began = time.monotonic()
        self._settle()
        self._compare_models()
        self.check_before_save()
        self._register_schedules()
        self._look_around(everywhere=step is None)
        escaped = self.look_for_escapes() if step is None else None
        self._progress.stages = dict(self._pending_metrics) if step is not None else {}
        stages = added or self.ranks.broadcast(len(self._progress.stages))
        look = partial(self.odd_weights_here, list(self.stateful.sources))
        self._durable.saving(Position(epoch, step, stages), self._progress.step)
        # While the same weights are copied.
        with beside(look, "finite") as odd:
            where = self.checkpointer.save(
                self._with_gradients(self._with_stable(self.plain_state())),
                epoch=epoch,
                step=step,
                stages=stages,
                crossed=self._crossed,
                finite=lambda: self.judge(odd()),
                info=self._info(self.history[-1] if added else self._pending_metrics),
            )
        if where is not None:
            self._saved, self._is_in_flight = Position(epoch, step, stages), True
            self._saved_step = self._progress.step
            self.note_save()
            self.checkpointer.flush()
            self._pace.saving(began)
            if not self._saves_in_background:
                self._settle()
        elif self.checkpointer.failure is not None:
            self._saved = self._saved_step = None
        if escaped:
            # After the save: what the epoch did is not lost, too.
            raise ValueError(escaped)

    def prepare_saves(self) -> None:
        """Let another thread get the memory for saves, now that optimizers have their state."""
        self._is_prepared = True
        self._look_around()
        self.refuse_early_escapes()
        if self._saves_in_background and not self._keeps_nothing:
            self.checkpointer.prepare(self._with_stable(self.plain_state()))

    def _settle(self) -> None:
        """Wait for the save in flight, and look at what it found.

        Raises:
            CheckpointError: it failed.
        """
        self.checkpointer.wait()
        saved = self.checkpointer.last_saved
        if self._is_in_flight and saved is self._checked:
            # It failed, and `checkpoint.on_error` says to go on.
            self._saved = self._saved_step = None
        self._is_in_flight = False
        if saved is not None and saved is not self._checked:
            self._checked = saved
            self._durable.saved(saved.position)
            self.check_after_save(saved.unchanged)
            self._pace.saved(saved)

    def _end_saving(self, how: str) -> None:
        """Let the run end when all is durable, and let others have the folder.

        Args:
            how: why it ends, for its record, which is not written if the last save failed.

        Raises:
            CheckpointError: the last save failed.
        """
        self._settle()
        if self._projection.is_behind(len(self.history)):
            self._update_history(anyway=True)
        if self.checkpointer.failure is None:
            self._pace.end(how)
        self.checkpointer.close()

    def _finish(self) -> None:
        """End a run whose last epoch is done.

        Raises:
            Unsaved: the last save failed, and `checkpoint.on_error` is `warn`; the message says
                what is lost.
            CheckpointError: the last save failed.
        """
        self._end_saving("finished")
        if self.checkpointer.failure is not None:
            raise Unsaved(
                f"the run is done, and its last save failed: {self.checkpointer.failure}. "
                f"{self._durable.describe_end(self.epoch - 1, self._progress.step)}. Mend the "
                "cause, then give the same command again: it trains what is lost"
            )

    def _compare_models(self) -> None:
        """Refuse to save models that have come apart, since one rank's would count for all.

        Raises:
            StateMismatch: the message names the source and the ranks.
        """
        if self.ranks.size == 1:
            return
        self._same_on_all_ranks()
        live = {name: unwrap_source(one) for name, one in self.stateful.sources.items()}
        models = {
            name: plain_state(one)
            for name, one in live.items()
            if isinstance(one, nn.Module) and name not in self._per_rank
        }
        self._refuse_differences(digests(models), lambda name: self._why_apart(live[name]))

    def _why_apart(self, module: nn.Module) -> str:
        """Say why the ranks may have come to different states of a module; on all ranks."""
        parts = {key: digests({"part": one})["part"] for key, one in module.state_dict().items()}
        everyone = self.ranks.all_gather(parts)
        odd = [key for key in parts if len({theirs.get(key) for theirs in everyone}) > 1]
        trained = {key for key, _ in module.named_parameters()}
        if trained & {*odd} or not odd:
            return (
                "the gradients were not averaged. Give the model to self.wrap in build_model and "
                "call it as self.model(...), or average them by flashy.distrib.sync_model"
            )
        return (
            f"{odd[0]!r} in it is no parameter, but what each rank counts by itself, as a metric "
            "does. Reset it at the end of its stage, or keep that of each rank by "
            "self.register_per_rank(name)"
        )

    def _refuse_differences(self, mine: Mapping[str, Any], why: str | Callable[[str], str]) -> None:
        everyone = self.ranks.all_gather(dict(mine))
        for name, value in everyone[0].items():
            odd = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != value]
            if odd:
                listed = ", ".join(map(str, odd))
                because = why if isinstance(why, str) else why(name)
                raise StateMismatch(f"ranks {listed} have another {name!r} than rank 0: {because}")

    def plain_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: all sources, without configuration and signature."""
        state = {k: v for k, v in self.state_dict().items() if k not in NOT_STATE}
        named = with_names(state, self.stateful.sources)
        return {k: PerRank(v) if k in self._per_rank else v for k, v in named.items()}

    def _with_stable(self, state: dict[str, Any]) -> dict[str, Any]:
        """Mark what says itself when it changes, unless a subclass remade it."""
        best, history = state.get("best_state"), state.get("history")
        if best is not None and self.best_state.is_state(best):
            state = {**state, "best_state": Stable(best, self.best_state.version)}
        if isinstance(history, list):
            state = {**state, "history": self._growing.to_save(history)}
        return state

    def _with_gradients(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add the gradients that wait for an update, if any rank has some."""
        if self._holds_back:
            self.logger.error(
                "FSDP2 holds gradients of no_sync that no update used: this save does not have them"
            )
        pending = self._gradients.state_dict()
        if self.ranks.all_reduce_max(len(pending["gradients"])) == (0,):
            return state
        return {**state, GRADIENTS: PerRank(pending)}

    def _info(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        upcoming = (self._progress.training or {}).get("upcoming")
        return {
            "sig": self.xp.sig,
            "argv": list(self.xp.argv),
            "config": lookup.plain_config(self.xp.cfg),
            "metrics": dict(metrics),
            "lineage": self._lineage,
            "changes": self._past_changes,
            "modes": dict(self._optimizer_modes),
            RunStats.KEY: self._pace.to_plain(),
            "next": self.ranks.all_gather(self._fingerprint(upcoming)),
        }

    def _start_epoch(self) -> None:
        super()._start_epoch()
        self._finished = set()

    def _register_stateful_objects(self) -> None:
        """Register what tells and takes a state, and was forgotten: there is no doubt what it is.

        Modules and optimizers are the user's to name, since others hold their parameters.
        """
        for name in self._escapes.unregistered():
            self.logger.info("Registering %r, which build_model did not", name)
            self.register_stateful(name)

    def _look_around(self, everywhere: bool = True) -> None:
        """Find the generators and the submodules there are now.

        Args:
            everywhere: on all that hangs on the solver, which takes milliseconds; or on its loaders
                only, where data sets make some late.
        """
        self._loader_state.look()
        if everywhere:
            self._generators.look()
            self._module_modes.look()

    def _register_schedules(self) -> None:
        for name in unregistered_schedules(vars(self), self.stateful.sources):
            self.logger.info("Registering %r, which build_model did not", name)
            self.register_stateful(name)

    def checkpoint_path(self, **kwargs: Any) -> Path:  # type: ignore[override]
        """Folder of the newest committed checkpoint; of the one to come when there is none."""
        positions = self.checkpointer.positions()
        return (
            self.epoch_checkpoint_path(self.epoch) if not positions else self._path(positions[-1])
        )

    def epoch_checkpoint_path(self, epoch: int, **kwargs: Any) -> Path:
        """Folder of the checkpoint at the end of an epoch."""
        return self._path(Position(epoch))

    def checkpoint_path_with_name(self, name: str, **kwargs: Any) -> Path:
        """Folder for a checkpoint of the user's own, which no policy touches."""
        return Path(self.checkpointer.storage.describe(name))

    def _path(self, position: Position) -> Path:
        return Path(self.checkpointer.storage.describe(position.name))
