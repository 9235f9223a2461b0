"""The page on the architecture agrees with the code: layers, files, and the order of each walk."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_architecture import LAYERS

PAGE = (ROOT / "docs/architecture.md").read_text()
WALKS = ("epoch", "commit", "restore")


def section(title: str) -> str:
    """Return the text below a heading, up to the next heading of that level or a higher one."""
    level = len(title) - len(title.lstrip("#"))
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", PAGE, re.M | re.S)
    assert found is not None, title
    return found.group(1)


def steps(walk: str) -> list[tuple[str, list[str]]]:
    """Return the files of a walk: that of each step, and the files that it works with."""
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \| (.*) \|$", section(f"## One {walk}"), re.MULTILINE)
    return [(file, re.findall(r"`([\w/]+\.py)`", text)) for file, text in rows]


@pytest.fixture(scope="module")
def entered() -> dict[str, list[str]]:
    """Return the files that each walk enters, in the order of the first entry."""
    done = subprocess.run(
        [sys.executable, "-m", "proofs.walk"],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = {}
    files: list[str] = []
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            files.append(line.split()[0])
        else:
            files = found.setdefault(line.partition(":")[0], [])
    return found


def test_each_file_that_it_names_exists() -> None:
    for path in re.findall(r"`((?:solvers|checkpoint|tests|config|docs|scripts)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("package", ["solvers", "checkpoint"])
def test_its_layers_are_those_of_the_code(package: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| \S", section(f"### `{package}`"), re.MULTILINE)
    assert rows == LAYERS[package]


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_enters_the_files_that_the_page_lists_in_that_order(
    walk: str, entered: dict[str, list[str]]
) -> None:
    listed = steps(walk)
    assert len(listed) > 10
    order = entered[walk]
    assert {file for main, others in listed for file in (main, *others)} <= set(order)
    places = [order.index(main) for main, _ in listed]
    assert places == sorted(places)


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_fits_on_one_page(walk: str) -> None:
    assert len(section(f"## One {walk}").splitlines()) <= 60
