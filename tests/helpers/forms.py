"""Two forms of a test that tries every point: a short one for each change, and a complete one."""

from collections.abc import Sequence
from typing import Any

import pytest

EACH_FORM = pytest.mark.parametrize(
    "form",
    [pytest.param("short", id="short"), pytest.param("long", id="long", marks=pytest.mark.slow)],
)
"""The long form contains the short one, so that a suite with the long form leaves out the short."""


def points_for(form: str, points: Sequence[Any], step: int, turn: int) -> list[tuple[int, Any]]:
    """Return all points with their numbers, or in the short form every `step`-th.

    Args:
        turn: number of the case: each begins at another point, so that all cases together try all.
    """
    numbered = list(enumerate(points))
    return numbered if form == "long" else numbered[turn % step :: step]


def without_repeated_forms(items: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split tests into those to run and the short forms whose long form is to run, too."""
    chosen = {item.nodeid for item in items}
    repeated = [item for item in items if _long_form(item.nodeid) in chosen - {item.nodeid}]
    return [item for item in items if item not in repeated], repeated


def _long_form(name: str) -> str:
    test, bracket, case = name.partition("[")
    words = ["long" if word == "short" else word for word in case.removesuffix("]").split("-")]
    return f"{test}{bracket}{'-'.join(words)}]"
