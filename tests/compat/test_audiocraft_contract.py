"""Solvers written for Audiocraft's base class train, go on, swap, evaluate and read each other.

The package `audiocraft_style` holds them: with Dora and Hydra, in one process.
"""

import copy
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audiocraft_style import train
from dora import XP
from omegaconf import DictConfig, OmegaConf
from toy import assert_same, contents, snapshot

from checkpoint import Checkpointer, CheckpointError, StateMismatch
from solvers import audiocraft

# Dora closes neither of the two small files that it keeps in an experiment's folder.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

KINDS = ["compression", "musicgen", "diffusion"]


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the experiments in a folder of the test's."""
    monkeypatch.setattr(train.main.dora, "dir", tmp_path)
    return tmp_path


def experiment(*argv: str) -> XP:
    xp = train.main.get_xp(list(argv))
    train.main.init_xp(xp)
    return xp


def run(*argv: str, until: int | None = None, seed: int = 0) -> Any:
    """Do what `dora run` with these arguments does; return the solver and all its state.

    Args:
        until: the epoch after which the run is killed.
        seed: of the random generators; a run that goes on must not depend on it.
    """
    xp = experiment(*argv)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with xp.enter():
        if until is None:
            solver = train.main.main(xp.cfg)
        else:
            solver = train.get_solver(xp.cfg)
            solver.should_stop_training = lambda: solver.epoch > until
            # What is killed does not evaluate before.
            solver._run_last_stages = lambda: None
            solver.run()
        return solver, snapshot(solver)


@pytest.fixture(scope="module")
def trained_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a codec once; return its experiment's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.main.dora, "dir", tmp_path_factory.mktemp("codec"))
        folder: Path = run("solver=compression/tiny", "optim.epochs=1")[0].folder
    return folder


@pytest.fixture
def codec(trained_codec: Path, outputs: Path) -> str:
    """Bring a codec into the folder of the test; return the argument that others read it by."""
    shutil.copytree(trained_codec, outputs / "xps" / trained_codec.name)
    return f"compression_model_checkpoint=//sig/{trained_codec.name}"


def arguments(kind: str, codec: str, *more: str) -> list[str]:
    return [f"solver={kind}/tiny", *([] if kind == "compression" else [codec]), *more]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_between_epochs_ends_as_if_it_had_not(
    tmp_path: Path, codec: str, kind: str
) -> None:
    argv = arguments(kind, codec)
    _, whole = run(*argv)
    (tmp_path / "xps" / experiment(*argv).sig).rename(tmp_path / "whole")
    for epoch in (1, 2, 3):
        stopped, _ = run(*argv, until=epoch, seed=epoch - 1)
        assert len(stopped.history) == epoch
    solver, resumed = run(*argv, seed=9)
    assert_same(whole, resumed)
    assert [set(epoch) for epoch in solver.history] == [
        {"train", "valid"},
        {"train", "valid", "evaluate", "generate"},
    ] * 2
    assert json.loads((solver.folder / "history.json").read_text()) == solver.history


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_failed_while_it_evaluated_does_not_train_that_epoch_again(
    codec: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(kind, codec)
    _, whole = run(*argv)
    (tmp_path / "xps" / experiment(*argv).sig).rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train.SOLVERS[kind], "evaluate", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*argv)
    trained: list[int] = []
    with monkeypatch.context() as patch:
        stage = train.SOLVERS[kind].train
        patch.setattr(
            train.SOLVERS[kind], "train", lambda self: (trained.append(self.epoch), stage(self))[1]
        )
        _, resumed = run(*argv, seed=9)
    assert trained == [3, 4]
    assert_same(whole, resumed)


def test_what_the_subclass_sets_is_not_asked_for_too_early(codec: str) -> None:
    solver, state = run(*arguments("musicgen", codec, "optim.epochs=1"))
    assert solver.best_metric_name == "ce"
    assert solver.dataloaders["train"].epoch == 1, "the loader that was put in place later is used"
    assert solver.total_updates == 4
    assert solver.lr_scheduler.total_steps == 4
    assert list(state["best_state"]) == ["model"]


def test_the_sources_are_audiocrafts_and_lie_where_they_are_expected(codec: str) -> None:
    known = {"history", "best_state", "fsdp_best_state", "model", "optimizer", "ema"}
    ours = {"progress", "random_state", "loader_state", "generator_state", "module_modes"}
    more = {
        "compression": "adv_losses",
        "musicgen": "lr_scheduler",
        "diffusion": "sample_processor",
    }
    for kind, last in more.items():
        solver, _ = run(*arguments(kind, codec, "optim.epochs=1"))
        loaded = Checkpointer(solver.folder).load_newest()
        assert loaded is not None
        assert set(loaded.state) == known | ours | {last}
        assert list(solver.state_dict())[:3] == ["history", "xp.cfg", "xp.sig"]
        assert solver.state_dict()["xp.cfg"] is solver.xp.cfg


def test_the_optimizer_inside_the_adversary_goes_on_too(codec: str) -> None:
    solver, state = run(*arguments("compression", codec, "optim.epochs=2"))
    kept = Checkpointer(solver.folder).load_newest()
    assert kept is not None
    inside = kept.state["adv_losses"]["msd.optimizer"]
    assert_same(state["adv_losses"]["msd.optimizer"], inside)
    assert inside["state"][0]["step"] > 0
    assert inside["param_groups"][0]["betas"] == (0.9, 0.999)


def test_epochs_that_run_nothing_are_committed_and_resumed(codec: str) -> None:
    argv = arguments("musicgen", codec, "cache.write=true")
    run(*argv, until=2)
    solver, _ = run(*argv)
    assert [bool(epoch) for epoch in solver.history] == [True, False, True, False]
    assert solver.epoch == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_uses_the_type_that_the_subclass_assigns(codec: str, dtype: str) -> None:
    argv = arguments("musicgen", codec, "autocast=true", f"autocast_dtype={dtype}")
    run(*argv, until=1)
    solver, state = run(*argv)
    assert solver.autocast.fast_dtype == getattr(torch, dtype)
    assert solver.autocast is not solver.autocast
    assert ("scaler" in state) == (dtype == "float16")
    if dtype == "float16":
        assert state["history"][-1]["train"]["grad_scale"] > 8
    assert state["best_state"]["model"]["emb.weight"].dtype == torch.float32


def test_past_epochs_are_shown_again_with_the_formatter_of_the_stage(
    codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    argv = arguments("musicgen", codec)
    run(*argv, until=2)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(*argv, until=2)
    shown = [record.getMessage() for record in caplog.records if "Summary" in record.getMessage()]
    assert len(shown) == 6, "two stages in epoch 1, four in epoch 2, and no stage was run"
    assert "ce=" in shown[0]
    assert "ppl" not in shown[0]


def test_progress_is_logged_over_a_list_without_total(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run("solver=compression/tiny", "optim.epochs=1")
    lines = [record.getMessage() for record in caplog.records]
    assert any("Train | Epoch 1 | 1/4" in line for line in lines)
    assert any("Evaluate metrics | Epoch 1 | 1/2" in line for line in lines)


def test_metrics_by_stage_of_noise_are_averaged_where_they_occur(codec: str) -> None:
    solver, _ = run(*arguments("diffusion", codec))
    names = {name for epoch in solver.history for name in epoch["train"]}
    assert names == {"loss", "duration", "loss_0", "loss_1", "loss_2", "loss_3"}
    assert solver.best_metric_name == "loss", "asked for outside of a stage"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["evaluate", "generate", "valid"])
def test_one_stage_runs_alone_in_place(codec: str, kind: str, stage: str, tmp_path: Path) -> None:
    if (kind, stage) == ("diffusion", "valid"):
        pytest.skip("DiffusionSolver needs what its run_epoch sets for that, on any base (E12)")
    if kind == "compression" and stage == "valid":
        argv = arguments(kind, codec, "optim.epochs=1")
    else:
        argv = arguments(kind, codec, "optim.epochs=2")
    solver, _ = run(*argv)
    before = contents(solver.folder)
    again = experiment(*argv)
    again.cfg.execute_only, again.cfg.execute_inplace = stage, True
    torch.manual_seed(5)
    with again.enter():
        alone = train.main.main(again.cfg)
    metrics = dict(alone._pending_metrics[stage])
    assert metrics.pop("duration") >= 0
    assert metrics.keys() == solver.history[-1][stage].keys() - {"duration"}
    after = contents(solver.folder)
    if stage == "generate":
        # What it makes lies beside what the run made before.
        after = {name: data for name, data in after.items() if not name.startswith("samples/3")}
    assert after == before


def test_one_stage_of_another_experiment_is_committed_without_a_checkpoint(codec: str) -> None:
    first, _ = run(*arguments("musicgen", codec, "optim.epochs=1"))
    reference = f"continue_from=//sig/{first.xp.sig}"
    alone, _ = run(*arguments("musicgen", codec, reference, "execute_only=evaluate"))
    assert alone.xp.sig != first.xp.sig
    assert [set(epoch) for epoch in alone.history] == [{"evaluate"}]
    assert not alone.checkpointer.positions()
    assert json.loads((alone.folder / "history.json").read_text()) == alone.history
    with pytest.raises(ValueError, match="cannot run only 'train'"):
        alone.run_one_stage("train")


@pytest.mark.parametrize("kind", KINDS)
def test_another_experiment_gives_its_best_weights_and_all_else_is_fresh(
    codec: str, kind: str
) -> None:
    first, done = run(*arguments(kind, codec))
    reference = f"continue_from=//sig/{first.xp.sig}"
    xp = experiment(*arguments(kind, codec, reference))
    before = contents(first.folder)
    with xp.enter():
        solver = train.get_solver(xp.cfg)
        assert solver.restore()
    best = done["best_state"]["model"]
    assert_same(best, dict(solver.model.state_dict()))
    assert_same(best, solver.best_state.state_dict()["model"])
    if solver.ema is not None:
        assert solver.ema.count == 0
        for key, value in solver.ema.state["model"].items():
            assert torch.equal(value, best[key])
    assert solver.epoch == 1
    assert not solver.optimizer.state
    second, _state = run(*arguments(kind, codec, reference))
    assert len(second.history) == 4
    run(*arguments(kind, codec, reference, "optim.epochs=5"), until=1)
    # Each that continued left a mark, so that what it came from is kept.
    after = {k: v for k, v in contents(first.folder).items() if "/continued-by-" not in k}
    assert after == before, "nothing else is done to the experiment that is read"


def test_once_there_is_a_checkpoint_continue_from_is_history(codec: str, tmp_path: Path) -> None:
    first, _ = run(*arguments("musicgen", codec, "optim.epochs=1"))
    argv = arguments("musicgen", codec, f"continue_from={first.folder}")
    _, whole = run(*argv)
    second = experiment(*argv)
    second.folder.rename(tmp_path / "whole")
    run(*argv, until=2)
    first.folder.rename(tmp_path / "gone")
    _, resumed = run(*argv, seed=3)
    assert_same(whole, resumed)


def test_a_pretrained_model_comes_from_the_subclass(codec: str) -> None:
    for kind in ("compression", "musicgen"):
        xp = experiment(*arguments(kind, codec, "continue_from=//pretrained/facebook/name"))
        with xp.enter():
            solver = train.get_solver(xp.cfg)
            expected = solver.load_from_pretrained("facebook/name")["best_state"]["model"]
            assert solver.restore()
        assert_same(dict(expected), dict(solver.model.state_dict()))
    with experiment(*arguments("diffusion", codec, "continue_from=//pretrained/x")).enter() as _:
        pass


def test_keys_that_an_older_solver_wrote_are_moved_by_the_subclass(codec: str) -> None:
    argv = arguments("musicgen", codec, "optim.epochs=2")
    solver, done = run(*argv, until=1)
    state = copy.deepcopy(Checkpointer(solver.folder).load_newest().state)  # type: ignore[union-attr]
    old = {"emb.weight": state["model"].pop("emb.weight")}
    state["condition_provider"] = old
    with solver.xp.enter():
        solver.load_state_dict(state)
    assert_same(done["model"], dict(solver.model.state_dict()))
    with pytest.raises(StateMismatch, match="'unheard_of', which this solver never registered"):
        solver.load_state_dict({"unheard_of": {}})


def test_a_language_model_reads_its_codec_from_another_experiment(codec: str) -> None:
    sig = codec.rsplit("/")[-1]
    reference = f"//sig/{sig}"
    solver, _ = run(*arguments("musicgen", codec, "optim.epochs=1"))
    with solver.xp.enter():
        path = audiocraft.resolve_checkpoint_path(reference)
        assert path is not None
        state = audiocraft.load_checkpoint(path)
    assert isinstance(state["xp.cfg"], DictConfig)
    assert state["xp.cfg"].solver == "compression"
    state["xp.cfg"].device = "cuda"
    assert state["xp.cfg"].device == "cuda"
    assert state["xp.sig"] == sig
    assert state["fsdp_best_state"] == {}
    assert OmegaConf.to_yaml(state["xp.cfg"])
    assert_same(dict(solver.compression_model.state_dict()), dict(state["best_state"]["model"]))


def test_the_names_of_audiocrafts_checkpoint_module_work_on_our_folders(
    codec: str, tmp_path: Path
) -> None:
    argv = arguments("compression", codec, "checkpoint.save_every=1")
    solver, _ = run(*argv)
    with solver.xp.enter():
        resolve = audiocraft.resolve_checkpoint_path
        reference = f"//sig/{solver.xp.sig}"
        epoch = resolve(reference, name="2")
        assert epoch == resolve(solver.folder, "2") == solver.epoch_checkpoint_path(2)
        assert epoch == solver.folder / audiocraft.checkpoint_name("2")
        assert resolve(solver.checkpoint_path()) == solver.epoch_checkpoint_path(4)
        assert resolve(reference, name="9") is None
        assert resolve("//sig/00000000") is None
        assert resolve(tmp_path / "nowhere") is None
        with pytest.raises(CheckpointError, match="//sig/<sig>"):
            resolve("//sig/../../etc")
        state = audiocraft.load_checkpoint(epoch)
        assert len(state["history"]) == 2
        assert not audiocraft.is_sharded_checkpoint(epoch)
        assert audiocraft.is_sharded_checkpoint(Path("checkpoint.th.3"))
        audiocraft.check_sharded_checkpoint(epoch, epoch)
        assert audiocraft.CheckpointSource("other") is audiocraft.CheckpointSource.OTHER

        mine = solver.checkpoint_path_with_name("mine")
        audiocraft.save_checkpoint(solver.state_dict(), mine)
        again = audiocraft.load_checkpoint(mine)
        assert again["xp.cfg"] == OmegaConf.create(OmegaConf.to_container(solver.xp.cfg))
        assert again["xp.sig"] == solver.xp.sig
        assert_same(dict(again["model"]), dict(solver.model.state_dict()))

        for path in (solver.folder, solver.checkpoint_path().parent, solver.checkpoint_path()):
            audiocraft.flush_stale_checkpoints(path)
            assert {p.epoch for p in solver.checkpointer.positions()} == {1, 2, 3, 4}
        audiocraft.flush_stale_checkpoints(solver.folder, keep_last=1)
        assert {p.epoch for p in solver.checkpointer.positions()} == {4}
        assert mine.is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_solver_is_made_from_a_signature(codec: str, kind: str) -> None:
    solver, done = run(*arguments(kind, codec, "optim.epochs=2"))
    before = contents(solver.folder)
    generators = torch.get_rng_state()
    made = train.SOLVERS[kind].get_eval_solver_from_sig(
        solver.xp.sig,
        override_cfg={"evaluate": {"every": 3}},
        **({"autocast": False} if kind == "musicgen" else {"batch_size": 2, "device": "cpu"}),
    )
    assert type(made) is type(solver)
    assert not made.model.training
    assert made.ema is None
    assert made.cfg.evaluate.every == 3
    assert made.xp.sig == solver.xp.sig
    assert_same(done["best_state"]["model"], dict(made.model.state_dict()))
    assert not made.optimizer.state
    assert contents(solver.folder) == before
    del generators


def test_show_builds_and_saves_nothing(codec: str, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("compression", "musicgen"):
        with caplog.at_level(logging.INFO):
            solver, _ = run(*arguments(kind, codec, "show=true"))
        assert "Parameters" in caplog.text
        assert not (solver.folder / "checkpoints").exists()
    with pytest.raises(NotImplementedError):
        run(*arguments("diffusion", codec, "show=true"))
