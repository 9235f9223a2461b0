"""What a checkpoint of a run holds: the state of all sources, and facts about the run."""

from collections.abc import Callable, Mapping
from typing import Any

from checkpoint.integration import AppendOnlyList, PerRank, RunStats, Stable

from ..experiment import lookup
from ..health.update_watch import UpdateWatch
from ..run_context import RunContext
from ..state.pending_gradients import GRADIENTS
from ..state.progress import Progress
from ..state.registry import StateRegistry
from ..weights.shadow_weights import ShadowWeights
from .resume_check import ResumeCheck


class CheckpointContents:
    """Collects what a checkpoint holds.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        weights: the best state, and the modes of optimizers.
        check: describes what comes next, for the check of a resumed run.
        watch: knows the gradients that wait for an update.
        state_dict: returns the state of the solver by source.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        weights: ShadowWeights,
        check: ResumeCheck,
        watch: UpdateWatch,
        state_dict: Callable[[], dict[str, Any]],
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self._weights, self._check, self._watch = weights, check, watch
        self._state_dict = state_dict
        # The history only grows, so that a save writes its new entries and links the others.
        self._history = AppendOnlyList("history", context.ranks)

    def state(self) -> dict[str, Any]:
        """Return the state of all sources, without configuration and signature."""
        return self._registry.to_save(self._state_dict())

    def to_save(self) -> dict[str, Any]:
        """Return the state. Objects that know whether they changed since the last save are marked.

        A subclass may have replaced such an object in its `state_dict`; that object has no mark.
        """
        state, best = self.state(), self._weights.best
        if state.get("best_state") is not None and best.is_state(state["best_state"]):
            state["best_state"] = Stable(state["best_state"], best.version)
        if isinstance(state.get("history"), list):
            state["history"] = self._history.to_save(state["history"])
        return state

    def with_gradients(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add the gradients that wait for an update, if any rank has some."""
        if self._watch.holds_back:
            self._context.logger.error(
                "FSDP2 holds gradients of no_sync that no update used: this save does not have them"
            )
        pending = self._watch.gradients.state_dict()
        if self._context.ranks.all_reduce_max(len(pending["gradients"])) == (0,):
            return state
        return {**state, GRADIENTS: PerRank(pending)}

    def info(
        self, metrics: Mapping[str, Any], lineage: dict[str, Any] | None, stats: Any
    ) -> dict[str, Any]:
        """Return the facts that the manifest holds beside the state.

        Args:
            metrics: of the epoch.
            lineage: the checkpoint that the run continues from.
            stats: durations and counts of the run, see `RunStats`.
        """
        xp, upcoming = self._context.xp, (self._progress.training or {}).get("upcoming")
        return {
            "sig": xp.sig,
            "argv": list(xp.argv),
            "config": lookup.plain_config(xp.cfg),
            "metrics": dict(metrics),
            "lineage": lineage,
            "changes": self._check.changes,
            "modes": dict(self._weights.modes.modes),
            RunStats.KEY: stats,
            "next": self._context.ranks.all_gather(self._check.fingerprint(upcoming)),
        }
