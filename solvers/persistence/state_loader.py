"""How the state of a checkpoint gets into a run: the whole state, or the best weights of it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from checkpoint import Position, StateMismatch
from checkpoint.integration import AllRanks, format_table

from ..health.update_watch import UpdateWatch
from ..run_context import RunContext
from ..state.pending_gradients import GRADIENTS
from ..state.progress import Progress, derive
from ..state.registry import NOT_STATE, StateRegistry
from ..state.source_loading import load_source
from ..state.sources import is_stateful
from ..weights.shadow_weights import ShadowWeights
from .found_state import FoundState
from .restore_plan import RestoreOutcome, best_of, restore_outcomes
from .run_saver import RunSaver
from .state_source import LoadedState


class StateLoader:
    """Loads a state that was read into the sources of a solver, and logs a table of it.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        saver: learns which checkpoint the state comes from.
        weights: the best state and the EMA.
        found: generators and loaders.
        watch: has the gradients that wait for an update.
        load_state_dict: of the solver.
        initialize_ema: of the solver; builds the EMA from the present weights.

    Attributes:
        ranks_changed: whether another number of ranks saved the state that was loaded last.
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
        load_state_dict: Callable[[dict[str, Any]], None],
        initialize_ema: Callable[[], None],
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self._saver, self._weights, self._found, self._watch = saver, weights, found, watch
        self._load_state_dict, self._initialize_ema = load_state_dict, initialize_ema
        self.ranks_changed = False

    # The state of the experiment itself.

    def load_all(self, own: LoadedState, ignored: Collection[str], updates_per_epoch: int) -> None:
        """Load a checkpoint of the experiment itself.

        Args:
            own: the state that was read.
            ignored: sources that stay as they are.
            updates_per_epoch: optimizer updates of an epoch, for states without progress.
        """
        left = _left_to_best(own, ignored)
        derived = self._take_of_other_ranks(own) | left
        gradients = own.state.pop(GRADIENTS, {})
        given = {name: part for name, part in own.state.items() if not self._is_void(name, part)}
        with self._weights.loads_own_state():
            self._load_state_dict({k: v for k, v in given.items() if k not in ignored})
        taken = given.keys() - {*ignored}
        self._declare_modes(own, taken)
        if GRADIENTS not in left:
            load_source(GRADIENTS, self._watch.gradients, gradients)
        if "best_state" not in taken:
            # Before, the best state was that of untrained weights.
            self._weights.take_as_best()
        if "ema" not in taken and "ema" not in derived:
            # It was built from the weights before these were loaded.
            self._initialize_ema()
        self._take_position(own, given, updates_per_epoch)
        if "generator_state" not in ignored:
            self._found.warn_of_new_generators(own.state)
        given |= {GRADIENTS: gradients} if gradients else {}
        rows = restore_outcomes(set(self._restorable()), set(given), ignored, derived)
        if self._weights.ema is None and own.state.get("ema") is not None:
            rows.append(RestoreOutcome("ema", "dropped", "optim.ema.use is false now"))
        self._log(rows)

    def _declare_modes(self, own: LoadedState, taken: Collection[str]) -> None:
        modes = {} if own.manifest is None else own.manifest.info.get("modes", {})
        self._weights.modes.declare({k: v for k, v in modes.items() if k in taken})

    def _take_position(
        self, own: LoadedState, given: Mapping[str, Any], updates_per_epoch: int
    ) -> None:
        """Go to the place in the run that the state says, and tell the saver of it."""
        progress, context = self._progress, self._context
        stages = progress.stages
        self._found.goes_on_in_epoch = bool(stages or progress.training)
        if self._found.goes_on_in_epoch:
            self._saver.saved = Position(context.epoch, progress.step, len(stages))
        progress.finished = set(stages)
        metrics = context.metrics()
        metrics.clear()
        metrics.update(stages)
        if "progress" not in given:
            progress.step = len(context.history) * updates_per_epoch
        self._saver.saved_step = progress.step
        if own.manifest is not None:
            self._saver.durable.saving(own.manifest.position, progress.step)
            self._saver.durable.saved(own.manifest.position)

    def _take_of_other_ranks(self, own: LoadedState) -> dict[str, str]:
        """Derive the state of each rank where another number of ranks saved; return from what."""
        ranks = self._context.ranks
        self.ranks_changed = own.world_size != ranks.size
        if not self.ranks_changed:
            return {}
        derived = {}
        for name in (self._registry.per_rank | {GRADIENTS}) & own.state.keys():
            part = own.state[name]
            values = part.values if isinstance(part, AllRanks) else (part,)
            mine = derive(name, values, ranks)
            if mine is not None:
                own.state[name] = mine
                derived[name] = f"{own.world_size} ranks saved it and {ranks.size} go on"
                continue
            del own.state[name]
            if name == GRADIENTS:
                self._context.logger.warning(
                    "%d ranks saved their parts of gradients that wait for an update: %d ranks "
                    "cannot take these up, and go on without them",
                    *(own.world_size, ranks.size),
                )
        return derived

    def _is_void(self, name: str, part: Any) -> bool:
        """Whether a source was nothing then, or is nothing now, as an EMA that is switched."""
        if name == "ema" and self._weights.ema is None:
            return True
        source = self._registry.sources.get(name)
        return part is None and source is not None and is_stateful(source)

    def _restorable(self) -> Iterator[str]:
        """Yield the names of the sources that hold something in this solver."""
        held = {"ema": self._weights.ema, "generator_state": self._found.generators.state_dict()}
        void = {name for name, one in held.items() if one is None or one == {}}
        yield from (name for name in self._registry.sources if name not in {*NOT_STATE, *void})

    # The best weights of the experiment, or of another one.

    def make_best(self, state: Mapping[str, Any], where: str) -> None:
        """Make the best weights of a state the present weights, the EMA and the best state.

        Args:
            state: that was read.
            where: its place, for messages.

        Raises:
            StateMismatch: the solver registers none of these weights, or they do not fit.
        """
        best, weights, sources = best_of(state, where), self._weights, self._registry.sources
        rows = restore_outcomes(set(weights.best.states) | {"model"}, set(best), ())
        if not best.keys() & sources.keys():
            raise StateMismatch(
                f"{where} holds the best state of {', '.join(map(repr, best))}, and this solver "
                "registers none of these: nothing would be continued from"
            )
        kept = {name: part for name, part in best.items() if name in weights.best.states}
        if kept:
            # Through the solver: a subclass may know how to read the state of an older version.
            self._load_state_dict({"best_state": {**weights.best.state_dict(), **kept}})
        for name, part in best.items():
            if name in sources:
                load_source(name, sources[name], weights.best.states.get(name, part))
            else:
                rows.append(RestoreOutcome(name, "dropped", "this solver does not register it"))
        weights.take_as_best()
        weights.fsdp_best.clear()
        weights.modes.declare(dict.fromkeys(weights.modes.modes, False))
        self._initialize_ema()
        self._log(rows)

    def _log(self, rows: list[RestoreOutcome]) -> None:
        cells = [("source", "is", "because"), *((one.source, one.what, one.why) for one in rows)]
        self._context.logger.info("State of this run:\n%s", "\n".join(format_table(cells)))


def _left_to_best(own: LoadedState, ignored: Collection[str]) -> dict[str, str]:
    """Return the sources that were not read, because the best weights will replace them."""
    held = set() if own.manifest is None else set(own.manifest.sources)
    return dict.fromkeys(held - own.state.keys() - {*ignored}, "load_best: see the table below")
