"""Every confirmed defect of Audiocraft's base class, under the id that it was noted by, is gone.

T5, T6 and E12 are in Audiocraft's own subclasses and modules. T4, S12, D2, D3, X1, X2, and what
E11 says of several ranks, are in the tests of several processes. The generators
of CUDA in S10 need such a device. S7, S8 and E17 are in test_config.
"""

import ast
import inspect
import json
import math
import pickle
import random
import re
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from toy import (
    Regression,
    Zoo,
    assert_same,
    built,
    config,
    contents,
    experiment,
    ran,
    scored,
    snapshot,
)

from checkpoint import (
    BadReference,
    CannotSave,
    Checkpointer,
    CheckpointExists,
    Position,
    StateMismatch,
)
from checkpoint.storage import LocalStorage
from solvers import StandardSolver, audiocraft
from solvers.experiment import lookup
from solvers.optim.builders import get_lr_scheduler
from solvers.weights.ema import ModuleDictEMA

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")
EMA = ("optim.ema.use=true", "optim.ema.updates=1")
ONE = "optim.epochs=1"


def weights() -> dict[str, torch.Tensor]:
    """Return weights that fit the model of `Regression`."""
    return dict(Regression.make_model(None).state_dict())  # type: ignore[arg-type]


def newest(root: Path, sig: str = "aaaa") -> dict[str, Any]:
    loaded = Checkpointer(root / "xps" / sig).load_newest()
    assert loaded is not None
    return loaded.state


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for package in ("solvers", "checkpoint"):
        for path in sorted((ROOT / package).rglob("*.py")):
            # What its users run as tests asserts, as tests do.
            if "testing" not in path.parts:
                yield path, ast.parse(path.read_text())


# Blocking.


def audiocraft_file(path: Path) -> dict[str, Any]:
    """Write what Audiocraft would; return it."""
    cfg = OmegaConf.create({"a": {"b": 1}, "c": "${a.b}"})
    assert cfg.c == 1, "looked up, so that the cache is filled"
    ema = {"state": defaultdict(dict, model=weights()), "count": 1.0}
    state = {"xp.cfg": cfg, "xp.sig": "ffff", "best_state": {"model": weights()}, "ema": ema}
    torch.save(state, path)
    return state


def test_T1_a_checkpoint_with_a_pickled_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.th"
    state = audiocraft_file(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, "cpu")
    with built(Regression, tmp_path, "aaaa", f"continue_from={path}") as solver:
        assert solver.restore()
        assert_same(state["best_state"]["model"], dict(solver.model.state_dict()))


def test_T2_default_dicts_are_read_without_an_allow_list(tmp_path: Path) -> None:
    state = audiocraft_file(tmp_path / "checkpoint.th")
    allowed = torch.serialization.get_safe_globals()
    found = audiocraft.load_checkpoint(tmp_path / "checkpoint.th")
    assert isinstance(found["xp.cfg"], DictConfig)
    assert found["xp.cfg"] == state["xp.cfg"]
    assert_same(state["ema"], found["ema"])
    assert torch.serialization.get_safe_globals() == allowed


def test_T3_a_model_of_bfloat16_is_built_saved_and_restored(tmp_path: Path) -> None:
    class Narrow(Regression):
        def make_model(self) -> nn.Module:
            return super().make_model().bfloat16()

        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            return super().run_step(idx, [part.bfloat16() for part in batch], metrics)

    run = ran(Narrow, tmp_path, "aaaa", *EMA, until=1)
    with built(Narrow, tmp_path, "aaaa", *EMA) as solver:
        assert solver.restore()
        assert_same(run.state, snapshot(solver))
        assert solver.model[0].weight.dtype == torch.bfloat16


# Wrong results, silently.


def test_S1_a_nan_in_the_first_epoch_does_not_freeze_the_best_state(tmp_path: Path) -> None:
    kind = scored({"score": NAN}, {"score": 1.0}, {"score": 2.0})
    assert ran(kind, tmp_path).solver.best == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"4.bias": None}, "missing: 4.bias"),
        ({"0.weight": torch.ones(1, 4)}, r"reshaped: 0.weight (1, 4) into (8, 4)"),
        ({"alien": torch.ones(1)}, "unexpected: alien"),
    ],
    ids=["missing", "broadcastable", "unknown"],
)
def test_S2_a_best_state_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    wrong = {key: value for key, value in (weights() | change).items() if value is not None}
    torch.save({"best_state": {"model": wrong}}, tmp_path / "wrong.th")
    with built(Regression, tmp_path, "aaaa", f"continue_from={tmp_path / 'wrong.th'}") as solver:
        before = snapshot(solver)
        with pytest.raises(StateMismatch, match=re.escape(named)):
            solver.restore()
        assert_same(before, snapshot(solver))


@pytest.fixture
def experiments_by_sig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, DictConfig]:
    """Give the package of `Regression` a train module, which finds experiments in this dict."""
    known: dict[str, DictConfig] = {}
    main = SimpleNamespace(get_xp_from_sig=lambda sig: experiment(tmp_path, sig, known[sig]))
    monkeypatch.setitem(sys.modules, "toy.train", SimpleNamespace(main=main))
    return known


@pytest.mark.parametrize("autocast", ["true", "false"])
def test_S3_evaluation_computes_as_the_experiment_did_with_the_very_weights(
    tmp_path: Path, experiments_by_sig: dict[str, DictConfig], autocast: str
) -> None:
    settings = ONE, f"autocast={autocast}"
    best = ran(Regression, tmp_path, "aaaa", *settings).state["best_state"]["model"]
    experiments_by_sig["aaaa"] = config(*settings)
    solver: Any = Regression.get_eval_solver_from_sig("aaaa")
    assert isinstance(solver.autocast, torch.autocast) == (autocast == "true")
    assert_same(best, dict(solver.model.state_dict()))


@pytest.mark.parametrize("way", ["continue_from", "load_best", "run_one_stage"])
def test_S3_under_autocast_weights_are_never_rounded(tmp_path: Path, way: str) -> None:
    best = ran(Regression, tmp_path, "aaaa", ONE, "autocast=true").state["best_state"]["model"]
    assert not torch.equal(best["0.weight"], best["0.weight"].bfloat16().float())
    sig, reference = ("bbbb", "//sig/aaaa") if way == "continue_from" else ("aaaa", "null")
    settings = "autocast=true", ONE, f"continue_from={reference}"
    with built(Regression, tmp_path, sig, *settings) as solver:
        assert solver.restore(load_best=way == "load_best")
        if way == "run_one_stage":
            solver.run_one_stage("valid")
        assert_same(best, dict(solver.model.state_dict()))


def test_S4_keep_last_deletes_what_is_older(tmp_path: Path) -> None:
    settings = "save_last=false", "save_every=1", "keep_last=2"
    ran(Regression, tmp_path, "aaaa", "optim.epochs=5", *(f"checkpoint.{s}" for s in settings))
    kept = sorted(path.name for path in (tmp_path / "xps/aaaa/checkpoints").glob("epoch_*"))
    assert kept == ["epoch_0004", "epoch_0005"]


class KeepsAll(Regression):
    """Keeps the best state of its optimizer and its average too."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.register_best_state("optimizer", "ema")


def test_S5_a_best_state_holds_values_of_every_kind(tmp_path: Path) -> None:
    solver = ran(KeepsAll, tmp_path, "aaaa", ONE, *EMA).solver
    best = solver.best_state.state_dict()
    assert_same(solver.optimizer.state_dict(), best["optimizer"])
    assert best["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert best["ema"]["count"] == solver.ema.count > 1
    solver.ema.count = 7.0
    before = snapshot(solver)
    with solver.swap_best_state():
        assert solver.ema.count == best["ema"]["count"]
    assert_same(before, snapshot(solver))


def test_S6_an_average_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with built(Regression, tmp_path, "aaaa", *EMA) as solver:
        state = snapshot(solver)
        del state["ema"]["state"]["model"]["0.bias"]
        with pytest.raises(StateMismatch, match=r"'ema'.*missing: 0\.bias"):
            solver.load_state_dict(state)


def test_S9_a_resumed_run_ends_like_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = ran(Regression, tmp_path, "aaaa", *EMA)
    ran(Regression, tmp_path, "bbbb", *EMA, until=1)
    assert_same(whole.state, ran(Regression, tmp_path, "bbbb", *EMA, seed=5).state)


def test_S10_generating_moves_no_generator_and_draws_the_same_every_time(tmp_path: Path) -> None:
    drawn = []

    class Generates(Regression):
        def generate(self) -> dict[str, Any]:
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return {}

    quiet = ran(Regression, tmp_path, "aaaa")
    noisy = ran(Generates, tmp_path, "bbbb", "generate.every=1")
    assert len(drawn) == 3
    assert len(set(drawn)) == 1
    assert_same(quiet.state["random_state"], noisy.state["random_state"])
    assert_same(quiet.weights, noisy.weights)


class Pair(Regression):
    """Has a second module with state of its own."""

    def build_model(self) -> None:
        super().build_model()
        self.second = nn.Linear(2, 2)
        self.register_stateful("second")
        self.register_best_state("second")
        self.register_ema("second")


def test_S11_a_source_that_the_checkpoint_lacks_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Later(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.second = nn.Linear(2, 2)
            self.register_stateful("second")

    ran(Regression, tmp_path, until=1)
    with built(Later, tmp_path) as solver, caplog.at_level("INFO"):
        assert solver.restore()
    assert re.search("second +re-initialised +the checkpoint does not hold it", caplog.text)


def test_S11_a_source_that_nobody_registered_is_refused_by_name(tmp_path: Path) -> None:
    class PreviousCheckpoint(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.second = nn.Linear(2, 2)
            self.register_stateful("second")

    ran(PreviousCheckpoint, tmp_path, until=1)
    with built(Regression, tmp_path) as solver:
        with pytest.raises(StateMismatch, match=r"holds 'second'.*ignore_state_keys=\['second'\]"):
            solver.restore()
        assert solver.restore(ignore_state_keys=["second"])
        assert solver.epoch == 2


def test_S13_more_may_be_better(tmp_path: Path) -> None:
    scores = {"score": 1.0}, {"score": 3.0}, {"score": 2.0}
    assert ran(scored(*scores, best_metric_mode="max"), tmp_path).solver.best == 2


def test_S14_ignored_sources_are_ignored_without_load_best_too(tmp_path: Path) -> None:
    run = ran(Regression, tmp_path, until=1)
    with built(Regression, tmp_path) as solver:
        assert solver.restore(ignore_state_keys=["optimizer"])
        assert not solver.optimizer.state
        assert_same(run.weights, dict(solver.model.state_dict()))


@pytest.mark.parametrize("override", [None, {"optim": {"epochs": 2}}], ids=["none", "some"])
def test_S15_a_solver_that_writes_into_its_configuration_leaves_the_experiments_alone(
    tmp_path: Path, override: dict[str, Any] | None
) -> None:
    class Divides(Regression):
        def build_dataloaders(self) -> None:
            self.cfg.dataset.batch_size //= 2
            super().build_dataloaders()

    xp = experiment(tmp_path, "aaaa", config("device=auto", dataset={"batch_size": 8}))
    before = OmegaConf.to_yaml(xp.cfg)
    solver = lookup.build(Divides, xp, override_cfg=override, restore=False)
    assert solver.cfg.dataset.batch_size == 4
    mine = lookup.prepared(xp.cfg)
    mine.dataset.batch_size = 1
    assert OmegaConf.to_yaml(xp.cfg) == before


def test_S16_what_the_caller_overrides_goes_first(
    tmp_path: Path, experiments_by_sig: dict[str, DictConfig]
) -> None:
    ran(Regression, tmp_path, "aaaa", ONE, *EMA)
    experiments_by_sig["aaaa"] = config(ONE, *EMA, dataset={"batch_size": 8})
    theirs = {"optim": {"ema": {"use": True}}, "dataset": {"batch_size": 2}}
    solver = Regression.get_eval_solver_from_sig("aaaa", batch_size=4, override_cfg=theirs)
    assert solver.ema is not None
    assert solver.cfg.dataset.batch_size == 2
    solver = Regression.get_eval_solver_from_sig("aaaa", batch_size=4)
    assert solver.ema is None
    assert solver.cfg.dataset.batch_size == 4


# Durability.


def test_D1_a_truncated_save_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    whole = ran(Regression, tmp_path, "aaaa")
    ran(Regression, tmp_path, "bbbb", until=2)
    file = tmp_path / "xps/bbbb/checkpoints/epoch_0002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    good = contents(file.parent.parent / "epoch_0001")
    with built(Regression, tmp_path, "bbbb") as solver:
        assert solver.restore()
        assert solver.epoch == 2
    assert contents(file.parent.parent / "epoch_0001") == good
    assert_same(whole.state, ran(Regression, tmp_path, "bbbb", seed=5).state)


def test_D1_what_audiocraft_left_of_a_save_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "audiocraft"
    folder.mkdir()
    state = audiocraft_file(folder / "checkpoint.th")
    whole = (folder / "checkpoint.th").read_bytes()
    (folder / "checkpoint.th.tmp").write_bytes(whole[: len(whole) // 2])
    (folder / "checkpoint.th.tmp.done").touch()
    before = contents(folder)
    with built(Regression, tmp_path, "aaaa", f"continue_from={folder}") as solver:
        assert solver.restore()
        assert_same(state["best_state"]["model"], dict(solver.model.state_dict()))
    assert contents(folder) == before


def test_D4_the_first_save_counts_from_its_commit_on(tmp_path: Path) -> None:
    class Killed(Regression):
        def save_checkpoints(self) -> None:
            super().save_checkpoints()
            raise KeyboardInterrupt

    whole = ran(Regression, tmp_path, "whole")
    for sig in ("before", "after"):
        with pytest.raises(KeyboardInterrupt):
            ran(Killed, tmp_path, sig)
    (tmp_path / "xps/before/checkpoints/epoch_0001/manifest.json").unlink()
    with built(Regression, tmp_path, "after") as solver:
        assert solver.restore()
        assert solver.epoch == 2
    assert_same(whole.state, ran(Regression, tmp_path, "after", seed=5).state)
    assert_same(whole.state, ran(Regression, tmp_path, "before").state)


def test_D5_the_experiment_that_is_continued_from_gets_a_mark_and_nothing_else(
    tmp_path: Path,
) -> None:
    ran(Regression, tmp_path, "aaaa", until=2)
    folder = tmp_path / "xps/aaaa"
    damaged = folder / "checkpoints/epoch_0002/best_state.safetensors"
    damaged.write_bytes(b"")
    (folder / "checkpoint.th.tmp").write_bytes(b"PK")
    (folder / "checkpoint.th.tmp.done").touch()
    before = contents(folder)
    ran(Regression, tmp_path, "bbbb", "continue_from=//sig/aaaa", ONE)
    mark = str(tmp_path / "xps/bbbb").encode()
    assert contents(folder) == before | {"checkpoints/epoch_0001/continued-by-bbbb": mark}


class OnWrite(LocalStorage):
    """Does something in the middle of each save, before the second of its files."""

    def __init__(self, root: Path, then: Callable[[], Any]) -> None:
        super().__init__(root)
        self.then = then

    def write(self, name: str, parts: Any) -> None:
        if name.endswith("b.safetensors"):
            self.then()
        super().write(name, parts)


def two_sources(value: float) -> dict[str, Any]:
    return {name: {"weight": torch.full((4,), value)} for name in "ab"}


def test_D6_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def disk_is_full() -> None:
        raise CannotSave("no space left on device")

    Checkpointer(tmp_path).save(two_sources(1), epoch=1)
    before = contents(tmp_path)
    checkpointer = Checkpointer(OnWrite(tmp_path / "checkpoints", disk_is_full))
    checkpointer.lock()
    with pytest.raises(CannotSave):
        checkpointer.save(two_sources(2), epoch=2)
    checkpointer.close()
    assert contents(tmp_path) == before
    assert [path.name for path in (tmp_path / "checkpoints").glob("e*")] == ["epoch_0001"]


def test_D6_a_second_process_cannot_replace_what_the_first_one_saved(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(two_sources(1), epoch=1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointExists):
        Checkpointer(tmp_path).save(two_sources(2), epoch=1)
    assert contents(tmp_path) == before


def test_D6_what_one_of_two_was_told_is_saved_stays_saved(tmp_path: Path) -> None:
    second, told = Checkpointer(tmp_path), []

    def save(checkpointer: Checkpointer, value: float) -> None:
        try:
            checkpointer.save(two_sources(value), epoch=1)
        except (CannotSave, CheckpointExists):
            return
        told.append(value)

    first = Checkpointer(OnWrite(tmp_path / "checkpoints", lambda: save(second, 2)))
    save(first, 1)
    assert len(told) == 1
    assert_same(two_sources(told[0]), Checkpointer(tmp_path).load(Position(1)).state)


class Evaluates(Regression):
    """Returns metrics of the types that numerical code works with."""

    def evaluate(self) -> dict[str, Any]:
        return {
            "tensor": torch.tensor(0.5),
            "narrow": np.float32(0.25),
            "array": np.arange(3),
            "count": np.int64(3),
        }


def test_D7_metrics_of_numpy_do_not_end_the_run_after_its_save(tmp_path: Path) -> None:
    ran(Evaluates, tmp_path, "aaaa", ONE)
    history = json.loads((tmp_path / "xps/aaaa/history.json").read_text())
    assert history == newest(tmp_path)["history"]
    assert history[0]["evaluate"]["narrow"] == 0.25


def test_D7_a_metric_that_cannot_be_kept_is_refused_before_anything_is_saved(
    tmp_path: Path,
) -> None:
    class Odd(scored({"score": 1.0})):  # type: ignore[misc]
        def valid(self) -> dict[str, Any]:
            return {"score": 1.0, "more": object()}

    with pytest.raises(TypeError, match="metric valid.more is of type object"):
        ran(Odd, tmp_path)
    assert not (tmp_path / "xps/aaaa/history.json").exists()
    assert not list((tmp_path / "xps/aaaa/checkpoints").glob("epoch_*"))


def test_D7_a_history_file_that_lags_behind_is_mended(tmp_path: Path) -> None:
    ran(Regression, tmp_path, until=1)
    file = tmp_path / "xps/aaaa/history.json"
    lags = file.read_text()
    ran(Regression, tmp_path, until=2)
    file.write_text(lags)
    ran(Regression, tmp_path, until=2)
    assert json.loads(file.read_text()) == newest(tmp_path)["history"]
    assert len(newest(tmp_path)["history"]) == 2


def test_D8_the_history_in_a_checkpoint_holds_plain_numbers(tmp_path: Path) -> None:
    ran(Evaluates, tmp_path, "aaaa", ONE)
    found = newest(tmp_path)["history"][0]["evaluate"]
    found.pop("duration")
    assert_same({"tensor": 0.5, "narrow": 0.25, "array": [0, 1, 2], "count": 3}, found)


def test_D9_without_save_last_the_newest_periodic_checkpoint_is_resumed_from(
    tmp_path: Path,
) -> None:
    names = "save_last=false", "save_every=2", "keep_every_states=[model,optimizer,best_state]"
    settings = [f"checkpoint.{name}" for name in names]
    run = ran(Regression, tmp_path, "aaaa", *settings, until=2)
    ran(Regression, tmp_path, "aaaa", *settings, until=3)
    with built(Regression, tmp_path, "aaaa", *settings) as solver:
        assert solver.restore()
        assert solver.epoch == 3
        assert_same(run.weights, dict(solver.model.state_dict()))


# Crashes and unhelpful errors.


def test_E1_autocast_works_in_a_solver_that_sets_no_type(tmp_path: Path) -> None:
    seen = set()

    class Looks(Regression):
        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            with self.autocast:
                seen.add(self.model[0](batch[0]).dtype)
            return super().run_step(idx, batch, metrics)

    ran(Looks, tmp_path, "aaaa", "autocast=true", ONE)
    assert seen == {torch.bfloat16}


class Animals(Regression):
    """Trains a model with integer buffers, flags and tied weights."""

    def make_model(self) -> nn.Module:
        return Zoo()

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        words = torch.arange(6)
        loss = nn.functional.cross_entropy(self.model(words), words)
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.model.steps += 1
        return {"loss": loss}


def test_E2_an_average_beside_integer_buffers_and_tied_weights_is_validated(
    tmp_path: Path,
) -> None:
    run = ran(Animals, tmp_path, "aaaa", ONE, *EMA)
    assert run.weights["steps"].tolist() == [4, 4, 4]
    best = run.state["best_state"]["model"]
    assert_same(best["embed.weight"], run.state["ema"]["state"]["model"]["embed.weight"])
    assert_same(best["steps"], run.weights["steps"])
    assert run.solver.model.head.weight is run.solver.model.embed.weight


def test_E3_a_decay_of_null_means_no_average(tmp_path: Path) -> None:
    assert ran(Regression, tmp_path, "aaaa", *EMA, ONE, "optim.ema.decay=null").solver.ema is None


def test_E4_without_a_number_of_updates_the_average_steps_once_an_epoch(tmp_path: Path) -> None:
    settings = "optim.ema.use=true", "optim.ema.updates=${optim.updates_per_epoch}"
    run = ran(Regression, tmp_path, "aaaa", *settings, "optim.ema.decay=0.5")
    assert run.solver.ema.count == 1 + 0.5 * (1 + 0.5), "three steps in three epochs"


def test_E5_the_cost_of_an_average_does_not_grow_with_the_depth() -> None:
    """Audiocraft makes 2 ** depth calls; ours is to look at each module once, at the start."""

    def calls(depth: int) -> int:
        module: nn.Module = nn.BatchNorm1d(2)
        for _ in range(depth):
            module = nn.Sequential(module)
        ema, count = ModuleDictEMA({"model": module}, 0.9), 0

        def profile(*_: Any) -> None:
            nonlocal count
            count += 1

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            ema.step()
        finally:
            sys.setprofile(before)
        return count

    assert calls(60) == calls(2) > 10


@pytest.mark.parametrize("swap", ["swap_best_state", "swap_ema_state"])
def test_E6_a_second_source_that_does_not_fit_leaves_the_first_as_it_was(
    tmp_path: Path, swap: str
) -> None:
    with built(Pair, tmp_path, "aaaa", *EMA) as solver:
        for states in (solver.best_state.states, solver.ema.state):
            assert list(states) == ["model", "second"]
            states["model"]["0.weight"].fill_(7)
            states["second"] = {"weight": torch.ones(1, 2)}
        before = weights_of(solver)
        with pytest.raises(StateMismatch, match="'second'"), getattr(solver, swap)():
            pytest.fail("the block was run")
        assert_same(before, weights_of(solver))


def weights_of(solver: Any) -> dict[str, Any]:
    return {key: value.clone() for key, value in solver.model.state_dict().items()}


def test_E7_past_epochs_without_the_stage_or_the_metric_do_not_matter(tmp_path: Path) -> None:
    class Cached(scored({"other": 0.0}, None, {"score": 2.0}, {"score": 3.0})):  # type: ignore[misc]
        def run_epoch(self) -> None:
            if self.epoch != 2:
                super().run_epoch()

    assert ran(Cached, tmp_path, "aaaa", "optim.epochs=4").solver.best == 3


def test_E8_best_states_may_overlap(tmp_path: Path) -> None:
    class Overlaps(KeepsAll):
        def build_model(self) -> None:
            super().build_model()
            self.first = self.model[0]
            self.register_stateful("first")
            self.register_best_state("first")

    solver = ran(Overlaps, tmp_path, "aaaa", ONE, *EMA).solver
    best = solver.best_state.state_dict()
    with torch.no_grad():
        solver.model[0].weight.zero_()
    before = snapshot(solver)
    with solver.swap_best_state():
        assert_same(best["first"]["weight"], solver.model[0].weight.detach())
    assert_same(before, snapshot(solver))


def test_E9_a_best_state_of_what_is_not_registered_is_refused_with_the_missing_line(
    tmp_path: Path,
) -> None:
    with built(Regression, tmp_path) as solver:
        with pytest.raises(ValueError, match=r"call self\.register_stateful\('rate'\) before"):
            solver.register_best_state("rate")
        with pytest.raises(ValueError, match="'model' is registered as best state already"):
            solver.register_best_state("model")


class Unregistered(Regression):
    def build_model(self) -> None:
        self.model = self.make_model()


class Empty(Regression):
    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        self.dataloaders["valid"] = []


class Missing(Regression):
    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        del self.dataloaders["valid"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unregistered, "add self.register_stateful('model') at the end of build_model"),
        (Empty, "the loader of 'valid' is empty"),
        (Missing, "set self.dataloaders['valid'] in build_dataloaders"),
    ],
)
def test_E10_a_users_mistake_is_an_error_that_says_what_to_do(
    tmp_path: Path, kind: type[StandardSolver], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ran(kind, tmp_path, "aaaa", ONE)


def test_E10_a_metric_that_is_missing_is_a_warning_and_untrained_weights_are_not_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ran(scored({"scroe": 1.0}), tmp_path, "aaaa", ONE).solver.best == 1
    assert "no metric 'score' to say what is best, only scroe" in caplog.text


def test_E10_a_file_without_best_state_is_an_error_that_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"history": [], "xp.sig": "ffff"}, tmp_path / "other.th")
    with built(Regression, tmp_path, "aaaa", f"continue_from={tmp_path / 'other.th'}") as solver:
        with pytest.raises(StateMismatch, match=r"other\.th has no best state.*holds history"):
            solver.restore()


def test_E10_no_check_is_gone_under_python_O() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_E11_a_loader_need_only_be_an_iterable_with_a_length(tmp_path: Path) -> None:
    class Plain:
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(4, 4), torch.ones(4, 1))] * 3)

        def __len__(self) -> int:
            return 3

    class Iterates(Regression):
        def build_dataloaders(self) -> None:
            self.dataloaders = {"train": Plain(), "valid": Plain()}

    run = ran(Iterates, tmp_path, "aaaa", "optim.epochs=2", until=1)
    assert run.state["progress"]["step"] == 3
    assert len(ran(Iterates, tmp_path, "aaaa", "optim.epochs=2").history) == 2


def test_E13_the_profiler_needs_torch_alone(tmp_path: Path) -> None:
    settings = "profiler.enabled=true", "optim.updates_per_epoch=8"
    ran(Regression, tmp_path, "aaaa", ONE, *settings)
    assert (tmp_path / "xps/aaaa/profiler/trace_0.json").is_file()
    assert "xformers" not in sys.modules


def test_E14_the_watch_for_deadlocks_keeps_no_process_alive_and_no_stage(tmp_path: Path) -> None:
    watching = []

    class Looks(Regression):
        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            watching.extend(t for t in threading.enumerate() if t.name == "deadlock")
            self.deadlock_detect.update("loss")
            return super().run_step(idx, batch, metrics)

    settings = "deadlock.use=true", "deadlock.timeout=1000"
    solver = ran(Looks, tmp_path, "aaaa", ONE, *settings).solver
    assert len(set(watching)) == 2, "one for training, one for validation"
    assert all(thread.daemon for thread in watching)
    assert not any(thread.is_alive() for thread in watching)
    before = len(pickle.dumps(stages(solver)))
    for _ in range(100):
        solver.deadlock_detect.update("outside")
    assert len(pickle.dumps(stages(solver))) <= before


def stages(solver: Any) -> list[Any]:
    """Return all that the watch remembers."""
    kept = vars(solver.deadlock_detect).values()
    return [value for value in kept if not isinstance(value, threading.Event)]


def test_E15_no_default_is_mutable() -> None:
    found = [
        f"{path}:{default.lineno}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for default in (*node.defaults, *node.kw_defaults)
        if isinstance(default, ast.List | ast.Dict | ast.Set | ast.ListComp)
    ]
    assert not found
    for method in (StandardSolver.restore, StandardSolver.load_checkpoints, lookup.build):
        assert inspect.signature(method).parameters["ignore_state_keys"].default == ()


@pytest.mark.parametrize("reference", ["//sig/", "//sig/../aaaa", "//sig/.", "//sig/aaaa/../bbbb"])
def test_E16_a_signature_leads_to_one_experiment_only(tmp_path: Path, reference: str) -> None:
    ran(Regression, tmp_path, "aaaa", ONE)
    shutil.copytree(tmp_path / "xps/aaaa/checkpoints", tmp_path / "xps/checkpoints")
    shutil.copytree(tmp_path / "xps/aaaa", tmp_path / "aaaa")
    with built(Regression, tmp_path, "cccc", f"continue_from={reference}") as solver:
        with pytest.raises(BadReference, match="write //sig/<sig>"):
            solver.restore()


def test_E16_to_find_a_signature_no_entry_point_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("solvers.train", "toy.train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    ran(Regression, tmp_path, "aaaa", ONE)
    with built(Regression, tmp_path, "bbbb", "continue_from=//sig/aaaa") as solver:
        assert solver.restore()
    assert not {"solvers.train", "toy.train"} & sys.modules.keys()


@pytest.mark.parametrize("warmup", [None, 4, 8], ids=str)
def test_E18_a_cosine_takes_a_warmup_of_any_length(warmup: int | None) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    section = {"lr_scheduler": "cosine", "cosine": {"warmup": warmup, "lr_min_ratio": 0.0}}
    schedule = get_lr_scheduler(optimizer, section, 8)
    assert schedule is not None
    rates = []
    for _ in range(9):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert all(math.isfinite(rate) for rate in rates)
    assert max(rates) == 1 == rates[warmup or 0]


def test_E19_the_documents_name_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    template = "".join(p.read_text() for p in (ROOT / "solvers/template").rglob("*") if p.is_file())
    assigned = set(re.findall(r"self\.(\w+) = ", readme + template))
    used = set(re.findall(r"self\.(\w+)\(", readme + template))
    table = re.findall(r"`(\w+)`", (StandardSolver.__doc__ or "").split("===\n\n")[0])
    assert {"register_stateful", "register_best_state"} <= used
    assert {"best_metric_name", "run_epoch"} <= set(table)
    unknown = [name for name in {*used, *table} - assigned if not hasattr(StandardSolver, name)]
    assert not unknown


def test_E20_the_dict_of_best_states_is_the_callers_own(tmp_path: Path) -> None:
    with built(Regression, tmp_path) as solver:
        solver.best_state.state_dict()["model"].clear()
        solver.best_state.state_dict().clear()
        assert solver.best_state.state_dict()["model"].keys() == solver.model.state_dict().keys()


def test_E21_a_metric_named_duration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'valid' returns a metric 'duration'.*rename"):
        ran(scored({"score": 1.0, "duration": 3.0}), tmp_path, "aaaa", ONE)


def test_E21_a_stage_may_run_twice_in_an_epoch(tmp_path: Path) -> None:
    class Twice(scored({"score": 1.0})):  # type: ignore[misc]
        def run_epoch(self) -> None:
            super().run_epoch()
            self.run_stage("valid", lambda: {"score": 5.0})

    (epoch,) = ran(Twice, tmp_path, "aaaa", ONE).history
    assert epoch == {"train": {}, "valid": {"score": 5.0}}


# Dora and flashy.


def test_X5_metrics_are_averaged_in_double_precision(tmp_path: Path) -> None:
    (epoch,) = ran(scored({"score": 2**25 + 0.5}), tmp_path, "aaaa", ONE).history
    assert epoch["valid"]["score"] == 2**25 + 0.5


@pytest.mark.parametrize("forget", [False, True], ids=["switched on", "ignored"])
def test_X6_an_average_that_is_switched_on_later_starts_from_the_trained_weights(
    tmp_path: Path, forget: bool
) -> None:
    run = ran(Regression, tmp_path, "aaaa", *(EMA if forget else ()), until=1)
    with built(Regression, tmp_path, "aaaa", *EMA) as solver:
        assert solver.restore(ignore_state_keys=["ema"] if forget else ())
        assert solver.ema.count == 0
        for key, average in solver.ema.state["model"].items():
            assert torch.equal(average, run.weights[key]), key


def test_X6_an_average_that_is_switched_off_later_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Regression, tmp_path, "aaaa", *EMA, until=1)
    with built(Regression, tmp_path) as solver, caplog.at_level("INFO"):
        assert solver.restore()
    assert re.search(r"ema +dropped +optim\.ema\.use is false now", caplog.text)
