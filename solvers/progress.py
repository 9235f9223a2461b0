"""What makes a resumed run the same run: data order, and the position in the epoch."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from checkpoint import Ranks

from .gradients import GRADIENTS, mean_gradients
from .metrics import Metrics, summed
from .randomness import preserved_rng
from .shield import shielded


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
    """Generators and samplers of the data loaders, as a state source.

    Looks the loaders up at each use, since a solver may replace them. A split may also be a list,
    tuple or dict of loaders. Loaders, samplers and data sets with `state_dict` and
    `load_state_dict` are asked for their state. Of all of them, the generators that they hold as
    attributes are kept: of torch, NumPy and Python.
    """

    def __init__(self, loaders: Callable[[], Mapping[str, Any]]) -> None:
        self._loaders = loaders
        # By split: a list or dict, how long it was, and that it has no loader in it.
        self._plain: dict[str, tuple[Any, int]] = {}

    def is_empty(self) -> bool:
        """Whether it is known that nothing in here moves; not while something is looked at anew."""
        return all(self._is_plain(split, loader) for split, loader in self._loaders().items())

    def state_dict(self) -> dict[str, Any]:
        """Capture what moves from epoch to epoch, per split."""
        return {
            split: {name: _capture(part) for name, part in self._parts(split, loader).items()}
            for split, loader in self._loaders().items()
        }

    def _parts(self, split: str, loader: Any) -> dict[str, Any]:
        """Find all parts of a loader; in a list of batches, which may be long, look only once."""
        if self._is_plain(split, loader):
            return {"loader": loader}
        found = _parts(loader)
        if found.keys() == {"loader"} and isinstance(loader, list | tuple | Mapping):
            self._plain[split] = loader, len(loader)
        return found

    def _is_plain(self, split: str, loader: Any) -> bool:
        plain, length = self._plain.get(split, (None, 0))
        return loader is plain and plain is not None and len(loader) == length

    def generators(self) -> dict[str, Any]:
        """Give the states of all generators in here, by a name for people."""
        return {
            f"{attribute!r} of the {name.replace('_', ' ')} of {split!r}": state
            for split, loader in self._loaders().items()
            for name, part in self._parts(split, loader).items()
            for attribute, state in _capture(part).get("generators", {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back to the loaders that are there; under execute_only some are not."""
        for split, loader in self._loaders().items():
            for name, part in self._parts(split, loader).items():
                _restore(part, state.get(split, {}).get(name, {}))


def loaders_in(value: Any) -> dict[Any, Any]:
    """Return the loaders that a list, tuple or dict holds, by index or key; none of a loader."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {
        key: one
        for key, one in items
        if isinstance(one, DataLoader) or _is_source(one) or loaders_in(one)
    }


def _parts(loader: Any) -> dict[str, Any]:
    parts = {"loader": loader}
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, name, None)
        if part is not None:
            parts[name] = part
    # A batch sampler of the user's own hides the sampler that shuffles, and a data set another one.
    for outer, name in (("batch_sampler", "sampler"), ("dataset", "dataset")):
        inner = getattr(parts.get(outer), name, None)
        if inner is not None and inner is not parts.get(name):
            parts[f"{outer}.{name}"] = inner
    for key, one in loaders_in(loader).items():
        parts |= {f"{key}.{name}": part for name, part in _parts(one).items()}
    return parts


def _is_source(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


_KINDS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]], ...] = (
    (torch.Generator, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (np.random.Generator, lambda g: g.bit_generator.state, lambda g, s: _set_bits(g, s)),
    (np.random.RandomState, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (random.Random, lambda g: g.getstate(), lambda g, state: g.setstate(state)),
)
"""Kinds of generators, how to get the state of one, and how to set it."""


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def _generators(part: Any) -> dict[str, Any]:
    """Return the generators that a part holds as attributes; `generator` may also be computed."""
    held = {"generator": getattr(part, "generator", None), **getattr(part, "__dict__", {})}
    kinds = tuple(kind for kind, *_ in _KINDS)
    return {
        name: value
        for name, value in held.items()
        # That of the system has no state.
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom)
    }


def _capture(part: Any) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    if generators := _generators(part):
        captured["generators"] = {
            name: get(value)
            for name, value in generators.items()
            for kind, get, _ in _KINDS
            if isinstance(value, kind)
        }
    if _is_source(part):
        # Some begin a pass to tell their state, and draw for that.
        with preserved_rng():
            captured["state"] = part.state_dict()
    if getattr(part, "persistent_workers", False):
        captured["has_workers"] = part._iterator is not None
    return captured


def _restore(part: Any, captured: Mapping[str, Any]) -> None:
    kept = captured.get("generators", {})
    for name, value in _generators(part).items():
        for kind, _, put in _KINDS:
            if isinstance(value, kind) and name in kept:
                put(value, kept[name])
    if "state" in captured and _is_source(part):
        part.load_state_dict(captured["state"])
    if getattr(part, "persistent_workers", False):
        _restore_workers(part, captured.get("has_workers", False))


def _restore_workers(loader: Any, had_workers: bool) -> None:
    # Starting workers draws from the generators: whether the next pass does has to be the same.
    if not had_workers:
        loader._iterator = None
    elif loader._iterator is None:
        with preserved_rng(), shielded(loader):
            iter(loader)


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
