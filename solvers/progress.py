"""What makes a resumed run the same run: random generators, data order, position in the epoch."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .metrics import Metrics


class RandomState:
    """The global generators of Python, NumPy, torch and each CUDA device, as a state source."""

    def state_dict(self) -> dict[str, Any]:
        """Capture all generators without moving them."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        # Asking an uninitialised CUDA would start it in processes that never use it.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put all generators where they were; devices that are not here any more are left out."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(one, device)


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Put every global generator back where it was, whatever the block draws.

    Args:
        seed: start the block from this seed; None to go on from where the generators are.
    """
    state = RandomState()
    before = state.state_dict()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        yield
    finally:
        state.load_state_dict(before)


class LoaderState:
    """Generators and samplers of the data loaders, as a state source.

    Looks the loaders up at each use, since a solver may replace them. Loaders and samplers with
    `state_dict` and `load_state_dict` are asked for their state; of others the generator is kept.
    """

    def __init__(self, loaders: Callable[[], Mapping[str, Any]]) -> None:
        self._loaders = loaders

    def state_dict(self) -> dict[str, Any]:
        """Capture what moves from epoch to epoch, per split."""
        return {
            split: {name: _capture(part) for name, part in _parts(loader).items()}
            for split, loader in self._loaders().items()
        }

    def generators(self) -> dict[str, torch.Generator]:
        """Give the generators of loaders, samplers and data sets, by a name for people."""
        return {
            f"the {name.replace('_', ' ')} of {split!r}": part.generator
            for split, loader in self._loaders().items()
            for name, part in _parts(loader).items()
            if isinstance(getattr(part, "generator", None), torch.Generator)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back to the loaders that are there; under execute_only some are not."""
        for split, loader in self._loaders().items():
            for name, part in _parts(loader).items():
                _restore(part, state.get(split, {}).get(name, {}))


def _parts(loader: Any) -> dict[str, Any]:
    parts = {"loader": loader}
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, name, None)
        if part is not None:
            parts[name] = part
    # A batch sampler of the user's own hides the sampler that shuffles.
    inner = getattr(parts.get("batch_sampler"), "sampler", None)
    if inner is not None and inner is not parts.get("sampler"):
        parts["batch_sampler.sampler"] = inner
    return parts


def _is_source(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _capture(part: Any) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    generator = getattr(part, "generator", None)
    if isinstance(generator, torch.Generator):
        captured["generator"] = generator.get_state()
    if _is_source(part):
        captured["state"] = part.state_dict()
    if getattr(part, "persistent_workers", False):
        captured["has_workers"] = part._iterator is not None
    return captured


def _restore(part: Any, captured: Mapping[str, Any]) -> None:
    if "generator" in captured and isinstance(getattr(part, "generator", None), torch.Generator):
        part.generator.set_state(captured["generator"])
    if "state" in captured and _is_source(part):
        part.load_state_dict(captured["state"])
    if getattr(part, "persistent_workers", False):
        _restore_workers(part, captured.get("has_workers", False))


def _restore_workers(loader: Any, had_workers: bool) -> None:
    # Starting workers draws from the generators: whether the next pass does has to be the same.
    if not had_workers:
        loader._iterator = None
    elif loader._iterator is None:
        with preserved_rng():
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
