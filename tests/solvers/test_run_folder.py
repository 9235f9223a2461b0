import errno
import random
from pathlib import Path

import pytest
from conftest import Command
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from solvers import ConfigError
from solvers.cli.new_package import write_package
from solvers.launch.run_folder import (
    folder_errors,
    refuse_interpolation,
    refuse_submitit_tags,
    run_dir_override,
)

PARTS = [*"ab/\\'\"${}[](),=:#~%&;!*? \n\t\r\x01@|+-.", "ü", "日本", "${", "${a}", "\\${", "\\\\${"]
ODD = "ü日本=,[1]'\"()#~{} $?%;&\\*"


def test_hydra_reads_the_path_of_the_folder_as_it_is_whatever_characters_it_has() -> None:
    draw, parser = random.Random(0), OverridesParser.create()
    names = ["".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(600)]
    for path in [Path("/", ODD, "xps"), *(Path("/", name, "0a1b2c3d") for name in names)]:
        override = parser.parse_override(run_dir_override(path))
        assert override.key_or_group == "hydra.run.dir"
        # As in Hydra, where reading a value resolves what looks like an interpolation.
        assert OmegaConf.create({"dir": override.value()}).dir == str(path)


def test_several_ranks_train_in_a_folder_of_any_name(command: Command, tmp_path: Path) -> None:
    project = tmp_path / ODD / "fitted"
    write_package("fitted", project)
    small = ("optim.epochs=1", "dataset.points=64")
    command("dora", "run", "-d", "--ddp_workers=2", *small, cwd=project)
    (commit,) = project.glob("outputs/xps/*/checkpoints/epoch_0001/manifest.json")
    assert commit.stat().st_size
    assert not list(project.glob("outputs/xps/*/rendezvous.txt"))


def test_a_path_that_hydra_or_submitit_would_change_is_refused() -> None:
    for name in ("a${b}", "${"):
        with pytest.raises(ConfigError, match="rename the folder"):
            refuse_interpolation(Path("/data", name))
    with pytest.raises(ConfigError, match="%j.*rename the folder"):
        refuse_submitit_tags(Path("/data/100%j/xps"))
    refuse_interpolation(Path("/data/$HOME/{a}"))
    refuse_submitit_tags(Path("/data/100%"))


@pytest.mark.parametrize(
    ("kind", "arguments"), [("dangling", ("run",)), ("file", ("grid", "sweep"))]
)
def test_a_folder_that_cannot_be_made_is_one_line(
    command: Command, project: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    outputs = project / "outputs"
    if kind == "file":
        outputs.touch()
    else:
        outputs.symlink_to("/nowhere/at/all")
    (line,) = command("dora", *arguments, cwd=project, code=2).stderr.splitlines()
    named = "is a file" if kind == "file" else "is a link to /nowhere/at/all, which does not exist"
    assert line.startswith(f"error: cannot write {outputs}")
    assert f"{outputs} {named}" in line


def test_a_folder_that_cannot_be_written_is_one_line_with_the_path_and_the_cause(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError) as caught, folder_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "xps"))
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'xps'}: Read-only file system: make it writable, or set "
        "dora.dir in the configuration to a folder that is"
    )


def test_a_dry_run_of_a_grid_says_how_to_run_one_experiment_here(
    command: Command, project: Path
) -> None:
    done = command("dora", "grid", "sweep", "--dry_run", "--init", cwd=project)
    assert "To run one of these experiments here: dora run -f SIG" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("dora", "run", "optim.lr=0.1,0.2"),
        ("fitted.train", "--multirun", "optim.lr=0.1,0.2"),
    ],
)
def test_several_values_of_a_key_point_to_grids(
    command: Command, project: Path, arguments: tuple[str, ...]
) -> None:
    (line,) = command(*arguments, cwd=project, code=2).stderr.splitlines()
    assert line.startswith("error: ")
    assert "list them in a grid, and launch it with `dora grid NAME`" in line
