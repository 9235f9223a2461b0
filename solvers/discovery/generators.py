"""Random generators that are not global: what state each one has, and all that hang on a solver."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from checkpoint import StateMismatch

from .reach import Reached
from .reach_types import GENERATORS

_KINDS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]], ...] = (
    (torch.Generator, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (np.random.Generator, lambda g: g.bit_generator.state, lambda g, s: _set(g.bit_generator, s)),
    (np.random.BitGenerator, lambda g: g.state, lambda g, state: _set(g, state)),
    (np.random.RandomState, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (random.Random, lambda g: g.getstate(), lambda g, state: g.setstate(state)),
)
"""Kinds of generators, how to get the state of one, and how to set it."""


def _set(bits: np.random.BitGenerator, state: Any) -> None:
    bits.state = state


def is_generator(value: Any) -> bool:
    """Whether a value is a generator that has a state; that of the system has none."""
    return isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """Return the state of a generator without moving the generator."""
    return next(get(generator) for kind, get, _ in _KINDS if isinstance(generator, kind))


def set_generator_state(generator: Any, state: Any, name: str) -> None:
    """Put a generator where it was.

    Args:
        generator: the generator.
        state: what `generator_state` gave.
        name: of the generator, for the error.

    Raises:
        StateMismatch: the state is that of another kind of generator.
    """
    put = next(put for kind, _, put in _KINDS if isinstance(generator, kind))
    try:
        put(generator, state)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise StateMismatch(
            f"the generator {name} is of another kind than the one that was saved: {error}"
        ) from error


def generators_in(reached: Iterable[Reached], besides: Collection[int] = ()) -> list[Reached]:
    """Return the places of a walk that hold generators.

    Args:
        reached: what `reachable` gives.
        besides: `id` of generators that are kept elsewhere.
    """
    return [one for one in reached if is_generator(one.value) and id(one.value) not in besides]


def states_of(places: Iterable[Reached]) -> dict[str, Any]:
    """Return the states of the generators that are in these places now, by path."""
    return {path: generator_state(one) for path, one in live(places)}


def live(places: Iterable[Reached]) -> Iterator[tuple[str, Any]]:
    """Give the generators that are in these places now, which may be other ones than before."""
    for place in places:
        try:
            one = place.get()
        except LookupError:
            continue
        if is_generator(one):
            yield place.path, one


class GeneratorState:
    """The generators that hang on a solver and on no loader of it, as a state source.

    Args:
        reached: gives the walk over the solver.
        besides: gives the `id` of generators that another source keeps.
    """

    def __init__(
        self,
        reached: Callable[[], Iterable[Reached]],
        besides: Callable[[], Collection[int]],
    ) -> None:
        self._reached, self._besides = reached, besides
        self._places: list[Reached] = []
        # What was loaded, and the generators that took it.
        self._loaded: Mapping[str, Any] = {}
        self._taken: dict[str, Any] = {}

    def look(self) -> None:
        """Walk over the solver again."""
        self._places = generators_in(self._reached(), self._besides())

    def state_dict(self) -> dict[str, Any]:
        """Capture all generators that the last walk found."""
        return states_of(self._places)

    def shown(self) -> dict[str, Any]:
        """Return the same with names for people."""
        return {f"self.{path}": state for path, state in self.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the generators that are here where they were.

        Raises:
            StateMismatch: one is of another kind.
        """
        self.look()
        self._loaded, self._taken = dict(state), {}
        for path, one in live(self._places):
            if path in state:
                set_generator_state(one, state[path], f"self.{path}")
                self._taken[path] = one

    def lacking(self) -> list[str]:
        """Name the generators that are here, and that the loaded state lacks."""
        return [path for path, _ in live(self._places) if path not in self._loaded]

    def settle(self, go_on: bool) -> list[str]:
        """Put generators that were made since the load where they were; once, before a stage.

        Args:
            go_on: the run goes on in the middle of an epoch, whose beginning made them again. At
                the end of an epoch, the next beginning would have made them, too.

        Returns:
            The generators that the loaded state has, and that are not here.
        """
        loaded, self._loaded = self._loaded, {}
        self.look()
        now = dict(live(self._places))
        for path in now.keys() & loaded.keys() if go_on else ():
            if self._taken.get(path) is not now[path]:
                set_generator_state(now[path], loaded[path], f"self.{path}")
        self._taken = {}
        return sorted(loaded.keys() - now.keys())
