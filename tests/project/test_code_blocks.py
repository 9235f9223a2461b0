"""The code blocks of the README and of docs/ work as they are printed."""

import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import dora.__main__
import pytest
import yaml
from conftest import Command
from documents import PAGES, ROOT, Block, blocks, shell_commands

from checkpoint.cli import parser as checkpoint_parser
from solvers.cli.main import _parser
from solvers.cli.new_package import write_package
from solvers.settings.compose import compose
from solvers.settings.package import Package
from solvers.settings.validate import parse

OWN_KEYS = "# your own keys"
MUST_BE_SET = ("optim.epochs=1", "optim.lr=0.1", "dataset.batch_size=1")
PARSERS = {
    "checkpoint": checkpoint_parser.parser(),
    "dora": dora.__main__.get_parser(),
    "standard-solver": _parser(),
}


def each(*languages: str):
    found = blocks(*languages)
    return pytest.mark.parametrize("block", found, ids=[block.place for block in found])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Return the package `lines` that the pages start from."""
    folder = tmp_path_factory.mktemp("package") / "lines"
    write_package("lines", folder)
    return Package("lines", folder / "lines", folder / "lines" / "config", "config")


@each("python")
def test_a_program_runs_as_it_is_printed(block: Block, tmp_path: Path, command: Command) -> None:
    project, code = tmp_path / "lines", block.code
    write_package("lines", project)

    def train() -> str:
        command("dora", "-P", "lines", "run", "optim.epochs=1", cwd=project)
        (manifest,) = project.glob("outputs/xps/*/checkpoints/epoch_0001/manifest.json")
        return manifest.parents[2].name

    if "(StandardSolver)" in code:
        (project / "lines/solver.py").write_text(code)
        train()
    else:
        if "SIG" in code:
            code = code.replace("SIG", train())
        (project / "program.py").write_text(code)
        command("program", cwd=project)


@each("py", "python")
def test_an_excerpt_parses_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code, block.place)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{block.place}: {node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if _is_ours(name.name):
                    importlib.import_module(name.name)


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("solvers", "checkpoint")


@each("sh")
def test_a_shell_accepts_the_block_and_the_commands_accept_their_words(
    block: Block, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["sh", "-n", "-c", block.code], check=True)
    monkeypatch.setenv("DORA_PACKAGE", "lines")
    for command in shell_commands(block.code):
        if "-m" in command[:-1] and command[0] in ("python", "torchrun"):
            command = command[command.index("-m") + 1 :]
        for word in command:
            if word.startswith(("scripts/", "tests/")):
                assert (ROOT / word).exists(), f"{block.place}: there is no {word}"
        if command[0] in PARSERS:
            _check_words(block.place, command, package)


def _check_words(place: str, command: list[str], package: Package) -> None:
    parser = PARSERS[command[0]]
    said = io.StringIO()
    args, code = None, 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            args = parser.parse_args(command[1:])
        except SystemExit as end:
            code = end.code
    assert not code, f"{place}: {' '.join(command)}\n{said.getvalue()}"
    overrides: Sequence[str] = getattr(args, "overrides", None) or getattr(args, "argv", None) or ()
    if overrides and command[:2] != ["dora", "grid"]:
        parse(compose(package, overrides))


@each("yaml")
def test_the_keys_of_a_configuration_exist(block: Block, package: Package) -> None:
    content = yaml.safe_load(block.code)
    if OWN_KEYS in block.code:
        return
    first = "" if "defaults" in content else "defaults: [lines, _self_]\n"
    file = package.config_dir / "solver" / "printed.yaml"
    file.write_text(f"# @package _global_\n{first}{block.code}")
    parse(compose(package, ["solver=printed", *MUST_BE_SET]))


@each("json")
def test_json_loads(block: Block) -> None:
    json.loads(block.code)


def test_the_paths_that_the_pages_name_exist(package: Package) -> None:
    path = re.compile(r"`((?:solvers|checkpoint|config|tests|scripts|docs)/[\w./]*)`")
    # Tables name tests without the folder tests/, and the guide names files of a generated package.
    roots = (ROOT, ROOT / "tests", package.folder)
    for page in PAGES:
        for named in path.findall(page.read_text(encoding="utf-8")):
            found = any((root / named).exists() for root in roots)
            assert found, f"{page.relative_to(ROOT)} names {named}"
