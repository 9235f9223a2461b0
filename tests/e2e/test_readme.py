"""The README is true and short. `tests/project/test_code_blocks.py` tests each of its blocks."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Command

from checkpoint.cli.parser import EXIT_CODES
from solvers.cli.new_package import write_package

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Give the package that the README starts from, with the solver that it shows."""
    (code,) = blocks("python")
    write_package("lines", tmp_path / "lines")
    (tmp_path / "lines/lines/solver.py").write_text(code)
    return tmp_path / "lines"


def test_the_solver_trains_resumes_and_is_continued_from(lines: Path, command: Command) -> None:
    def dora(*arguments: str) -> str:
        return command(
            "dora", "-P", "lines", *arguments, cwd=lines, PYTHONPATH=f"{ROOT}:{lines}"
        ).stderr

    dora("run", "optim.epochs=2")
    assert "Nothing left to do" in dora("run", "optim.epochs=2")
    (history,) = lines.glob("outputs/xps/*/history.json")
    first, last = (epoch["valid"]["loss"] for epoch in json.loads(history.read_text()))
    assert last < first
    sig = history.parent.name
    log = dora("run", "optim.epochs=1", f"continue_from=//sig/{sig}")
    assert f"Continuing from //sig/{sig}" in log


def test_the_solver_is_as_short_as_it_is_said_to_be() -> None:
    (code,) = blocks("python")
    body = code[code.index("class ") :].splitlines()
    assert len([line for line in body if line.strip()]) <= 30


def test_the_readme_is_short_enough_to_decide_by() -> None:
    assert len(README.splitlines()) <= 200


def test_links_and_pictures_lead_to_files_of_the_clone() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []
    pictures = list((ROOT / "docs/images").iterdir())
    assert pictures
    assert all(one.stat().st_size < 60_000 for one in pictures)


def test_the_exit_codes_are_those_that_the_command_states() -> None:
    page = (ROOT / "docs/checkpoints/command.md").read_text()
    for code, meaning in re.findall(r"(\d) ([^,]+)", EXIT_CODES):
        assert f"| {code} | {meaning} |" in page
