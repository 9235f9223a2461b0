"""The short forms of tests: which points they try, and when they are left out."""

from dataclasses import dataclass

from forms import points_for, without_repeated_forms


@dataclass(frozen=True)
class Named:
    """A collected test."""

    nodeid: str


def test_all_turns_of_the_short_form_together_try_each_point_of_the_long_form() -> None:
    points = [letter * 2 for letter in "abcdefghij"]
    long = points_for("long", points, 3, 1)
    assert long == list(enumerate(points))
    short = [points_for("short", points, 3, turn) for turn in range(3)]
    assert sorted(point for one in short for point in one) == long
    assert points_for("short", points, 3, 4) == short[1]


def test_a_short_form_is_left_out_only_where_its_own_long_form_runs() -> None:
    names = ["a[x-short]", "a[x-long]", "a[y-short]", "b[short]", "test_short", "c[short-1]"]
    kept, repeated = without_repeated_forms([Named(name) for name in names])
    assert [one.nodeid for one in repeated] == ["a[x-short]"]
    assert [one.nodeid for one in kept] == names[1:]
