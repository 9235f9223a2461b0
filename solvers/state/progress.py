"""How far a run is: updates, finished stages, and the place in the train stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.integration import Ranks

from ..metrics import Metrics, summed
from .pending_gradients import GRADIENTS, mean_gradients


def derive(name: str, values: Sequence[Any], ranks: Ranks) -> Any:
    """Derive what this rank has of a source from what each of another number of ranks had.

    Positions are carried over because every rank had reached them, and generators of the user are
    carried over because all ranks often share them. Global generators are not, because each rank
    needs its own; None is returned for those.
    """
    if name in ("loader_state", "generator_state"):
        return values[ranks.rank % len(values)]
    if isinstance(values[0], Mapping) and values[0].keys() == {"passes", "loader"}:
        # An endless stream: all ranks had read as many batches of it.
        return values[ranks.rank % len(values)]
    if name == GRADIENTS:
        return mean_gradients(values)
    return derived_progress(values, ranks) if name == "progress" else None


def derived_progress(values: Sequence[Mapping[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """Derive progress: the same step, and the sums of the epoch shared out over these ranks."""
    own = values[ranks.rank % len(values)]
    if own["training"] is None:
        return dict(own)
    averages = [value["training"]["average"] for value in values[ranks.rank :: ranks.size]]
    return {**own, "training": {**own["training"], "average": summed(averages)}}


@dataclass
class Progress:
    """Where the run is, as a state source. The parts of a solver share one object.

    Attributes:
        step: optimizer updates since the start of the run.
        stages: stages of the epoch in progress that are finished, with their metrics.
        training: how far the train stage of the epoch in progress is; None when it is not running.
        skipped: updates that were left out, since their gradient was not finite.
        updates: see `guards.UpdateCounts`.
        held: see `checkpoint.Threshold`.
        finished: names of the stages that were finished before the run was interrupted in this
            epoch. They are not run again. No state: `stages` says it in a checkpoint.
    """

    step: int = 0
    stages: dict[str, Metrics] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    skipped: int = 0
    updates: dict[str, list[int]] = field(default_factory=dict)
    held: int = 0
    finished: set[str] = field(default_factory=set)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "step": self.step,
            "stages": dict(self.stages),
            "training": self.training,
            "skipped": self.skipped,
            "updates": self.updates,
            "held": self.held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where a state says."""
        self.step = state["step"]
        self.stages = dict(state["stages"])
        self.training = state.get("training")
        self.skipped = state.get("skipped", 0)
        self.updates = dict(state.get("updates", {}))
        self.held = state.get("held", 0)
