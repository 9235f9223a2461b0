"""How a run takes up the state of its experiment, or of another one."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from checkpoint import MissingCheckpoint
from checkpoint.integration import digests

from ..experiment import lookup
from ..health.unregistered_state import UnregisteredState
from ..run_context import RunContext
from ..settings.errors import ConfigError, did_you_mean
from ..state.module_modes import kept_in_evaluation, set_to_train
from ..state.precision import losses_reported
from ..state.progress import Progress
from ..state.registry import NOT_STATE, PER_RANK, StateRegistry
from ..state.rng import seed_rank
from ..state.source_loading import named
from ..state.sources import layouts_of
from ..weights.shadow_weights import ShadowWeights
from .found_state import FoundState
from .rank_comparison import refuse_differences
from .restore_plan import BEST, PRETRAINED, plan_restore
from .restore_targets import in_place_targets
from .resume_check import ResumeCheck
from .retuning import arguments
from .run_saver import RunSaver
from .state_loader import StateLoader
from .state_source import LoadedState, read_other, read_own

# A solver for evaluation is restored without these, whether it has them or not.
_OFTEN_IGNORED = ("optimizer", "ema")


class RunRestorer:
    """Restores the sources of a solver at the start of a run.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        saver: has the checkpointer, and learns which checkpoint was restored.
        loader: loads the state that was read.
        weights: the best state and the EMA.
        found: generators and modules, which are looked up before the restore.
        check: compares the resumed run with the restored checkpoint.
        unregistered: finds objects with a state that no source has.
        register: registers attributes of the solver.
        load_from_pretrained: of the solver.
        reads_in_place: whether a checkpoint may be read straight into live tensors. It may not if
            the solver loads the state itself.

    Attributes:
        owns_run: whether this process trains the experiment, and does not only look at it.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        saver: RunSaver,
        loader: StateLoader,
        *,
        weights: ShadowWeights,
        found: FoundState,
        check: ResumeCheck,
        unregistered: UnregisteredState,
        register: Callable[[str], None],
        load_from_pretrained: Callable[[str], dict[str, Any]],
        reads_in_place: bool,
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self._saver, self._loader, self._weights = saver, loader, weights
        self._found, self._check, self._unregistered = found, check, unregistered
        self._register, self._load_from_pretrained = register, load_from_pretrained
        self._reads_in_place = reads_in_place
        self.owns_run = False

    # Before the read.

    def prepare(self, modules: Mapping[str, nn.Module]) -> None:
        """Complete the registration of the solver, and check it.

        Args:
            modules: whose mode the framework sets, by name.

        Raises:
            ValueError: an optimizer, or a module that it trains, is in no source.
            ConfigError: a key names a source that the solver does not have.
        """
        for name in self._unregistered.unregistered():
            # Modules and optimizers are left to the user, because others hold their parameters.
            self._context.logger.info("Registering %r, which build_model did not", name)
            self._register(name)
        self._registry.check_complete()
        if self.owns_run:
            set_to_train(modules, self._registry.trained_parameters())
            for name in kept_in_evaluation(modules):
                self._context.logger.warning(
                    "self.%s is in evaluation mode, and an optimizer may train it: the mode stays, "
                    "so its dropout does nothing. If that is not meant, call self.%s.train() in "
                    "build_model, since many pretrained models are loaded in evaluation mode",
                    *(name, name),
                )
        self._found.look()
        self._check_kept_states()

    def _check_kept_states(self) -> None:
        settings = self._context.settings.checkpoint
        given = {
            "keep_every_states": settings.keep_every_states,
            "demote": settings.demote,
            "compress": settings.compress,
        }
        for key, names in given.items():
            for name in names or ():
                if name not in self._registry.sources:
                    raise ConfigError(
                        f"checkpoint.{key} has {name!r}, which is no source of this solver: "
                        f"{did_you_mean(name, self._registry.sources)}"
                    )

    # The read.

    def load(
        self, load_best: bool, ignored: Collection[str], updates_per_epoch: int
    ) -> dict[str, Any] | None:
        """Load the state that the run takes up; return it, None if there is none.

        Args:
            load_best: make the best weights the present weights.
            ignored: sources that stay as they are.
            updates_per_epoch: optimizer updates of an epoch.

        Raises:
            CheckpointError: there is a state, and it cannot be used.
            ValueError: a name in `ignored` is misspelt.
        """
        # Before the read, which may go straight into a learning rate that is a tensor.
        built = arguments(self._registry.optimizers())
        own = self._read_own(ignored, load_best)
        held = set() if own is None else set(own.state)
        if own is not None and own.manifest is not None:
            held = {*own.manifest.sources, *own.manifest.dropped}
        self._check_ignored(ignored, held)
        continue_from = self._context.settings.continue_from
        plan = plan_restore(None if own is None else own.where, continue_from, load_best)
        self._context.logger.info(plan.why)
        if plan.origin == "fresh":
            return None
        if own is None:
            return self._load_other(plan.origin, plan.reference)
        exact = self.owns_run and not (load_best or ignored or own.dropped)
        self._check.expect(own if exact else None)
        self._take_own(own)
        with named(own.where), losses_reported(own.where):
            self._loader.load_all(own, ignored, updates_per_epoch)
            if exact and own.manifest is not None:
                self._check.take_changes(own.manifest, built)
            if plan.load_best:
                self._loader.make_best(own.state, own.where)
        return own.state

    def _take_own(self, own: LoadedState) -> None:
        logger = self._context.logger
        self._saver.lineage = own.lineage.get("from")
        if own.manifest is not None:
            self._saver.pace.restored(own.manifest)
        if own.dropped:
            logger.warning(
                "%s was thinned (keep_every_states, demote): %s start afresh, so this is not the "
                "same run any more",
                *(own.where, ", ".join(own.dropped)),
            )
        if own.manifest is not None and not own.manifest.is_finite:
            logger.warning(
                "%s holds weights that are not finite: to go back to the newest good checkpoint, "
                "move that folder away",
                own.where,
            )

    def _load_other(self, origin: str, reference: str) -> dict[str, Any]:
        context = self._context
        other = context.ranks.run_everywhere(lambda: self._read_other(origin, reference))
        self._saver.lineage = other.lineage
        with named(other.where), losses_reported(other.where):
            self._loader.make_best(other.state, other.where)
        if self.owns_run and context.ranks.is_first and not context.keeps_nothing:
            other.keep_for(context.xp.sig, context.folder)
        return other.state

    def _read_other(self, origin: str, reference: str) -> LoadedState:
        if origin != "pretrained":
            return read_other(reference, self._context.folder.parent)
        name = reference.removeprefix(PRETRAINED)
        return LoadedState(self._load_from_pretrained(name), reference, {"path": reference})

    def _read_own(self, ignored: Collection[str], load_best: bool) -> LoadedState | None:
        own = read_own(
            self._saver.checkpointer,
            self._context.folder,
            ignored,
            quarantine=self.owns_run,
            like=self._layouts(),
            into=in_place_targets(self._registry.sources) if self._reads_in_place else {},
            overlaid=self._overlaid(ignored) if load_best else None,
            ranks=self._context.ranks,
        )
        if own is None:
            self._context.ranks.run_on_rank0(self._refuse_to_start_over)
        return own

    def _layouts(self) -> dict[str, Any] | None:
        """Return how this run has its tensors over the ranks; None where one process has them."""
        if self._context.ranks.size == 1:
            return None
        state = self._saver.state_dict()
        state = {k: v for k, v in state.items() if k not in (*NOT_STATE, *PER_RANK)}
        return layouts_of(state, self._registry.sources)

    def _overlaid(self, ignored: Collection[str]) -> Collection[str]:
        """Return the sources that need not be read where there is a best state of them."""
        if not self._reads_in_place or {*BEST} & {*ignored}:
            return ()
        return self._registry.sources.keys() & self._weights.best.states.keys()

    def _refuse_to_start_over(self) -> None:
        checkpointer, xp = self._saver.checkpointer, self._context.xp
        left = checkpointer.interrupted()
        if self._context.settings.checkpoint.save_last and lookup.has_trained(xp):
            found = f"the save of {', '.join(left)} never got to its commit" if left else ""
            raise MissingCheckpoint(
                f"{xp.link.history_file} says that epochs were committed, but "
                f"{checkpointer.storage.describe()} holds no checkpoint"
                + (f": {found}" if found else "")
                + ". Restore that folder from a backup, or start from the beginning with "
                "`dora run --clear`"
            )

    def _check_ignored(self, ignored: Collection[str], given: Collection[str]) -> None:
        """Refuse names that neither the solver nor the checkpoint has.

        Raises:
            ValueError: the message gives the nearest name, or the names that there are.
        """
        known = {*self._registry.sources, *given, *_OFTEN_IGNORED}
        for name in ignored:
            if name not in known:
                raise ValueError(
                    f"ignore_state_keys has {name!r}, which is no source of this solver or of the "
                    f"checkpoint: {did_you_mean(name, known)}"
                )

    # After the read.

    def compare_ranks(self) -> None:
        """Refuse to go on with ranks whose state differs, and write the history of this run.

        Raises:
            StateMismatch: the message names the source and the ranks.
        """
        context = self._context
        if context.ranks.size > 1:
            state = self._saver.state().items()
            shared = {k: v for k, v in state if k not in self._registry.per_rank}
            refuse_differences(
                context.ranks,
                {"epoch": context.epoch, "step": self._progress.step, **digests(shared)},
                "make build_model the same on every rank, and wrap models with self.wrap; what "
                "each rank has of its own goes to self.register_per_rank",
            )
        if not self.owns_run:
            return
        if context.history:
            # The run was killed between a checkpoint and its history, or set back to an older one.
            self._saver.write_history()
        self._unregistered.begin()

    def restore_generators(self, state: Mapping[str, Any] | None, load_best: bool) -> None:
        """Restore the global generators; last of all, so that nothing draws before the first batch.

        Args:
            state: that was loaded.
            load_best: whether only the weights of that state count.
        """
        ranks = self._context.ranks
        if state is not None and "random_state" in state and not load_best:
            self._registry.sources["random_state"].load_state_dict(state["random_state"])
        elif self.owns_run and (ranks.size > 1 or self._loader.ranks_changed):
            seed_rank(self._context.settings.seed, ranks, self._progress.step)
