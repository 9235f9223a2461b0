"""The attributes of a solver: which ones the framework keeps for itself, and all the others."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from .parallel import Parallel
from .reach import Reached, reachable

_WALKED = ("dataloaders", "model")
"""Attributes that the framework names and the user fills."""


class Attributes(Parallel):
    """Knows whose an attribute is, and walks over those of the user."""

    _of_user: set[str]
    _of_framework: frozenset[str]

    def _begin_building(self) -> None:
        """Take what is there as the user's: a subclass set it before it called `__init__`."""
        self._of_user = set(vars(self))

    @contextmanager
    def _users_turn(self) -> Iterator[None]:
        """Note what a subclass sets in the block as its own."""
        before = set(vars(self))
        yield
        self._of_user |= vars(self).keys() - before

    def _end_of_building(self) -> None:
        """Take all that is there, and is not the user's, as the framework's; later ones are not."""
        self._of_framework = frozenset(vars(self).keys() - self._of_user - {*_WALKED})

    def reached(self, closed: Collection[Any] = ()) -> Iterator[Reached]:
        """Give everything that hangs on the solver, without what the framework keeps for itself.

        Args:
            closed: objects that come and are not entered.
        """
        return reachable(self, without=self._of_framework, closed={id(one) for one in closed})
