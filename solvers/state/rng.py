"""The state of the global random generators."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from checkpoint.integration import Ranks


class RngState:
    """The global generators of Python, NumPy, torch and each CUDA device, as a state source."""

    def state_dict(self) -> dict[str, Any]:
        """Capture all generators without moving them."""
        return {**self.of_others(), **self.of_torch()}

    def of_others(self) -> dict[str, Any]:
        """Capture those of Python and NumPy, which takes several times as long as torch's."""
        return {"python": random.getstate(), "numpy": np.random.get_state()}

    def of_torch(self) -> dict[str, Any]:
        """Capture those of torch."""
        state: dict[str, Any] = {"torch": torch.default_generator.get_state()}
        # Asking an uninitialised CUDA would start it in processes that never use it.
        if torch.cuda.is_initialized():
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
    state = RngState()
    before = state.state_dict()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        yield
    finally:
        state.load_state_dict(before)


def seed_rank(seed: int, ranks: Ranks, step: int) -> None:
    """Start every global generator from a seed that no other rank has, nor another step."""
    text = f"{seed} {ranks.rank} {ranks.size} {step}".encode()
    own = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
