"""Which tensors go into one file, decided from plain values."""

import random

from checkpoint.layout import MAX_FILES
from checkpoint.saving.file_groups import WORTHWHILE, group_by_change

LARGE = WORTHWHILE


def sizes(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, LARGE)


def test_at_first_all_are_in_one_file() -> None:
    assert group_by_change(sizes("a", "b"), {}, {"a", "b"}) == [["a", "b"]]


def test_what_stood_is_put_apart_from_what_changed() -> None:
    before = dict.fromkeys("abc", "f")
    assert group_by_change(sizes(*"abc"), before, {"b"}) == [["a", "c"], ["b"]]


def test_a_file_that_changed_as_a_whole_or_not_at_all_stays_as_it_is() -> None:
    before = dict.fromkeys("abc", "f")
    assert group_by_change(sizes(*"abc"), before, set("abc")) == [["a", "b", "c"]]
    assert group_by_change(sizes(*"abc"), before, set()) == [["a", "b", "c"]]


def test_files_that_were_put_apart_stay_apart_while_nothing_new_is_learned() -> None:
    before = {"a": "still", "b": "moving", "c": "moving"}
    for changed in ({"b", "c"}, set(), {"a"}, {"a", "b", "c"}):
        assert group_by_change(sizes(*"abc"), before, changed) == [["a"], ["b", "c"]]


def test_little_that_stood_is_not_worth_a_file() -> None:
    small = {"a": LARGE - 1, "b": LARGE}
    assert group_by_change(small, dict.fromkeys("ab", "f"), {"b"}) == [["a", "b"]]


def test_new_tensors_join_what_changed() -> None:
    before = {"a": "still", "b": "moving"}
    assert group_by_change(sizes(*"abn"), before, {"b", "n"}) == [["a"], ["b", "n"]]
    assert group_by_change(sizes(*"abn"), before, {"n"}) == [["a"], ["b"], ["n"]]


def test_there_are_never_many_files_and_each_tensor_is_in_one() -> None:
    draw = random.Random(0)
    names = [f"t{i}" for i in range(12)]
    before: dict[str, str] = {}
    for _ in range(500):
        changed = set(draw.sample(names, draw.randrange(len(names) + 1)))
        groups = group_by_change(sizes(*names), before, changed)
        assert len(groups) <= MAX_FILES
        assert sorted(name for group in groups for name in group) == sorted(names)
        # No file is written for a tensor that stood, if a part of it large enough stood.
        for group in groups:
            stood = [name for name in group if name not in changed]
            came_from = {before.get(name) for name in group}
            assert not (stood and len(stood) < len(group) and len(came_from) == 1 and before)
        before = {name: f"f{i}" for i, group in enumerate(groups) for name in group}
