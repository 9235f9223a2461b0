"""The files of the project agree: the same checks run in scripts, hooks, CI and CONTRIBUTING."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from documents import ROOT

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
LINT = [line for line in (ROOT / "scripts/lint").read_text().splitlines() if ".venv/bin" in line]


def steps(workflow: str) -> list[str]:
    content = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())
    return [
        step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step
    ]


def triggers(workflow: str) -> object:
    # YAML reads the key `on` as true.
    return yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())[True]


def test_a_push_runs_the_fast_checks_and_the_night_runs_every_test() -> None:
    assert "push" in triggers("ci")
    assert steps("ci") == ["scripts/lint", "scripts/test"]
    assert set(triggers("nightly")) == {"schedule", "workflow_dispatch"}
    assert any(step.startswith("scripts/test --nightly --cov") for step in steps("nightly"))


def test_a_release_is_checked_before_it_is_made() -> None:
    assert triggers("release") == {"push": {"tags": ["v*"]}}
    commands = [step.split()[0] for step in steps("release")]
    assert commands == [
        "scripts/release_check",
        "scripts/lint",
        "scripts/test",
        ".venv/bin/hatchling",
        "gh",
    ]


def test_the_hooks_before_a_commit_run_the_tools_of_ci() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert entries == [line.removesuffix(" .") for line in LINT]
    assert all(hook["language"] == "system" for hook in repository["hooks"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_scripts_that_a_workflow_runs_exist(workflow: Path) -> None:
    for step in steps(workflow.stem):
        for script in re.findall(r"\bscripts/\w+", step):
            assert os.access(ROOT / script, os.X_OK), f"{workflow.name} runs {script}"


def test_a_shell_reads_every_script_and_may_execute_it() -> None:
    for script in (ROOT / "scripts").iterdir():
        first = script.read_text().partition("\n")[0] if script.is_file() else ""
        if first.startswith("#!"):
            assert os.access(script, os.X_OK), script.name
        if first == "#!/bin/sh":
            subprocess.run(["sh", "-n", script], check=True)
    subprocess.run(["sh", "-n", ROOT / ".ci/run"], check=True)


@pytest.mark.parametrize("form", ["bug", "feature", "question"])
def test_each_form_of_an_issue_asks_for_something(form: str) -> None:
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_editor_configuration_has_the_line_length_of_ruff() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert f"max_line_length = {ruff['line-length']}" in (ROOT / ".editorconfig").read_text()


def test_contributing_names_the_three_commands() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    first = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert first is not None
    commands = [line.split("  ")[0] for line in first[1].splitlines()]
    assert commands == ["scripts/test", "scripts/lint", ".venv/bin/mkdocs build --strict"]
