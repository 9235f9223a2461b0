"""The attributes of a solver: which ones the framework keeps for itself, and all the others."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ..distributed.parallelism import Parallel
from .reach import Reached, reachable

logger = logging.getLogger(__name__)

_WALKED = ("dataloaders", "model")
"""Attributes that the framework names and the user fills."""
_KEPT = frozenset(
    {"best_state", "checkpointer", "ema", "finite_guard", "fsdp_best_state", "ranks", "stateful"}
    | {"deadlock_detect", "profiler", "total_updates", "train_updates_per_epoch", "xp"}
)
"""Attributes without an underscore that the framework keeps for itself."""


class Attributes(Parallel):
    """Knows whose an attribute is, and walks over those of the user."""

    # A walk that begins elsewhere, such as at a loader whose `collate_fn` is a method, ends here.
    walks_over_itself: ClassVar[bool] = True

    _of_user: set[str]
    _of_framework: frozenset[str]

    def _begin_building(self) -> None:
        """Take what is there as the user's: a subclass set it before it called `__init__`."""
        self._of_user = set(vars(self))
        self._of_framework = frozenset()
        for name in self._replaced():
            logger.warning(
                "%s takes the place of a name that the framework keeps for itself: give it another "
                "name, unless it is meant to",
                name,
            )

    @contextmanager
    def _users_turn(self) -> Iterator[None]:
        """Note what a subclass sets in the block as its own."""
        before = dict(vars(self))
        yield
        now = vars(self)
        taken = [name for name in before if now.get(name) is not before[name]]
        for name in [*taken, *(now.keys() - before.keys())]:
            if name in _KEPT or (name in taken and name.startswith("_")):
                raise ValueError(self._taken(f"self.{name}"))
        self._of_user |= now.keys() - before.keys()

    def _end_of_building(self) -> None:
        """Take all that is there, and is not the user's, as the framework's; later ones are not."""
        self._of_framework = frozenset(vars(self).keys() - self._of_user - {*_WALKED})
        for name in self._of_user:
            if callable(getattr(type(self), name, None)) and not callable(vars(self)[name]):
                raise ValueError(self._taken(f"self.{name}"))

    def _replaced(self) -> list[str]:
        """Name what a subclass puts in the place of private methods and attributes of ours."""
        lines = type(self).__mro__
        ours = [one for one in lines if one.__module__.partition(".")[0] in ("solvers", "flashy")]
        names = {name for one in ours for name in vars(one) if name[:1] == "_" != name[1:2]}
        return [
            f"{one.__name__}.{name}"
            for one in lines
            if one not in ours
            for name in sorted((names - {"_abc_impl"}) & vars(one).keys())
        ]

    def _taken(self, name: str) -> str:
        return (
            f"the framework keeps {name} for itself: give what {type(self).__name__} puts there "
            "another name"
        )

    def reached(self, closed: Collection[Any] = ()) -> Iterator[Reached]:
        """Give everything that hangs on the solver, without what the framework keeps for itself.

        Args:
            closed: objects that come and are not entered.
        """
        return reachable(self, without=self._of_framework, closed={id(one) for one in closed})
