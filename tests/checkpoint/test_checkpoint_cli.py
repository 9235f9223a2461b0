"""The command `checkpoint`: what it prints, changes and refuses, and what it returns."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command
from faults import OPTIONS, listing, train

from checkpoint import Checkpointer, save_checkpoint, verify
from checkpoint.cli.main import main
from checkpoint.cli.parser import COMMANDS, SHELLS
from checkpoint.run_folder.pins import pin, pin_parent
from checkpoint.storage import LocalStorage
from checkpoint.testing import in_child

SIG = "0a1b2c3d"
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "frozen.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an experiment with checkpoints of the epochs 4, thinned, 6 and 7."""
    folder = tmp_path_factory.mktemp("original")
    train(folder, 1, 7)
    return folder


@pytest.fixture
def xp(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a copy of it where Dora would have it below the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, f"outputs/xps/{SIG}")
    return tmp_path / f"outputs/xps/{SIG}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command and gives what it printed."""

    def running(*arguments: object, code: int = 0) -> str:
        found = main([str(one) for one in arguments])
        captured = capsys.readouterr()
        assert found == code, captured
        assert ("error: " in captured.err) == (found not in (0, 3)), captured
        return captured.out + captured.err

    return running


def storage_of(xp: Path) -> LocalStorage:
    return LocalStorage(xp / "checkpoints")


def folder_of(xp: Path, epoch: int) -> Path:
    return xp / f"checkpoints/epoch_{epoch:04d}"


def flip(file: Path, offset: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


# --- names


@pytest.mark.parametrize(
    "reference",
    [
        SIG,
        f"//sig/{SIG}",
        f"outputs/xps/{SIG}",
        f"outputs/xps/{SIG}/",
        f"outputs/xps/{SIG}/checkpoints",
    ],
)
def test_an_experiment_has_several_names(xp: Path, run: Any, reference: str) -> None:
    (found,) = json.loads(run("ls", reference, "--json"))
    names = [row["name"] for row in found["checkpoints"]]
    assert names == ["epoch_0004", "epoch_0006", "epoch_0007"]
    assert Path(found["experiment"]).resolve() == xp


@pytest.mark.parametrize(
    "reference",
    [
        *(f"{SIG}/7", f"{SIG}/epoch_0007", f"//sig/{SIG}/7", f"outputs/xps/{SIG}/epoch_0007"),
        f"outputs/xps/{SIG}/checkpoints/epoch_0007",
        f"outputs/xps/{SIG}/checkpoints/epoch_0007/manifest.json",
    ],
)
def test_a_checkpoint_has_several_names(xp: Path, run: Any, reference: str) -> None:
    assert json.loads(run("show", reference, "--json"))["epoch"] == 7


def test_show_of_an_experiment_shows_its_newest_checkpoint(xp: Path, run: Any) -> None:
    assert run("show", SIG) == run("show", f"{SIG}/epoch_0007")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ls", "0a1b2c3e"), 4, f"nearby in outputs/xps: {SIG}"),
        (("ls", "nowhere/at/all"), 4, "does not exist"),
        (("ls", "--xps", "nowhere"), 4, "name another folder with --xps"),
        (("ls", "s3://bucket/key"), 2, "is a URL"),
        (("ls", "//what"), 2, "is not a reference"),
        (("pin", SIG), 2, "is an experiment: name one of its checkpoints"),
        (("show", f"{SIG}/9"), 4, "there are epoch_0004, epoch_0006, epoch_0007"),
        (
            ("show", f"{SIG}/7", "--tensors", "encoder"),
            2,
            "it has model, optimizer",
        ),
        (("plan", f"{SIG}/7"), 2, f"name its experiment, outputs/xps/{SIG}"),
        (("unpin", f"{SIG}/7"), 4, "is not pinned"),
        (("rm", f"{SIG}/6"), 2, "give --yes"),
        (("repair", SIG, "--from", "nowhere/x"), 4, "does not exist"),
    ],
)
def test_what_cannot_be_done_says_why_and_what_to_do(
    xp: Path, run: Any, arguments: tuple[str, ...], code: int, words: str
) -> None:
    before = listing(xp)
    assert words in run(*arguments, code=code)
    assert listing(xp) == before


def test_a_file_of_others_is_no_experiment(xp: Path, run: Any) -> None:
    torch.save({}, "model.th")
    assert "is a file, and this is about folders" in run("verify", "model.th", code=2)


@pytest.mark.parametrize("arguments", [(), ("what",), ("show",), ("ls", "--deep")])
def test_wrong_words_are_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


# --- ls, show, plan, pin


def test_ls_says_of_each_checkpoint_when_how_large_and_why(xp: Path, run: Any) -> None:
    info = {"metrics": {"valid": {"loss": 0.123456, "other": 1}}}
    Checkpointer(xp, **OPTIONS).save({"model": torch.ones(2)}, epoch=8, info=info)
    pin(storage_of(xp), "epoch_0006")
    pin_parent(storage_of(xp), "epoch_0007", "1a2b3c4d", "elsewhere")
    head, *lines = run("ls", SIG).splitlines()
    assert head == f"outputs/xps/{SIG}/checkpoints"
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"epoch_0004 +{date} +\S+ k?B +rolling, periodic", lines[1])
    assert "rolling, periodic, pinned" in lines[2]
    assert "rolling, continued by 1a2b3c4d" in lines[3]
    assert re.search(r"rolling, periodic +valid loss=0.1235 other=1$", lines[4])
    assert re.fullmatch(r"4 checkpoints, \S+ kB on disk", lines[-1])
    assert all(len(line) <= 100 for line in lines)


def test_ls_shows_the_metric_that_says_which_epoch_is_best(xp: Path, run: Any) -> None:
    metrics = {"train": {"a": 1.0}, "valid": {"a": 1.0, "b": 2.0, "c": float("nan")}}
    info = {"metrics": metrics, "config": {"checkpoint": {"best_metric": "c"}}}
    Checkpointer(xp, **OPTIONS).save({"model": torch.ones(2)}, epoch=8, info=info)
    assert "valid c=nan" in run("ls", f"{SIG}/8")


def test_ls_counts_a_shared_file_once(xp: Path, run: Any) -> None:
    one, other = (folder_of(xp, epoch) / "frozen.safetensors" for epoch in (6, 7))
    other.unlink()
    other.hardlink_to(one)
    (found,) = json.loads(run("ls", SIG, "--json"))
    _, sixth, seventh = found["checkpoints"]
    assert sixth["own"] == sixth["size"]
    assert seventh["own"] == seventh["size"] - one.stat().st_size
    on_disk = {f.stat().st_ino: f.stat().st_size for f in xp.glob("checkpoints/*/*")}
    assert sum(row["own"] for row in found["checkpoints"]) == sum(on_disk.values())
    assert " own " in run("ls", SIG).splitlines()[1]


def test_ls_tells_what_is_no_checkpoint(xp: Path, run: Any) -> None:
    (xp / "checkpoints/epoch_0008").mkdir()
    folder_of(xp, 6).rename(xp / "checkpoints/damaged_epoch_0006")
    flip(folder_of(xp, 7) / "manifest.json")
    (xp / "checkpoints/notes").mkdir()
    save_checkpoint(xp / "checkpoints/mine", {"model": torch.ones(1)}, epoch=3)
    text = run("ls", SIG)
    assert re.search(r"epoch_0008 .* interrupted, or being saved", text)
    assert re.search(r"damaged_epoch_0006 .* set aside, damaged", text)
    assert re.search(r"epoch_0007 .* DAMAGED", text)
    assert f"{folder_of(xp, 7).relative_to(xp.parents[2])}/manifest.json is damaged" in text
    assert re.search(r"^mine ", text, re.MULTILINE)
    assert "notes" not in text
    assert text.splitlines()[-1].startswith("2 checkpoints, ")


def test_ls_alone_lists_the_experiments(xp: Path, run: Any) -> None:
    train(xp.parent / "1a1a1a1a", 1, 1)
    (xp.parent / "2b2b2b2b").mkdir()
    _, first, second = run("ls").splitlines()
    assert re.match(rf"{SIG} +3  epoch_0007 ", first)
    assert re.match(r"1a1a1a1a +1  epoch_0001 ", second)
    assert len(json.loads(run("ls", "--json"))) == 2


def test_show_says_what_the_manifest_says(xp: Path, run: Any) -> None:
    lineage = {"sig": "1a1a1a1a", "epoch": 9, "from": {"sig": "2b2b2b2b", "epoch": 1, "step": 5}}
    info = {"sig": SIG, "lineage": lineage, "metrics": {"valid": {"loss": 0.5}}}
    Checkpointer(xp).save({"model": torch.ones(20, 3), "n": 1}, epoch=8, step=40, info=info)
    pin(storage_of(xp), "epoch_0008_step_00000040", "for the paper")
    text = run("show", f"{SIG}/epoch_0008_step_00000040")
    for words in (
        "position      in epoch 8, after 40 updates in all",
        "UTC, by one process",
        "pinned        for the paper",
        f"signature     {SIG}",
        "started from  1a1a1a1a epoch 9 <- 2b2b2b2b epoch 1 step 5",
        "metrics       valid loss=0.5",
    ):
        assert words in text
    assert re.search(r"model +1 +60 +240 B +model.safetensors", text)
    assert re.search(r"n +values in the manifest", text)
    assert "thinned out   frozen, optimizer" in run("show", f"{SIG}/4")


def test_show_lists_tensors_and_the_configuration(xp: Path, run: Any) -> None:
    lines = run("show", f"{SIG}/7", "--tensors", "model").splitlines()
    assert re.fullmatch(r"model +bias +BF16 +\[5\] +model.safetensors", lines[1]) or lines[2]
    assert {line.split()[0] for line in lines[1:]} == {"model"}
    sources = json.loads(run("show", f"{SIG}/7", "--tensors", "--json"))
    assert {s["name"] for s in sources if s["tensors"]} == {"model", "optimizer", "frozen"}
    config = {"optim": {"lr": 0.1, "betas": [1, 2]}, "label": None}
    change = {"epoch": 2, "step": 40, "change": "optim.lr was 0.2, is 0.1 now (0.1 counts)"}
    info = {"config": config, "sig": SIG, "changes": [change]}
    Checkpointer(xp).save({"n": 1}, epoch=8, info=info)
    text = run("show", f"{SIG}/8", "--config")
    assert text == (
        f"# the configuration of the run {SIG} when it saved {xp / 'checkpoints/epoch_0008'}\n"
        f"# changed at the start after epoch 2, update 40: {change['change']}\n"
        "optim.lr=0.1\noptim.betas=[1, 2]\nlabel=null\n"
    )
    assert json.loads(run("show", f"{SIG}/8", "--config", "--json")) == config


def test_json_is_json_whatever_was_saved(xp: Path, run: Any) -> None:
    odd = {"loss": float("nan"), "top": float("inf"), 3: (1, {2}), "bytes": b"x"}
    Checkpointer(xp).save({"n": 1}, epoch=8, info={"metrics": {"valid": odd}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for arguments in (("ls",), ("ls", SIG), ("show", f"{SIG}/8"), ("verify", SIG), ("plan", SIG)):
        json.loads(run(*arguments, "--json"), parse_constant=refuse)
    json.loads(run("repair", SIG, "--dry-run", "--json"), parse_constant=refuse)


def test_plan_is_the_one_of_the_run_and_changes_nothing(xp: Path, run: Any) -> None:
    before = listing(xp)
    (found,) = json.loads(run("plan", SIG, "--json"))
    planned = {v.position.name: (v.action, v.why) for v in Checkpointer(xp, **OPTIONS).plan()}
    of_command = {v["name"]: (v["verdict"]["action"], v["verdict"]["why"]) for v in found["plan"]}
    assert of_command == planned
    assert "one of the newest two" in run("plan", SIG)
    assert listing(xp) == before


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(xp: Path, run: Any) -> None:
    run("pin", f"{SIG}/7", "--note", "the best so far")
    train(xp, 8, 10)
    assert folder_of(xp, 7).exists()
    assert "the best so far" in run("show", f"{SIG}/7")
    run("unpin", f"{SIG}/7")
    Checkpointer(xp, **OPTIONS).flush()
    assert not folder_of(xp, 7).exists()


def test_what_is_no_checkpoint_cannot_be_pinned(xp: Path, run: Any) -> None:
    (folder_of(xp, 7) / "manifest.json").unlink()
    assert "is no committed checkpoint" in run("pin", f"{SIG}/7", code=4)


# --- verify


def test_verify_of_what_is_good_is_0(xp: Path, run: Any) -> None:
    assert run("verify", SIG).splitlines()[-1] == "all 3 are good"
    assert run("verify", SIG, "--deep").splitlines()[-1] == "all 3 are good"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_flip_in_every_file_and_goes_on(
    xp: Path, run: Any, name: str, deep: bool
) -> None:
    bad = [folder_of(xp, 6) / name, folder_of(xp, 7) / name]
    for file in bad:
        flip(file)
    text = run("verify", SIG, *(["--deep"] if deep else []), code=3)
    for file in bad:
        assert f"{file} is damaged: " in text
    assert "epoch_0004: good" in text
    assert text.endswith("2 of 3 checkpoints damaged\n")


def test_verify_tells_missing_short_and_swapped_files(xp: Path, run: Any) -> None:
    folder = folder_of(xp, 7)
    (folder / "model.safetensors").unlink()
    os.truncate(folder / "frozen.safetensors", 60)
    shutil.copy(folder_of(xp, 6) / "optimizer.safetensors", folder)
    text = run("verify", f"{SIG}/7", code=3)
    assert f"{folder}/model.safetensors: missing: " in text
    assert f"{folder}/frozen.safetensors is damaged: it has 60 bytes instead of " in text
    assert f"{folder}/optimizer.safetensors is damaged: its digest is " in text
    shutil.copy(folder_of(xp, 6) / "manifest.json", folder)
    assert "it is that of epoch_0006" in run("verify", f"{SIG}/7", code=3)


def test_verify_deep_names_the_tensor(xp: Path, run: Any) -> None:
    flip(folder_of(xp, 7) / "frozen.safetensors")
    assert "the damage is in tensor 'encoder'" in run("verify", f"{SIG}/7", "--deep", code=3)


def test_verify_deep_tells_what_is_not_finite_which_is_no_damage(tmp_path: Path, run: Any) -> None:
    tensors: dict[str, torch.Tensor] = {
        "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "complex": torch.tensor([complex(0, float("inf"))]),
        "eight": torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        "good": torch.zeros(3),
        "good_eight": torch.ones(3).to(torch.float8_e5m2),
        "integers": torch.full((3,), -1),
    }
    save_checkpoint(tmp_path / "checkpoints/epoch_0001", {"model": tensors}, epoch=1)
    text = run("verify", tmp_path, "--deep")
    found = re.findall(r"model/(\w+) is not finite", text)
    assert sorted(found) == ["complex", "eight", "half"]


def test_verify_deep_finds_a_header_and_an_index_that_disagree_with_the_manifest(
    tmp_path: Path,
) -> None:
    """As a writer with a defect would leave them: each file has the digest that it should have."""
    for name, what in (("model.safetensors", "tensor"), ("model.safetensors.index.json", "say")):
        folder = tmp_path / name / "checkpoints/epoch_0001"
        save_checkpoint(folder, {"model": {"a": torch.zeros(2), "b": torch.ones(2)}}, epoch=1)
        wrong(folder, name)
        (found,) = verify(tmp_path / name, deep=True)
        (damage,) = found.damages
        assert damage.path == str(folder / name)
        assert what in damage.what


def wrong(folder: Path, name: str) -> None:
    from dataclasses import replace

    from checkpoint.format.digest import Digest
    from checkpoint.format.manifest import Manifest
    from checkpoint.format.tensor_index import FileRecord

    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    data = json.dumps({"weight_map": {"a": "model.safetensors", "b": "elsewhere"}}).encode()
    if name == "model.safetensors":
        data = (folder / name).read_bytes().replace(b'"a"', b'"c"')
    (folder / name).write_bytes(data)
    record = FileRecord("model", len(data), str(Digest(data)))
    changed = replace(manifest, files={**manifest.files, name: record})
    (folder / "manifest.json").write_bytes(changed.to_bytes())


def verify_deep(report: Any, folder: str) -> None:
    report([one.damages for one in verify(Path(folder), deep=True)])


def test_verify_holds_little_in_memory(tmp_path: Path) -> None:
    large = {"model": {"weight": torch.zeros(48, 2**20)}}
    save_checkpoint(tmp_path / "checkpoints/epoch_0001", large, epoch=1)
    outcome = in_child(verify_deep, tmp_path)
    assert outcome.reports == [[[]]], outcome.error
    assert outcome.memory < 64 * 2**20, "the file has 192 MiB"


# --- rm


def test_rm_deletes_and_says_what_that_freed(xp: Path, run: Any) -> None:
    text = run("rm", f"{SIG}/6", f"{SIG}/epoch_0004", "--yes")
    assert re.search(r"deleted epoch_0006, epoch_0004 in \S+; that freed \d+\.\d+ kB", text)
    assert not folder_of(xp, 6).exists()
    assert not folder_of(xp, 4).exists()


def test_rm_says_how_much_is_freed_where_files_are_shared(xp: Path, run: Any) -> None:
    shutil.rmtree(folder_of(xp, 6))
    shutil.copytree(folder_of(xp, 7), folder_of(xp, 6), copy_function=os.link)
    assert "that freed 0 B" in run("rm", f"{SIG}/6", "--yes", "--force")


def test_rm_deletes_what_was_set_aside_and_what_was_interrupted(xp: Path, run: Any) -> None:
    folder_of(xp, 6).rename(xp / "checkpoints/damaged_epoch_0006")
    (folder_of(xp, 4) / "manifest.json").unlink()
    run("rm", f"{SIG}/damaged_epoch_0006", f"{SIG}/4", "--yes")
    assert [folder.name for folder in (xp / "checkpoints").glob("*/")] == ["epoch_0007"]


def test_rm_refuses_what_would_be_regretted(xp: Path, run: Any) -> None:
    before = listing(xp)
    pin(storage_of(xp), "epoch_0006", "mine")
    assert "epoch_0006 is pinned (mine)" in run("rm", f"{SIG}/6", "--yes", code=1)
    pin_parent(storage_of(xp), "epoch_0004", "1a2b3c4d", "elsewhere")
    text = run("rm", f"{SIG}/4", "--yes", code=1)
    assert "1a2b3c4d continued from epoch_0004" in text
    flip(folder_of(xp, 4) / "model.safetensors")
    flip(folder_of(xp, 6) / "model.safetensors")
    text = run("rm", f"{SIG}/7", "--yes", code=1)
    assert "no good checkpoint of the experiment would be left" in text
    assert {*before} < {*listing(xp)}
    run("rm", f"{SIG}/4", f"{SIG}/6", f"{SIG}/7", "--yes", "--force")
    assert listing(xp) == ["checkpoints"]


def test_rm_deletes_no_folder_that_is_no_checkpoint(xp: Path, run: Any) -> None:
    (xp / "checkpoints/notes").mkdir()
    assert "is no checkpoint" in run("rm", f"{SIG}/notes", "--yes", code=1)
    assert (xp / "checkpoints/notes").exists()


@pytest.fixture
def alive(xp: Path) -> Iterator[int]:
    """Give the number of a process that runs the experiment."""
    code = (
        "import sys; from pathlib import Path; from checkpoint.storage import LocalStorage; "
        "lock = LocalStorage(Path(sys.argv[1])).lock(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(xp / "checkpoints")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def test_what_changes_checkpoints_is_refused_while_the_run_is_alive(
    xp: Path, run: Any, alive: int
) -> None:
    before = listing(xp)
    for arguments in (("rm", f"{SIG}/4", "--yes"), ("repair", SIG)):
        text = run(*arguments, code=1)
        assert f"process {alive} on " in text
        assert "runs this experiment" in text
    assert listing(xp) == before
    for arguments in (("ls",), ("verify", SIG), ("plan", SIG), ("repair", SIG, "--dry-run")):
        run(*arguments)
    run("pin", f"{SIG}/4")


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("\n", 1)])
def test_rm_asks_at_a_terminal(xp: Path, answer: str, code: int) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-m", "checkpoint", "rm", f"{SIG}/6"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=theirs,
        capture_output=True,
        text=True,
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "delete epoch_0006 in " in done.stderr
    assert folder_of(xp, 6).exists() == (code == 1)


# --- the command itself


def test_the_command_is_a_module_with_exit_codes(xp: Path, command: Command) -> None:
    text = command("checkpoint", "--help", cwd=xp).stdout
    assert "exit codes: 0 all is good" in text
    assert all(name in text for name in COMMANDS)
    flip(folder_of(xp, 7) / "model.safetensors")
    command("checkpoint", "verify", ".", cwd=xp, code=3)
    command("checkpoint", "verify", "elsewhere", cwd=xp, code=4)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    assert COMMANDS[name][0][1:20] in text


def test_a_reader_that_goes_away_is_no_traceback(xp: Path) -> None:
    line = f"{sys.executable} -m checkpoint show {SIG}/7 --tensors | head -n 1"
    done = subprocess.run(
        ["sh", "-c", line],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [("['--help']", None), ("['repair', '--help']", None), ("[]", "checkpoint ls ")],
)
def test_help_and_completion_take_no_torch(
    tmp_path: Path, arguments: str, line: str | None
) -> None:
    code = (
        "import sys, atexit; from checkpoint.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'solvers', 'dora', 'hydra'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {} if line is None else completing(line, tmp_path / "words")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def completing(line: str, words: Path) -> dict[str, str]:
    """Return the environment in which a shell asks to complete a line; the answer is in a file."""
    return {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(words),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }


@pytest.fixture
def candidates(tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function that gives what a shell offers for the last word of a line."""

    def found(line: str) -> list[str]:
        words = tmp_path / "words"
        command = [sys.executable, "-m", "checkpoint"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | completing(line, words)
        # Not in this process: argcomplete writes to descriptors that pytest has open.
        subprocess.run(command, env=environment, check=True)
        return sorted(filter(None, words.read_text().split("\n")))

    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("checkpoint ", sorted(COMMANDS)),
        ("checkpoint re", ["repair"]),
        ("checkpoint ls ", [SIG]),
        ("checkpoint verify --deep 0a", [SIG]),
        ("checkpoint show ", [f"{SIG}/"]),
        ("checkpoint show 0a1b2c3d/epoch_0006", [f"{SIG}/epoch_0006"]),
        ("checkpoint rm 0a1b2c3d/4 0a1b2c3d/", [f"{SIG}/epoch_000{n}" for n in (4, 6, 7)]),
        ("checkpoint ls --xps elsewhere ", []),
        ("checkpoint ls --xps ", []),
        ("checkpoint verify --d", ["--deep"]),
        ("checkpoint completion ", sorted(SHELLS)),
        ("checkpoint pin 0a1b2c3d/epoch_0007 --note ", []),
    ],
)
def test_completion_offers_what_fits(
    xp: Path, candidates: Callable[[str], list[str]], line: str, expected: list[str]
) -> None:
    assert candidates(line) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_completion_offers_every_option(
    name: str, candidates: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {*candidates(f"checkpoint {name} --")} | {"--help"} == options | {"--help"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "replies"),
    [("checkpoint ver", ["verify"]), ("checkpoint show 0a", [f"{SIG}/"]), ("checkpoint ls x", [])],
)
def test_bash_completes_a_line(xp: Path, tmp_path: Path, line: str, replies: list[str]) -> None:
    program = tmp_path / "bin/checkpoint"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m checkpoint "$@"\n')
    program.chmod(0o755)
    script = (
        "source <(checkpoint completion bash); COMP_LINE=$1; COMP_POINT=${#1}; "
        '_python_argcomplete checkpoint; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        env=os.environ | paths,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == replies, done.stderr
