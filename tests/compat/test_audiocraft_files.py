"""What Audiocraft wrote is taken up: a folder in place, weights of any kind by `continue_from`."""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from toy import Regression, assert_same, built, config, contents, ran, snapshot

from checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
    StateMismatch,
    UnsupportedFormat,
)
from solvers.state.progress import Progress

SCHEDULE: dict[str, Any] = {"lr_scheduler": "cosine", "cosine": {"warmup": 4}}
SETTINGS = "optim.ema.use=true", "optim.ema.updates=1"
THEIRS = "ac1ac1ac"


def audiocraft_state(root: Path) -> dict[str, Any]:
    """Return the state that Audiocraft's solver would have saved at the end of epoch 2.

    Model, best state and average are all different, and history holds what stages returned.
    """
    run = ran(Regression, root / "made", "aaaa", *SETTINGS, until=2, schedule=SCHEDULE)
    state, cfg = run.state, config(*SETTINGS, schedule=SCHEDULE, link="${optim.epochs}")
    assert cfg.link == 3
    history = [dict(epoch) for epoch in state["history"]]
    history[0]["evaluate"] = {"tensor": torch.tensor(0.5), "narrow": np.float32(0.25)}
    best = {key: value + 1 for key, value in state["best_state"]["model"].items()}
    averages = defaultdict(
        dict, model={k: v + 2 for k, v in state["ema"]["state"]["model"].items()}
    )
    return {
        "history": history,
        "xp.cfg": cfg,
        "xp.sig": THEIRS,
        "best_state": {"model": best},
        "fsdp_best_state": {},
        "model": state["model"],
        "optimizer": state["optimizer"],
        "lr_scheduler": state["lr_scheduler"],
        "ema": {"state": averages, "count": state["ema"]["count"]},
    }


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, Any]:
    """Write an experiment as Audiocraft does, below the folder of the test; return its state."""
    state, folder = audiocraft_state(tmp_path), tmp_path / "xps" / THEIRS
    folder.mkdir(parents=True)
    torch.save(state, folder / "checkpoint.th")
    plain = [
        {stage: {k: float(v) for k, v in m.items()} for stage, m in epoch.items()}
        for epoch in state["history"]
    ]
    (folder / "history.json").write_text(json.dumps(plain))
    (folder / ".argv.json").write_text("[]")
    return state


# In place.


def test_an_experiment_of_audiocraft_goes_on_in_place(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    with built(Regression, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE) as solver:
        assert solver.restore()
        assert solver.epoch == 3
        assert solver.history[0]["evaluate"] == {"tensor": 0.5, "narrow": 0.25}
        found = snapshot(solver)
    for name in ("model", "optimizer", "lr_scheduler", "best_state", "ema"):
        assert_same(theirs[name], found[name], name)
    assert found["optimizer"]["state"][0]["step"] == 8
    assert found["progress"] == Progress(step=8).state_dict()
    assert found["fsdp_best_state"] == {}


def test_sources_of_theirs_can_be_left_out(tmp_path: Path, theirs: dict[str, Any]) -> None:
    with built(Regression, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE) as solver:
        assert solver.restore(ignore_state_keys=["optimizer"])
        assert not solver.optimizer.state
        assert_same(theirs["model"], dict(solver.model.state_dict()))


def test_from_the_next_commit_on_our_checkpoint_counts_and_theirs_stays(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    folder = tmp_path / "xps" / THEIRS
    before = (folder / "checkpoint.th").read_bytes()
    done = ran(Regression, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE)
    assert len(done.history) == 3
    assert done.history[1] == theirs["history"][1]
    assert done.state["optimizer"]["state"][0]["step"] == 12
    assert (folder / "checkpoint.th").read_bytes() == before
    assert [p.epoch for p in Checkpointer(folder).positions()] == [3]
    loaded = Checkpointer(folder).load_newest()
    assert loaded is not None
    assert json.loads((folder / "history.json").read_text()) == loaded.state["history"]

    (folder / "checkpoint.th").write_bytes(b"not looked at any more")
    with built(Regression, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE) as solver:
        assert solver.restore()
        assert_same(done.state, snapshot(solver))


def test_a_sharded_best_state_is_kept_until_the_run_finds_a_better_one(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    class Latest(Regression):
        best_metric_name = None

    file = tmp_path / "xps" / THEIRS / "checkpoint.th"
    torch.save(theirs | {"fsdp_best_state": {"model": theirs["model"]}}, file)
    with built(Latest, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE) as solver:
        assert solver.restore()
        assert_same(theirs["model"], solver.fsdp_best_state["model"])
    done = ran(Latest, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE)
    assert done.state["fsdp_best_state"] == {}


# By continue_from.


def shifted(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 5 for key, value in state["model"].items()}


def saved(path: Path, state: Any) -> str:
    torch.save(state, path)
    return str(path)


def weights_file(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, path)
    return str(path)


LoadRequest = tuple[str, dict[str, torch.Tensor]]
Way = Callable[[Path, dict[str, Any]], LoadRequest]
FOLDER = Path("xps") / THEIRS


def best(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = state["best_state"]["model"]
    return weights


WAYS: dict[str, Way] = {
    "its file": lambda root, state: (str(root / FOLDER / "checkpoint.th"), best(state)),
    "its folder": lambda root, state: (str(root / FOLDER), best(state)),
    "its signature": lambda root, state: (f"//sig/{THEIRS}", best(state)),
    "only a best state": lambda root, state: (
        saved(root / "b.th", {"best_state": state["best_state"]}),
        best(state),
    ),
    "an exported best state": lambda root, state: (
        saved(root / "e.th", {"best_state": best(state), "xp.cfg": OmegaConf.create({})}),
        best(state),
    ),
    "a sharded best state": lambda root, state: (
        saved(root / "f.th", state | {"fsdp_best_state": {"model": shifted(state)}}),
        shifted(state),
    ),
    "only a model": lambda root, state: (
        saved(root / "m.th", {"model": state["model"]}),
        state["model"],
    ),
    "a state dict": lambda root, state: (saved(root / "s.pt", state["model"]), state["model"]),
    "safetensors": lambda root, state: (
        weights_file(root / "w.safetensors", shifted(state)),
        shifted(state),
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_another_run_takes_the_weights_and_all_else_is_fresh(
    tmp_path: Path, theirs: dict[str, Any], way: Way
) -> None:
    reference, wanted = way(tmp_path, theirs)
    before = contents(tmp_path)
    settings = *SETTINGS, f"continue_from={reference}"
    with built(Regression, tmp_path, "bbbb", *settings, schedule=SCHEDULE) as solver:
        fresh = snapshot(solver)
        fresh["lr_scheduler"] = copy.deepcopy(solver.lr_scheduler.state_dict())
        assert solver.restore()
        found = snapshot(solver)
        assert solver.epoch == 1
    assert_same(wanted, found.pop("model"))
    assert_same({"model": wanted}, found.pop("best_state"))
    ema = found.pop("ema")
    assert ema["count"] == 0
    for key, average in ema["state"]["model"].items():
        assert torch.equal(average, wanted[key]), key
    assert_same({name: fresh[name] for name in found}, found)
    assert contents(tmp_path) == before


def test_a_run_that_continued_from_a_file_does_not_need_it_again(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    file = tmp_path / FOLDER / "checkpoint.th"
    settings = *SETTINGS, f"continue_from={file}"
    whole = ran(Regression, tmp_path, "bbbb", *settings)
    ran(Regression, tmp_path, "cccc", *settings, until=1)
    file.unlink()
    assert_same(whole.state, ran(Regression, tmp_path, "cccc", *settings, seed=5).state)
    loaded = Checkpointer(tmp_path / "xps/cccc").load_newest()
    assert loaded is not None
    lineage = loaded.manifest.info["lineage"]
    assert lineage == {"sig": THEIRS, "epoch": 2, "step": None, "path": str(file), "from": None}


# What does not fit, and what is damaged.


class Idle(Regression):
    """Must not come to train."""

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        pytest.fail("a batch was run")


def changed(state: dict[str, Any]) -> dict[str, Any]:
    """Change the model that a state holds, everywhere: a tensor missing, one more, one reshaped."""
    state = copy.deepcopy(state)
    for weights in (state["best_state"]["model"], state["model"]):
        del weights["4.bias"]
        weights |= {"alien": torch.ones(1), "0.weight": torch.ones(1, 4)}
    return state


def cut(path: Path, state: dict[str, Any], share: float) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


Write = Callable[[Path, dict[str, Any], Path], Any]
NAMES = "missing: 4.bias", "unexpected: alien", "reshaped: 0.weight (1, 4) into (8, 4)"
PAYLOADS = (
    "pickle payload in the zip format",
    "payload through a name on the stack",
    "bare pickle payload",
)

MISFITS: dict[str, tuple[Write, type[CheckpointError], tuple[str, ...]]] = {
    "another model": (
        lambda path, state, _: torch.save(changed(state), path),
        *(StateMismatch, NAMES),
    ),
    "neither best state nor model": (
        lambda path, state, _: torch.save({"history": [], "xp.sig": "ffff"}, path),
        *(StateMismatch, ("no best state and no model", "it holds history")),
    ),
    "cut in half": (
        lambda path, state, _: cut(path, state, 0.5),
        *(CorruptCheckpoint, ("damaged", "copy it again")),
    ),
    "cut at the end": (
        lambda path, state, _: cut(path, state, 0.999),
        *(CorruptCheckpoint, ("damaged", "copy it again")),
    ),
    "empty": (lambda path, state, _: path.write_bytes(b""), CheckpointError, ()),
    **{
        name: (
            lambda path, state, marker, name=name: hostile.TORCH[name](path, marker),
            *(UnsupportedFormat, ("cannot be read",)),
        )
        for name in PAYLOADS
    },
}


@pytest.mark.parametrize("given", ["file", "folder", "signature"])
@pytest.mark.parametrize(("write", "kind", "words"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_cannot_be_continued_from_is_named_and_nothing_is_done(
    tmp_path: Path,
    theirs: dict[str, Any],
    write: Write,
    kind: type[CheckpointError],
    words: tuple[str, ...],
    given: str,
) -> None:
    marker, file = tmp_path / "marker", tmp_path / FOLDER / "checkpoint.th"
    write(file, theirs, marker)
    before = contents(tmp_path)
    references = {"file": file, "folder": file.parent, "signature": f"//sig/{THEIRS}"}
    settings = *SETTINGS, f"continue_from={references[given]}"
    with pytest.raises(kind) as error:
        ran(Idle, tmp_path, "bbbb", *settings)
    for part in (str(file), *words):
        assert part in str(error.value)
    assert contents(tmp_path) == before
    assert not marker.exists()


IN_PLACE = {name: case for name, case in MISFITS.items() if name != "neither best state nor model"}


@pytest.mark.parametrize(("write", "kind", "words"), IN_PLACE.values(), ids=IN_PLACE)
def test_a_file_that_cannot_be_resumed_is_named_and_no_run_starts_over(
    tmp_path: Path,
    theirs: dict[str, Any],
    write: Write,
    kind: type[CheckpointError],
    words: tuple[str, ...],
) -> None:
    marker, file = tmp_path / "marker", tmp_path / FOLDER / "checkpoint.th"
    write(file, theirs, marker)
    before = contents(tmp_path)
    with pytest.raises(kind) as error:
        ran(Idle, tmp_path, THEIRS, *SETTINGS, schedule=SCHEDULE)
    for part in (str(file), *words):
        assert part in str(error.value)
    assert contents(tmp_path) == before
    assert not marker.exists()


def test_weights_of_safetensors_that_do_not_fit_are_named(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    file = tmp_path / "w.safetensors"
    save_file(changed(theirs)["model"], file)
    with pytest.raises(StateMismatch) as error:
        ran(Idle, tmp_path, "bbbb", f"continue_from={file}")
    for part in (str(file), *NAMES):
        assert part in str(error.value)


def test_a_best_state_of_sources_that_are_not_there_is_refused(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    file = tmp_path / "g.th"
    torch.save({"best_state": {"generator": theirs["model"]}}, file)
    with pytest.raises(StateMismatch, match=f"{re.escape(str(file))}.*'generator'.*none of these"):
        ran(Idle, tmp_path, "bbbb", f"continue_from={file}")


def test_a_file_that_is_not_there_says_what_is_nearby(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    file = tmp_path / FOLDER / "checkpont.th"
    with pytest.raises(MissingCheckpoint, match=f"{re.escape(str(file))}.*nearby.*checkpoint.th"):
        ran(Idle, tmp_path, "bbbb", f"continue_from={file}")
