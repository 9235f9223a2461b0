"""The names of a solver: which attributes are the framework's, and which are the user's."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .reach import Reached, reachable

logger = logging.getLogger(__name__)

_FILLED_BY_USER = ("dataloaders", "model")
"""Attributes that the framework names and the user fills."""
_KEPT = frozenset(
    {"best_state", "checkpointer", "fsdp_best_state", "ranks", "stateful"}
    | {"deadlock_detect", "profiler", "total_updates", "train_updates_per_epoch", "xp"}
)
"""Public attributes of the framework that a solver must not set while it is built."""
_CHANGING = frozenset({"_pending_metrics", "_current_stage", "_current_formatter"})
"""Private attributes that flashy replaces while a solver runs."""


class AttributeNames:
    """Knows whose each attribute of a solver is, so that nothing of the framework is overwritten.

    Create it before the framework sets its first attribute: what is there already is the user's.

    Args:
        kind: the class of the solver.
        attributes: the live `__dict__` of the solver.

    Attributes:
        is_users_turn: whether a method of the user runs that builds the solver.
    """

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self._kind, self._attributes = kind, attributes
        self.is_users_turn = False
        self._of_user = set(attributes)
        # What a subclass set before it called `__init__`.
        self._early = dict(attributes)
        self._of_framework: dict[str, Any] = {}
        for name in self._replaced():
            logger.warning(
                "%s takes the place of a name that the framework keeps for itself: give it another "
                "name, unless it is meant to",
                name,
            )

    @contextmanager
    def users_turn(self) -> Iterator[None]:
        """Run a method of the user, and note what it sets as the user's.

        Raises:
            ValueError: it replaced an attribute of the framework.
        """
        before = dict(self._attributes)
        self.is_users_turn = True
        try:
            yield
        finally:
            self.is_users_turn = False
        now = self._attributes
        changed = [name for name in before if now.get(name) is not before[name]]
        for name in [*changed, *(now.keys() - before.keys())]:
            if name in _KEPT or (name in changed and name.startswith("_")):
                raise ValueError(name_is_taken(self._kind, name))
        self._of_user |= now.keys() - before.keys()
        self._early |= {name: now[name] for name in changed if name in self._early}

    def end_of_building(self) -> None:
        """Take all that is there, and is not the user's, as the framework's; later ones are not.

        Raises:
            ValueError: an attribute of the user has the name of a method, or of an attribute of the
                framework.
        """
        for name, value in self._early.items():
            is_kept = name in _KEPT or name.startswith("_")
            if is_kept and self._attributes.get(name) is not value:
                raise ValueError(name_is_taken(self._kind, name))
        self._of_framework = {
            name: value
            for name, value in self._attributes.items()
            if name not in self._of_user and name not in _FILLED_BY_USER
        }
        self.check()

    def check(self) -> None:
        """Refuse attributes of the user that took the place of something of the framework.

        Raises:
            ValueError: the message names the attribute.
        """
        for name, value in self._of_framework.items():
            is_private = name.startswith("_") and name not in _CHANGING
            if is_private and self._attributes.get(name) is not value:
                raise ValueError(name_is_taken(self._kind, name))
        for name in self._of_user & self._attributes.keys():
            # A function in the place of a method is a way to watch a run.
            is_method = callable(getattr(self._kind, name, None))
            value = self._attributes[name]
            if is_method and (isinstance(value, nn.Module) or not callable(value)):
                raise ValueError(name_is_taken(self._kind, name))

    def walk(self, root: object, closed: Collection[Any] = ()) -> Iterator[Reached]:
        """Yield everything that hangs on the solver, without the attributes of the framework.

        Args:
            root: the solver.
            closed: objects that come and are not entered.
        """
        return reachable(root, without=self._of_framework, closed={id(one) for one in closed})

    def _replaced(self) -> list[str]:
        """Name what a subclass puts in the place of private methods and attributes of ours."""
        lines = self._kind.__mro__
        ours = [one for one in lines if one.__module__.partition(".")[0] in ("solvers", "flashy")]
        names = {name for one in ours for name in vars(one) if name[:1] == "_" != name[1:2]}
        return [
            f"{one.__name__}.{name}"
            for one in lines
            if one not in ours
            for name in sorted((names - {"_abc_impl"}) & vars(one).keys())
        ]


def name_is_taken(kind: type, name: str) -> str:
    """Return the message about an attribute that takes the place of one of the framework.

    Args:
        kind: the class of the solver.
        name: of the attribute.
    """
    return (
        f"the framework keeps self.{name} for itself: give what {kind.__name__} puts there another "
        "name"
    )
