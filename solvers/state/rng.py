"""The global random generators: their state, and whether it is still the same."""

import ctypes
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from checkpoint.integration import Ranks

_Twister = ctypes.c_uint32 * 625
"""The words of a Mersenne Twister, and where it is in them."""


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


class Noted:
    """The state of all generators, asked for again and again: at each update of a run.

    To ask Python and NumPy for theirs takes fifty microseconds. Where the memory that holds them
    is found, it is compared to what it was, in two, and they are asked only when they have moved.
    """

    def __init__(self) -> None:
        self._source = RngState()
        self._numpy: Any = None
        self._memory: Callable[[], Any] = _unknown
        self._was: Any = None
        self._others: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what `RngState.state_dict` does."""
        numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if numpy is not self._numpy:
            self._numpy, self._memory = numpy, _memory(numpy)
        now = self._memory()
        if now is None or now != self._was:
            self._others = self._source.of_others()
            # NumPy gives the second number of a pair without moving.
            self._was = None if now is None or self._others["numpy"][3] else now
        return {**self._others, **self._source.of_torch()}


def _memory(numpy: Any) -> Callable[[], Any]:
    """Find the memory of the generators of Python and NumPy, and prove that it is theirs.

    NumPy documents the address (`BitGenerator.ctypes`); CPython has it behind the header of the
    object (Modules/_randommodule.c: where it is, then the words).
    """
    python: Any = getattr(random.getstate, "__self__", None)
    if (
        type(numpy) is not np.random.MT19937
        or type(python) is not random.Random
        or random.Random.__basicsize__ < object.__basicsize__ + ctypes.sizeof(_Twister)
    ):
        return _unknown
    of_python = _Twister.from_address(id(python) + object.__basicsize__)
    of_numpy = _Twister.from_address(numpy.ctypes.state_address)
    at, *words = of_python
    state = numpy.state["state"]
    if (*words, at) != python.getstate()[1] or [*of_numpy] != [*state["key"], state["pos"]]:
        return _unknown
    # Where it is, and four words: all of these are other ones after 624 numbers, or another seed.
    first, last = memoryview(of_python)[:5], memoryview(of_numpy)[-5:]
    return lambda: (first.tobytes(), last.tobytes(), python.gauss_next)  # type: ignore[attr-defined]


def _unknown() -> None:
    """Give nothing to compare."""
