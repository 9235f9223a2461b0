"""How a run takes up the state of its experiment, or of another one."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from checkpoint import MissingCheckpoint, Position, StateMismatch
from checkpoint.integration import AllRanks, digests

from ..experiment import lookup
from ..log import table
from ..metrics import numbers
from ..settings.errors import ConfigError, did_you_mean
from ..settings.validate import setting
from ..state.module_modes import kept_in_evaluation
from ..state.pending_gradients import GRADIENTS
from ..state.precision import losses_reported
from ..state.progress import derive
from ..state.registry import (
    check_registered,
    is_stateful,
    layouts_of,
    load_source,
    load_sources,
    named,
)
from ..state.rng import seed_rank
from .restore_plan import BEST, PRETRAINED, RestoreOutcome, best_of, plan_restore, restore_outcomes
from .restore_targets import in_place_targets
from .retuning import arguments
from .run_saver import NOT_STATE, PER_RANK, Saving
from .state_source import LoadedState, read_other, read_own

# A solver for evaluation is restored without these, whether it has them or not.
_OFTEN_IGNORED = ("optimizer", "ema")


class Persistence(Saving):
    """Restores the sources of a solver."""

    def load_from_pretrained(self, name: str) -> dict[str, Any]:
        """Return `{'best_state': {'model': weights}}` for `continue_from=//pretrained/<name>`."""
        raise ConfigError(
            f"{type(self).__name__} has no pretrained models: override load_from_pretrained(name), "
            f"or set continue_from to something else than {PRETRAINED}{name}"
        )

    def restore(
        self,
        load_best: bool = False,
        replay_metrics: bool = False,
        ignore_state_keys: Collection[str] = (),
    ) -> bool:
        """Take up the state of the experiment, or of what it continues from.

        Args:
            load_best: make the best weights the present ones for good.
            replay_metrics: log the summary of every past epoch.
            ignore_state_keys: sources to leave as they are.

        Returns:
            False if there was nothing to restore from.

        Raises:
            CheckpointError: there is something to restore from, and it cannot be used.
            ValueError: a name in `ignore_state_keys` is misspelt.
        """
        self._register_schedules()
        self._register_stateful_objects()
        check_registered(vars(self), self.stateful.sources)
        if self._owns_run:
            self._set_first_modes()
        self._look_around()
        self._check_kept_states()
        state = self.load_checkpoints(load_best, ignore_state_keys)
        self._compare_ranks()
        if self._owns_run and self.history:
            # Killed between a checkpoint and its projection, or set back to an older one.
            self._update_history()
        if self._owns_run:
            self._escapes.begin()
        if replay_metrics:
            for epoch, stages in enumerate(self.history, start=1):
                for stage, values in stages.items():
                    self.result_logger._log_summary(
                        stage, numbers(values), step=epoch, formatter=self.get_formatter(stage)
                    )
        # Last of all: nothing may draw between here and the first batch.
        if state is not None and "random_state" in state and not load_best:
            self.stateful.sources["random_state"].load_state_dict(state["random_state"])
        elif self._owns_run and (self.ranks.size > 1 or self._ranks_changed):
            seed_rank(setting(self.cfg, "seed"), self.ranks, self._progress.step)
        return state is not None

    def _set_first_modes(self) -> None:
        self.set_to_train()
        for name in kept_in_evaluation(self.moded_modules()):
            self.logger.warning(
                "self.%s is in evaluation mode, and an optimizer may train it: the mode stays, so "
                "its dropout does nothing. If that is not meant, call self.%s.train() in "
                "build_model, since many pretrained models are loaded in evaluation mode",
                *(name, name),
            )

    def _compare_ranks(self) -> None:
        """Refuse to go on with ranks that do not have the same.

        Raises:
            StateMismatch: the message names what differs, and the ranks.
        """
        if self.ranks.size == 1:
            return
        shared = {k: v for k, v in self.plain_state().items() if k not in self._per_rank}
        self._refuse_differences(
            {"epoch": self.epoch, "step": self._progress.step, **digests(shared)},
            "make build_model the same on every rank, and wrap models with self.wrap; what each "
            "rank has of its own goes to self.register_per_rank",
        )

    def load_checkpoints(
        self, load_best: bool = False, ignore_state_keys: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """Load what `restore` is to take up; return the state that was loaded, None if none."""
        # Before the read, which may go straight into a learning rate that is a tensor.
        built = arguments(self._optimizers())
        own = self._read_own(ignore_state_keys, load_best)
        held = set() if own is None else set(own.state)
        if own is not None and own.manifest is not None:
            held = {*own.manifest.sources, *own.manifest.dropped}
        self._check_ignored(ignore_state_keys, held)
        plan = plan_restore(None if own is None else own.where, self._continue_from(), load_best)
        self.logger.info(plan.why)
        if plan.origin == "fresh":
            return None
        if own is not None:
            exact = self._owns_run and not (load_best or ignore_state_keys or own.dropped)
            self._restored = replace(own, state={}) if exact else None
            self._lineage = own.lineage.get("from")
            if own.manifest is not None:
                self._pace.restored(own.manifest)
            if own.dropped:
                self.logger.warning(
                    "%s was thinned (keep_every_states, demote): %s start afresh, so this is not "
                    "the same run any more",
                    own.where,
                    ", ".join(own.dropped),
                )
            if own.manifest is not None and not own.manifest.is_finite:
                self.logger.warning(
                    "%s holds weights that are not finite: to go back to the newest good "
                    "checkpoint, move that folder away",
                    own.where,
                )
            with named(own.where), losses_reported(own.where):
                self._load_all(own, ignore_state_keys)
                if exact and own.manifest is not None:
                    self.take_changes(own.manifest, built)
                if plan.load_best:
                    self._make_best(own.state, own.where)
            return own.state
        other = self.ranks.run_everywhere(lambda: self._read_other(plan.origin, plan.reference))
        self._lineage = other.lineage
        with named(other.where), losses_reported(other.where):
            self._make_best(other.state, other.where)
        if self._owns_run and self.ranks.is_first and not self._keeps_nothing:
            other.keep_for(self.xp.sig, self.folder)
        return other.state

    def _read_other(self, origin: str, reference: str) -> LoadedState:
        if origin != "pretrained":
            return read_other(reference, self.folder.parent)
        name = reference.removeprefix(PRETRAINED)
        return LoadedState(self.load_from_pretrained(name), reference, {"path": reference})

    def _layouts(self) -> dict[str, Any] | None:
        """Say how this run has its tensors over the ranks; None where one process has them."""
        if self.ranks.size == 1:
            return None
        state = {k: v for k, v in self.state_dict().items() if k not in (*NOT_STATE, *PER_RANK)}
        return layouts_of(state, self.stateful.sources)

    def _read_into(self) -> dict[str, Any]:
        """Give what a checkpoint is read straight into; nothing if a subclass loads it itself."""
        return in_place_targets(self.stateful.sources) if self._loads_by_itself else {}

    def _overlaid(self, ignored: Collection[str]) -> Collection[str]:
        """Name the sources that need not be read where there is a best state of them."""
        if not self._loads_by_itself or {*BEST} & {*ignored}:
            return ()
        return self.stateful.sources.keys() & self.best_state.states.keys()

    @property
    def _loads_by_itself(self) -> bool:
        return type(self).load_state_dict is Persistence.load_state_dict

    def _continue_from(self) -> str | None:
        return cast(str | None, setting(self.cfg, "continue_from"))

    def _read_own(self, ignored: Collection[str], load_best: bool) -> LoadedState | None:
        own = read_own(
            self.checkpointer,
            self.folder,
            ignored,
            quarantine=self._owns_run,
            like=self._layouts(),
            into=self._read_into(),
            overlaid=self._overlaid(ignored) if load_best else None,
            ranks=self.ranks,
        )
        if own is None:
            self.ranks.run_on_rank0(self._refuse_to_start_over)
        return own

    def _refuse_to_start_over(self) -> None:
        left = self.checkpointer.interrupted()
        if self._saves_every_epoch and lookup.has_trained(self.xp):
            found = f"the save of {', '.join(left)} never got to its commit" if left else ""
            raise MissingCheckpoint(
                f"{self.xp.link.history_file} says that epochs were committed, but "
                f"{self.checkpointer.storage.describe()} holds no checkpoint"
                + (f": {found}" if found else "")
                + ". Restore that folder from a backup, or start from the beginning with "
                "`dora run --clear`"
            )

    def _load_all(self, own: LoadedState, ignored: Collection[str]) -> None:
        left = self._left_to_best(own, ignored)
        derived = self._take_of_other_ranks(own) | left
        gradients = own.state.pop(GRADIENTS, {})
        given = {name: part for name, part in own.state.items() if not self._is_void(name, part)}
        with self.own_state():
            self.load_state_dict({k: v for k, v in given.items() if k not in ignored})
        modes = {} if own.manifest is None else own.manifest.info.get("modes", {})
        self.declare_optimizer_modes(
            {k: v for k, v in modes.items() if k in given and k not in ignored}
        )
        if GRADIENTS not in left:
            load_source(GRADIENTS, self._gradients, gradients)
        if "best_state" not in given or "best_state" in ignored:
            # As it was before these were loaded, it is that of untrained weights.
            for name in self.best_state.states:
                self.best_state.update(name, self.stateful.sources[name])
        if ("ema" not in given or "ema" in ignored) and "ema" not in derived:
            # Built from the weights before these were loaded.
            self.initialize_ema()
        self._goes_on_in_epoch = bool(self._progress.stages or self._progress.training)
        if self._goes_on_in_epoch:
            self._saved = Position(self.epoch, self._progress.step, len(self._progress.stages))
        self._finished = set(self._progress.stages)
        self._pending_metrics = dict(self._progress.stages)
        if "progress" not in given:
            self._progress.step = len(self.history) * self.train_updates_per_epoch
        self._saved_step = self._progress.step
        if own.manifest is not None:
            self._durable.saving(own.manifest.position, self._progress.step)
            self._durable.saved(own.manifest.position)
        given |= {GRADIENTS: gradients} if gradients else {}
        self._say_generators(own.state if "generator_state" not in ignored else None)
        rows = restore_outcomes(set(self._restorable()), set(given), ignored, derived)
        if self.ema is None and own.state.get("ema") is not None:
            rows.append(RestoreOutcome("ema", "dropped", "optim.ema.use is false now"))
        self._log_fates(rows)

    def _say_generators(self, state: Mapping[str, Any] | None) -> None:
        """Name the generators that start afresh, though the run goes on.

        Args:
            state: what was restored; None when the generators were not to be.
        """
        if state is None:
            return
        lacking = [f"self.{path}" for path in self._generators.lacking()]
        for name in [*lacking, *self._loader_state.lacking(state.get("loader_state") or {})]:
            self.logger.warning(
                "The checkpoint holds no state of the generator %s: it starts afresh", name
            )

    def settle_generators(self) -> None:
        """Restore what the beginning of the epoch made anew; before a stage, after a restore once.

        The log names the generators of the checkpoint that are not here.
        """
        for path in self._generators.settle(self._goes_on_in_epoch):
            self.logger.warning(
                "The checkpoint holds a state of the generator self.%s, which is not here: make it "
                "in build_model",
                path,
            )
        self._goes_on_in_epoch = False

    @staticmethod
    def _left_to_best(own: LoadedState, ignored: Collection[str]) -> dict[str, str]:
        """Name what was not read, since the best weights will be put over it."""
        held = set() if own.manifest is None else set(own.manifest.sources)
        return dict.fromkeys(held - own.state.keys() - {*ignored}, "load_best: see the table below")

    def _take_of_other_ranks(self, own: LoadedState) -> dict[str, str]:
        """Where another number of ranks saved, derive what each has of its own; say from what."""
        self._ranks_changed = own.world_size != self.ranks.size
        if not self._ranks_changed:
            return {}
        derived = {}
        for name in (self._per_rank | {GRADIENTS}) & own.state.keys():
            part = own.state[name]
            values = part.values if isinstance(part, AllRanks) else (part,)
            what = derive(name, values, self.ranks)
            if what is None:
                del own.state[name]
                if name == GRADIENTS:
                    self.logger.warning(
                        "%d ranks saved their parts of gradients that wait for an update: %d ranks "
                        "cannot take these up, and go on without them",
                        *(own.world_size, self.ranks.size),
                    )
            else:
                own.state[name] = what
                derived[name] = f"{own.world_size} ranks saved it and {self.ranks.size} go on"
        return derived

    def _check_kept_states(self) -> None:
        keys = ("checkpoint.keep_every_states", "checkpoint.demote", "checkpoint.compress")
        for key in keys:
            for name in setting(self.cfg, key) or ():
                if name not in self.stateful.sources:
                    raise ConfigError(
                        f"{key} has {name!r}, which is no source of this solver: "
                        f"{did_you_mean(name, self.stateful.sources)}"
                    )

    def _check_ignored(self, ignored: Collection[str], given: Collection[str]) -> None:
        """Refuse names that neither the solver nor the checkpoint has.

        Raises:
            ValueError: the message gives the nearest name, or those that there are.
        """
        known = {*self.stateful.sources, *given, *_OFTEN_IGNORED}
        for name in ignored:
            if name not in known:
                raise ValueError(
                    f"ignore_state_keys has {name!r}, which is no source of this solver or of the "
                    f"checkpoint: {did_you_mean(name, known)}"
                )

    def _is_void(self, name: str, part: Any) -> bool:
        """Whether a source was nothing then, or is nothing now, as an EMA that is switched."""
        if name == "ema" and self.ema is None:
            return True
        source = self.stateful.sources.get(name)
        return part is None and source is not None and is_stateful(source)

    def _restorable(self) -> Iterator[str]:
        for name in self.stateful.sources:
            is_void = name in self._void_sources()
            if name not in NOT_STATE and not is_void:
                yield name

    def _void_sources(self) -> set[str]:
        """Name the sources of the framework that hold nothing in this solver."""
        held = {"ema": self.ema, "generator_state": self._generators.state_dict()}
        return {name for name, one in held.items() if one is None or one == {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the registered sources, each strictly; the random generators come later."""
        sources = dict(self.stateful.sources)
        load_sources(sources, state, ignored=("random_state", *NOT_STATE))

    def _make_best(self, state: Mapping[str, Any], where: str) -> None:
        """Make the best weights of a state the present ones, of the EMA and the best state too."""
        best = best_of(state, where)
        rows = restore_outcomes(set(self.best_state.states) | {"model"}, set(best), ())
        if not best.keys() & self.stateful.sources.keys():
            raise StateMismatch(
                f"{where} holds the best state of {', '.join(map(repr, best))}, and this solver "
                "registers none of these: nothing would be continued from"
            )
        kept = {name: part for name, part in best.items() if name in self.best_state.states}
        if kept:
            # Through the solver, whose subclass may know how to read what an older one wrote.
            self.load_state_dict({"best_state": {**self.best_state.state_dict(), **kept}})
        for name, part in best.items():
            if name in self.stateful.sources:
                part = self.best_state.states.get(name, part)
                load_source(name, self.stateful.sources[name], part)
            else:
                rows.append(RestoreOutcome(name, "dropped", "this solver does not register it"))
        for name in self.best_state.states:
            self.best_state.update(name, self.stateful.sources[name])
        self.fsdp_best_state.clear()
        self.declare_optimizer_modes(dict.fromkeys(self._optimizer_modes, False))
        self.initialize_ema()
        self._log_fates(rows)

    def _log_fates(self, rows: list[RestoreOutcome]) -> None:
        lines = [(one.source, one.what, one.why) for one in rows]
        self.logger.info("State of this run:\n%s", table(("source", "is", "because"), lines))
