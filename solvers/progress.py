"""What makes a resumed run the same run: data order, and the position in the epoch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import IterableDataset

from checkpoint import Ranks

from .announce import announce
from .gradients import GRADIENTS, mean_gradients
from .metrics import Metrics, summed
from .parts import capture, loaders_in, moved_by_a_pass, parts_of, restore
from .reading import Reading, reading_of


def derive(name: str, values: Sequence[Any], ranks: Ranks) -> Any:
    """Derive what this rank has of a source from what each of another number of ranks had.

    Where they were is kept, since all were there; generators are not, since each needs one of its
    own, and None says so.
    """
    if name == "loader_state":
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


class LoaderState:
    """Generators, samplers and streams of the data loaders, as a state source.

    Looks the loaders up at each use, since a solver may replace them. A split may also be a list,
    tuple or dict of loaders. Loaders, samplers and data sets with `state_dict` and
    `load_state_dict` are asked for their state. Of all of them, the generators that they hold as
    attributes are kept: of torch, NumPy and Python.

    What a pass in progress has moved is kept as `Reading.then` says.

    Args:
        loaders: returns the loaders by split.
        with_passes: keep how far each loader is, too.
    """

    def __init__(
        self, loaders: Callable[[], Mapping[str, Any]], *, with_passes: bool = True
    ) -> None:
        self._loaders, self._with_passes = loaders, with_passes
        # By split: a list or dict, how long it was, and that it has no loader in it.
        self._plain: dict[str, tuple[Any, int]] = {}

    def is_empty(self) -> bool:
        """Whether it is known that nothing in here moves; not while something is looked at anew."""
        return all(self._is_plain(split, loader) for split, loader in self._loaders().items())

    def state_dict(self) -> dict[str, Any]:
        """Capture what moves from epoch to epoch, per split."""
        return {split: self._captured(split, loader) for split, loader in self._loaders().items()}

    def generators(self) -> dict[str, Any]:
        """Give the states of all generators in here, by a name for people."""
        return {
            f"{attribute!r} of the {name.replace('_', ' ')} of {split!r}": state
            for split, captured in self.state_dict().items()
            for name, part in captured.items()
            for attribute, state in part.get("generators", {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back to the loaders that are there; under execute_only some are not."""
        for split, loader in self._loaders().items():
            self._restore(split, loader, state.get(split, {}))

    def _captured(self, name: str, loader: Any) -> dict[str, Any]:
        captured = {"loader": capture(loader)}
        several = self._several(name, loader)
        for key, one in several.items():
            inside = self._captured(f"{name}[{key!r}]", one)
            captured |= {f"{key}.{part}": value for part, value in inside.items()}
        if several or self._is_plain(name, loader):
            return captured
        reading = reading_of(loader, name) if self._with_passes else Reading()
        begun = reading.begin.get("loader_state", {}).get(name, {})
        if reading.given and reading.then == "whole":
            return {**begun, "pass": {"number": reading.number - 1}}
        parts = parts_of(loader)
        captured |= {part: capture(one) for part, one in parts.items() if part != "loader"}
        if reading.given and reading.then == "begins":
            for part in moved_by_a_pass(parts):
                if isinstance(parts[part], IterableDataset) and part in begun:
                    # It begins again where it began.
                    captured[part]["state"] = begun[part]["state"]
        return {**captured, "pass": reading.kept()} if reading.number else captured

    def _restore(self, name: str, loader: Any, captured: Mapping[str, Any]) -> None:
        several = self._several(name, loader)
        for key, one in several.items():
            start = f"{key}."
            inside = {k.removeprefix(start): v for k, v in captured.items() if k.startswith(start)}
            self._restore(f"{name}[{key!r}]", one, inside)
        parts = {"loader": loader} if several else parts_of(loader)
        moved = moved_by_a_pass(parts)
        is_open = False
        if self._with_passes and not several:
            reading = reading_of(loader, name)
            if reading.fresh is None:
                reading.fresh = {part: capture(one) for part, one in moved.items()}
            is_open = reading.take(captured.get("pass", {}))
            reading.saved = {part: captured[part] for part in moved if part in captured}
        for part, one in parts.items():
            # What a pass has moved is where it was once the pass has come so far, see `Passes`.
            with_state = not (is_open and part in moved)
            restore(one, captured.get(part, {}), with_state=with_state)
        if self._with_passes and not several and reading.number:
            # What depends on the pass, such as the length of a data set, is what it was.
            announce(loader, reading.number)

    def _several(self, name: str, loader: Any) -> dict[Any, Any]:
        """Return the loaders in a list or dict; a list of batches may be long: look only once."""
        if self._is_plain(name, loader):
            return {}
        found = loaders_in(loader)
        if not found and isinstance(loader, list | tuple | Mapping):
            self._plain[name] = loader, len(loader)
        return found

    def _is_plain(self, name: str, loader: Any) -> bool:
        plain, length = self._plain.get(name, (None, 0))
        return loader is plain and plain is not None and len(loader) == length


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
        drops: see `gradients.PendingGradients`.
    """

    step: int = 0
    stages: dict[str, Metrics] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    skipped: int = 0
    updates: dict[str, list[int]] = field(default_factory=dict)
    held: int = 0
    drops: dict[str, bool] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Capture it."""
        return {
            "step": self.step,
            "stages": dict(self.stages),
            "training": self.training,
            "skipped": self.skipped,
            "updates": self.updates,
            "held": self.held,
            "drops": self.drops,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back there."""
        self.step = state["step"]
        self.stages = dict(state["stages"])
        self.training = state.get("training")
        self.skipped = state.get("skipped", 0)
        self.updates = dict(state.get("updates", {}))
        self.held = state.get("held", 0)
        self.drops = dict(state.get("drops", {}))
