import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command

from solvers import CONFIG_DIR
from solvers.cli.dora_parser import dora_parser
from solvers.cli.main import main
from solvers.settings.keys import keys
from solvers.settings.yaml_docs import config_files, read_entries


def run(*arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def test_help_explains_a_key_with_the_comment_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = run("help", "checkpoint.save_every", capsys=capsys)
    assert text.startswith("checkpoint.save_every=null\n    Epochs between two checkpoints")
    assert "an integer of at least 0" in text


def test_help_lists_every_key_of_the_framework(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("help", capsys=capsys).splitlines()
    shown = {line.partition("=")[0] for line in lines if not line.startswith((" ", "["))}
    assert shown >= keys().keys()


def test_every_key_of_every_file_has_a_comment() -> None:
    for file, prefix in config_files(CONFIG_DIR):
        explained = {e.key for e in read_entries(CONFIG_DIR / "solver" / "standard.yaml")}
        for entry in read_entries(file, prefix):
            is_new = file.stem == "standard" or entry.key not in explained
            if entry.value and is_new and not entry.key.startswith("hydra."):
                assert entry.comment, f"{file.name}: {entry.key}"


def test_comments_beside_a_key_and_values_in_lists_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "a: 1  # one\nb:  # a list\n  - x\n  - y\nc:  # section\n  # above\n  d: [1, 2]\n"
    )
    entries = [(e.key, e.value, e.comment) for e in read_entries(file)]
    assert entries == [
        ("a", "1", "one"),
        ("b", "[x, y]", "a list"),
        ("c", "", "section"),
        ("c.d", "[1, 2]", "above"),
    ]


def test_help_for_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("help", "optim.epoks", capsys=capsys, code=2)
    assert text == "error: unknown key optim.epoks: did you mean optim.epochs?\n"


def test_every_mistake_in_a_configuration_is_a_line_of_its_own(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "seed=-1", "autocast_dtype=bfloat", "+optim.max_nrm=1"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown key optim.max_nrm: did you mean optim.max_norm?",
        "error: seed=-1: expected an integer of at least 0 and of at most 4294967295, not -1",
        "error: autocast_dtype=bfloat: expected one of bfloat16, float16, float32: did you mean "
        "bfloat16?",
    ]


def test_help_covers_the_keys_that_a_package_adds(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Width of the hidden layers." in run("help", "model", capsys=capsys)


def test_config_prints_what_is_composed(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run("config", "optim.lr=0.5", "--resolve", capsys=capsys)
    assert "lr: 0.5" in text
    assert "points: 1024" in text
    assert "save_last: true" in text
    assert "${" not in text


def test_config_tells_the_signature_that_dora_uses(
    in_project: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    info = command("dora", "info", "optim.lr=0.5", cwd=in_project).stderr
    done = command("solvers.cli.main", "config", "--sig", "optim.lr=0.5", cwd=in_project).stdout
    signature = done.splitlines()[-1].split()[2].rstrip(",")
    assert f"Sheep({signature}," in info


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "unknown key optim.lrr: did you mean optim.lr?"),
        ("optim.lr=abc", "optim.lr=abc: expected a number"),
        ("solver=fited", "solver=fited: did you mean fitted?"),
        ("optim.lr=${nothing}", "optim.lr cannot be resolved"),
    ],
)
def test_config_refuses_what_dora_would_refuse(
    in_project: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in run("config", override, capsys=capsys, code=2)


def test_a_folder_without_a_package_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name it with -P" in run("config", capsys=capsys, code=2)
    assert "there is no package 'none'" in run("config", "-P", "none", capsys=capsys, code=2)


def test_new_writes_a_project_that_names_the_package_everywhere(project: Path) -> None:
    files = [file for file in project.rglob("*") if file.is_file()]
    assert project / ".gitignore" in files
    assert project / "tests" / "test_fitted.py" in files
    assert not [file for file in files if re.search(r"@\w+@", file.read_text())]
    assert tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"] == "fitted"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-model", "cannot be a package"),
        ("Model", "cannot be a package"),
        ("class", "cannot be a package"),
        ("torch", "the name of another package"),
        ("solvers", "the name of another package"),
    ],
)
def test_new_refuses_a_name_that_would_not_work(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in run("new", name, "--dir", str(tmp_path / "x"), capsys=capsys, code=2)
    assert not (tmp_path / "x").exists()


def test_new_overwrites_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}
    text = run("new", "fitted", "--dir", str(project), capsys=capsys, code=2)
    assert "is there already" in text
    assert before == {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}


def test_plot_draws_an_experiment_by_folder_or_signature(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = in_project / "outputs" / "xps" / "0a1b2c3d"
    folder.mkdir(parents=True)
    history = [{"train": {"loss": 2.0}}, {"train": {"loss": 1.0}}]
    (folder / "history.json").write_text(json.dumps(history))

    run("plot", "0a1b2c3d", capsys=capsys)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    run("plot", str(folder), "--output", "mine.png", capsys=capsys)
    assert Path("mine.png").exists()
    assert "did you mean 0a1b2c3d?" in run("plot", "0a1b2c3", capsys=capsys, code=2)


def test_options_that_do_not_exist_and_help_have_their_exit_codes(command: Command) -> None:
    command("solvers.cli.main", "no-such-command", cwd=ROOT, code=2)
    assert "exit codes:" in command("solvers.cli.main", "--help", cwd=ROOT).stdout


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    line = f"{sys.executable} -m solvers.cli.main help | head -n 1"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        "['help', 'optim']",
        "['config', 'optim.lr=1']",
        "['new', 'mine']",
    ],
)
def test_the_command_starts_without_torch(project: Path, arguments: str) -> None:
    code = (
        f"import sys; from solvers.cli.main import main; assert main({arguments}) == 0; "
        "heavy = {'torch', 'dora', 'flashy', 'matplotlib', 'sklearn'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Completion.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dora ", ["export", "grid", "import", "info", "launch", "run"]),
        ("dora gri", ["grid "]),
        ("dora grid ", ["sweep "]),
        ("dora run checkpoint.best", ["checkpoint.best_metric=", "checkpoint.best_mode="]),
        (
            "dora run checkpoint.best_mode=",
            [f"checkpoint.best_mode={v}" for v in ("max", "min", "null")],
        ),
        ("dora run optim.lr=1 autocast=t", ["autocast=true "]),
        ("dora run -d --clear model.", ["model.width="]),
        ("dora -P fitted info solver=f", ["solver=fitted "]),
        ("dora run +generate.pa", ["+generate.path="]),
        ("dora run dora.", []),
        ("dora run --ddp_w", ["--ddp_workers "]),
        ("dora -P nothing run opt", []),
        ("dora run -f ", ["0a1b2c3d", "0a1b9999"]),
        ("standard-solver plot 0a1b9", ["0a1b9999 "]),
        ("standard-solver re", ["rehearse "]),
        ("standard-solver help optim.ep", ["optim.epochs "]),
        ("standard-solver config --resolve optim.ep", ["optim.epochs="]),
        ("standard-solver completion ", ["bash", "fish", "zsh"]),
    ],
)
def test_completion_offers_what_fits(
    in_project: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str]
) -> None:
    start_experiments(in_project)
    replies = in_project / "replies"
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("_ARGCOMPLETE_STDOUT_FILENAME", str(replies))
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    # argcomplete closes streams of the process and ends it.
    child = os.fork()
    if not child:
        main([])
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(filter(None, replies.read_text().split("\v"))) == expected


def start_experiments(project: Path) -> None:
    for sig, argv in {"0a1b2c3d": [], "0a1b9999": ["optim.lr=0.5", "model.width=8"]}.items():
        folder = project / "outputs" / "xps" / sig
        folder.mkdir(parents=True)
        (folder / ".argv.json").write_text(json.dumps(argv))


def test_the_words_of_dora_are_those_that_dora_takes() -> None:
    from dora.__main__ import get_parser

    assert words_of(dora_parser()) == words_of(get_parser())


def words_of(parser: argparse.ArgumentParser) -> dict[str, set[tuple[Any, ...]]]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parsers = {"": parser, **commands.choices}
    return {
        name: {
            (*sorted(one.option_strings), one.nargs) for one in of._actions if one is not commands
        }
        for name, of in parsers.items()
    }


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("dora run checkpoint.save_l", ["checkpoint.save_last="]),
        # bash breaks the word at '=' and replaces what follows.
        ("dora run optim.lr=1 checkpoint.best_mode=m", ["max", "min"]),
        ("dora run -f 0", ["0a1b2c3d:defaults", "0a1b9999:optim.lr=0.5,model.width=8"]),
        ("dora run -f 0a1b9", ["0a1b9999"]),
        ("standard-solver comp", ["completion"]),
    ],
)
def test_bash_completes_a_line(
    project: Path, tmp_path: Path, line: str, replies: list[str]
) -> None:
    start_experiments(project)
    program = tmp_path / "bin" / "standard-solver"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m solvers.cli.main "$@"\n')
    program.chmod(0o755)
    script = (
        "source <(standard-solver completion bash); COMP_LINE=$1; COMP_POINT=${#1}; COMP_TYPE=9; "
        "program=${1%% *}; "
        '$(complete -p "$program" | sed "s/.*-F \\([^ ]*\\).*/\\1/") "$program"; '
        'printf "%s\n" "${COMPREPLY[@]}"'
    )
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        cwd=project,
        env=os.environ | paths,
        capture_output=True,
        text=True,
    )
    assert sorted(done.stdout.split()) == replies, done.stderr


def test_completion_imports_neither_torch_nor_dora_nor_pydantic(project: Path) -> None:
    start_experiments(project)
    code = (
        "import os, sys; os._exit = lambda code: None\n"
        "from solvers.cli.main import _complete; _complete()\n"
        "heavy = {'torch', 'dora', 'flashy', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    line = "dora run -f 0a1b9999 optim.l"
    words = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=os.environ | words | {"PYTHONPATH": str(ROOT), "_ARGCOMPLETE_STDOUT_FILENAME": "out"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (project / "out").read_text() == "optim.lr="
