"""The forty breaks of `scripts/mutants` still fit the code; `scripts/mutants` tries them."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from proofs.breaks import BREAKS, Break


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_the_text_of_a_break_is_in_its_file_once_and_its_tests_exist(one: Break) -> None:
    assert (ROOT / one.file).read_text().count(one.old) == 1
    assert one.old != one.new
    assert one.tests
    assert all((ROOT / test).is_file() for test in one.tests)


def test_there_are_forty_breaks_in_forty_modules() -> None:
    assert (
        len(BREAKS) == len({one.file for one in BREAKS}) == len({one.name for one in BREAKS}) == 40
    )
