import ast
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

import checkpoint
import checkpoint.integration
import checkpoint.testing
import solvers

PACKAGES = [checkpoint, solvers]
# What `checkpoint` promises to people; a name more is a promise more.
FOR_PEOPLE = """
    BadReference CannotSave CheckpointError CheckpointExists Checkpointer CorruptCheckpoint Loaded
    Location Manifest MissingCheckpoint Policy Position RankFailed Repair StateMismatch
    UnreadableCheckpoint UnsupportedFormat UnsupportedState Verified load_checkpoint read_foreign
    repair resolve save_checkpoint verify
"""
# What it promises to `solvers` alone.
FOR_SOLVERS = """
    AllRanks AppendOnlyList IntervalDecision PerRank Ranks RunStats Saved Stable Threshold
    choose_interval clear_experiment describe_newest digests format_table is_machine_error
    is_sharded
    pin_as_parent refuse_to_clear unreadable_checkpoint
"""


def test_checkpoint_promises_these_names_to_people_and_those_to_solvers() -> None:
    assert checkpoint.__all__ == FOR_PEOPLE.split()
    assert checkpoint.integration.__all__ == FOR_SOLVERS.split()


@pytest.mark.parametrize("package", [*PACKAGES, checkpoint.testing, checkpoint.integration])
def test_public_names_are_sorted_and_exist(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("package", [*PACKAGES, checkpoint.testing, checkpoint.integration])
def test_what_a_package_root_imports_is_what_it_promises(package: ModuleType) -> None:
    assert package.__file__
    with open(package.__file__) as file:
        tree = ast.parse(file.read())
    own = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    names = {alias.name for node in own for alias in node.names}
    assert names - {"lazy_names"} == set(package.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_does_not_exist_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Solver'"):
        package.Solver  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_light(package: ModuleType) -> None:
    code = (
        f"import sys, {package.__name__}; "
        "heavy = {'torch', 'flashy', 'dora', 'matplotlib', 'sklearn'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_checkpoint_needs_no_pytest() -> None:
    code = "import sys, checkpoint; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_both_packages_are_typed() -> None:
    for package in PACKAGES:
        assert (ROOT / package.__name__ / "py.typed").exists()
