"""How far a run is: updates, finished stages, and the place in the train stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.integration import Ranks

from ..metrics import Metrics, summed
from .pending_gradients import GRADIENTS, mean_gradients


def derive(name: str, values: Sequence[Any], ranks: Ranks) -> Any:
    """Derive what this rank has of a source from what each of another number of ranks had.

    Where they were is kept, since all were there, and so are the generators of the user, which all
    ranks often share; the global ones are not, since each rank needs its own, and None says so.
    """
    if name in ("loader_state", "generator_state"):
        return values[ranks.rank % len(values)]
    if isinstance(values[0], Mapping) and values[0].keys() == {"passes", "loader"}:
        # An endless stream: each rank had as much of it.
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
    """Where the run is, as a state source.

    Attributes:
        step: optimizer updates since the start of the run.
        stages: stages of the epoch in progress that are finished, with their metrics.
        training: how far the train stage of the epoch in progress is; None when it is not running.
        skipped: updates that were left out, since their gradient was not finite.
        updates: see `guards.UpdateCounts`.
        held: see `checkpoint.Threshold`.
    """

    step: int = 0
    stages: dict[str, Metrics] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    skipped: int = 0
    updates: dict[str, list[int]] = field(default_factory=dict)
    held: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Capture it."""
        return {
            "step": self.step,
            "stages": dict(self.stages),
            "training": self.training,
            "skipped": self.skipped,
            "updates": self.updates,
            "held": self.held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back there."""
        self.step = state["step"]
        self.stages = dict(state["stages"])
        self.training = state.get("training")
        self.skipped = state.get("skipped", 0)
        self.updates = dict(state.get("updates", {}))
        self.held = state.get("held", 0)
