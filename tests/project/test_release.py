"""A release happens only when the version, the git tag and the changelog agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT

CHANGELOG = """\
# Changelog

## Unreleased
{unreleased}
## {version} - 2030-01-31

### Added

- The first thing.

## 0.9.0 - 2029-01-31

- Older.
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a git repository whose version, tag and changelog all say 1.2.0."""
    git(tmp_path, "init", "--quiet")
    write(tmp_path, version="1.2.0")
    git(tmp_path, "add", ".")
    commit(tmp_path)
    git(tmp_path, "tag", "v1.2.0")
    return tmp_path


def write(folder: Path, version: str, changelog: str = "1.2.0", unreleased: str = "") -> None:
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    text = CHANGELOG.format(version=changelog, unreleased=unreleased)
    (folder / "CHANGELOG.md").write_text(text)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    person = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    git(folder, *person, "commit", "--quiet", "--allow-empty", "--message", "A change")


def check(folder: Path, *tag: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts/release_check"), *tag]
    return subprocess.run(script, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("tag", [(), ("v1.2.0",)])
def test_the_notes_are_the_section_of_the_changelog(repository: Path, tag: tuple[str]) -> None:
    done = check(repository, *tag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "### Added\n\n- The first thing.\n"


def test_a_version_that_is_not_that_of_the_tag_is_refused(repository: Path) -> None:
    write(repository, version="1.3.0", changelog="1.3.0")
    for tag in ((), ("v1.2.0",)):
        done = check(repository, *tag)
        assert done.returncode == 1
        assert (
            "pyproject.toml has version 1.3.0, but" in done.stderr or "v1.2.0, but" in done.stderr
        )


def test_a_tag_of_another_commit_is_refused(repository: Path) -> None:
    commit(repository)
    done = check(repository, "v1.2.0")
    assert done.returncode == 1
    assert "the checked-out commit has no tag: run `git tag v1.2.0`" in done.stderr


def test_a_changelog_without_the_version_is_refused(repository: Path) -> None:
    write(repository, version="1.2.0", changelog="1.1.0")
    done = check(repository)
    assert done.returncode == 1
    assert "the newest release of CHANGELOG.md is 1.1.0" in done.stderr


def test_changes_that_are_listed_as_unreleased_are_refused(repository: Path) -> None:
    write(repository, version="1.2.0", unreleased="\n- Forgotten.\n")
    done = check(repository)
    assert done.returncode == 1
    assert "move them to `## 1.2.0`" in done.stderr


def test_a_folder_without_git_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, version="1.2.0")
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    script = [sys.executable, str(ROOT / "scripts/release_check")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: git tag --points-at HEAD failed: ")
    assert done.stderr.count("\n") == 1
