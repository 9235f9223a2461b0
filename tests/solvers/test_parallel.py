"""Training on several processes: the same promises as on one."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import flashy
import pytest
import torch
from ends import assert_same_end
from killed import ExactSolver, build, train
from omegaconf import OmegaConf
from ranks import Rank, good, on_ranks
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset, TensorDataset
from toy import Regression, built, config, ran

from checkpoint import Checkpointer, load_checkpoint
from checkpoint.integration import Ranks, digests, is_sharded
from solvers import ConfigError
from solvers.distributed.process_group import same_as_first
from solvers.experiment.lookup import prepared
from solvers.metrics import Averager
from solvers.optim.builders import get_optimizer

Report = Callable[[Any], None]
REPLICATED: dict[str, Any] = {}
SHARDED = {"fsdp": {"use": True, "param_dtype": "float32"}}
STOPS = (16, 21, 48)
"""Updates in which a run is stopped: twice in an epoch of twelve, and in the last of another."""


def run(root: Path, sig: str, ranks: int = 2, **overrides: Any) -> list[Rank]:
    return on_ranks(ranks, train, root, sig, overrides)


def newest(root: Path, sig: str) -> Any:
    return Checkpointer(root / "xps" / sig).positions()[-1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(REPLICATED, marks=pytest.mark.slow),
        SHARDED,
        pytest.param({"workers": 2}, marks=pytest.mark.nightly),
        pytest.param(SHARDED | {"accumulate": 3}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_killed_in_the_middle_of_epochs_two_ranks_end_bit_identical(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    often = {"checkpoint": {"every_steps": 5}}
    good(run(tmp_path, "whole", **options))
    for step in STOPS:
        killed = {"step": step, "number": int(signal.SIGKILL), "rank": step % 2}
        ranks = run(tmp_path, "stopped", **options, **often, signal_at=killed)
        assert ranks[step % 2].status == -signal.SIGKILL
        assert ranks[1 - step % 2].status == 1
    good(run(tmp_path, "stopped", **options, **often))
    assert_same_end(tmp_path, "whole", "stopped")


@pytest.mark.nightly
def test_killed_at_random_moments_two_ranks_end_bit_identical(tmp_path: Path) -> None:
    options = SHARDED | {"workers": 2}
    # What every process imports is not to count.
    good(run(tmp_path, "first", **options, optim={"epochs": 1}))
    begun = time.monotonic()
    good(run(tmp_path, "whole", **options))
    seconds, chance = time.monotonic() - begun, random.Random(0)
    moments = [chance.uniform(0.2, 0.6) * seconds for _ in range(4)]
    ended = [
        on_ranks(2, train, tmp_path, "killed", options, kill_after=moment) for moment in moments
    ]
    assert ended.count([]) >= 2
    good(run(tmp_path, "killed", **options))
    assert_same_end(tmp_path, "whole", "killed")


@pytest.mark.parametrize(
    "options", [REPLICATED, pytest.param(SHARDED, marks=pytest.mark.slow)], ids=str
)
def test_when_one_rank_is_asked_to_stop_all_do_after_the_same_update(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    good(run(tmp_path, "whole", **options))
    for rank, step in enumerate(STOPS[:2]):
        asked = {"step": step, "number": int(signal.SIGUSR2), "rank": rank}
        ranks = run(tmp_path, "stopped", **options, signal_at=asked)
        assert [one.status for one in ranks] == [128 + signal.SIGUSR2] * 2
        assert newest(tmp_path, "stopped").step == step
    good(run(tmp_path, "stopped", **options))
    assert_same_end(tmp_path, "whole", "stopped")


KINDS: dict[str, dict[str, Any]] = {
    "single": {},
    "replicated": REPLICATED,
    "sharded": SHARDED,
    "full": {"fsdp": {**SHARDED["fsdp"], "sharding_strategy": "full_shard"}},
    "hybrid": {"fsdp": {**SHARDED["fsdp"], "sharding_strategy": "hybrid_shard"}},
}
# Not to the end of a pass, where three ranks would have batches of one sample.
SHORT = {"epochs": 2, "updates_per_epoch": 3}
COMPARED = ("model", "optimizer", "ema", "best_state", "history")


def restored(report: Report, root: str, sig: str, overrides: dict[str, Any]) -> None:
    """Restore, and report the digest of each source with its tensors put together."""
    xp, cfg = build(Path(root), sig, **overrides)
    with xp.enter():
        solver = ExactSolver(cfg)
        assert solver.restore()
        drawn = []
        for swap in (nullcontext, solver.swap_best_state, solver.swap_ema_state, nullcontext):
            with swap(), torch.no_grad():
                drawn.append(solver.model.eval()(torch.ones(1, 6)).item())
        assert drawn[0] == drawn[3]
        assert len(set(drawn)) > 1
        state = whole(solver._saver.state())
        report(digests({name: state[name] for name in COMPARED}))
        report([solver.epoch, solver._progress.step, *(round(one, 5) for one in drawn)])


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.full_tensor() if is_sharded(value) else value


@pytest.mark.parametrize(
    ("writers", "kind"),
    [
        (1, "single"),
        (2, "replicated"),
        (2, "sharded"),
        pytest.param(3, "full", marks=pytest.mark.nightly),
        pytest.param(4, "hybrid", marks=pytest.mark.slow),
    ],
)
def test_what_one_kind_of_run_saved_every_other_goes_on_from(
    tmp_path: Path, writers: int, kind: str
) -> None:
    good(run(tmp_path, "there", writers, **KINDS[kind], optim=SHORT))
    there = load_checkpoint(tmp_path / "xps/there/checkpoints/epoch_0002").state
    expected = digests({name: whole(there[name]) for name in COMPARED})
    drawn = []
    for readers, reader in [(1, "single"), (2, "sharded"), (3, "replicated"), (4, "hybrid")]:
        ranks = good(on_ranks(readers, restored, tmp_path, "there", KINDS[reader]))
        assert [one for one, _ in ranks] == [expected] * readers, (readers, reader)
        drawn += [numbers for _, numbers in ranks]
    # The same epoch and step, and the same model whichever weights are swapped in.
    assert drawn == [drawn[0]] * len(drawn)
    assert drawn[0][:2] == [3, 6]


class Plain(Regression):
    """Loaders that are mere lists, as long on each rank or empty."""

    batches = 3

    def build_dataloaders(self) -> None:
        batch = [torch.ones(2, 4), torch.ones(2, 1)]
        self.dataloaders = {"train": [batch] * 3, "valid": [batch] * self.batches}


def plain(report: Report, root: str, batches: int) -> None:
    try:
        ran(type("Plain", (Plain,), {"batches": batches}), Path(root), "plain", "optim.epochs=1")
    except ValueError as error:
        report(str(error))


def test_E11_loaders_of_several_ranks_may_be_mere_iterables(tmp_path: Path) -> None:
    assert good(on_ranks(2, plain, tmp_path, 3)) == [[], []]
    for (refusal,) in good(on_ranks(2, plain, tmp_path / "empty", 0)):
        assert refusal.startswith("the loader of 'valid' is empty")


class Synchronised(Regression):
    """In Audiocraft's style: flashy shares out the data and averages the gradients."""

    def wrap(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        flashy.distrib.broadcast_model(model)
        return model

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        data, size = self.dataloaders["train"].dataset, 8 // self.ranks.size
        self.dataloaders["train"] = flashy.distrib.loader(data, batch_size=size, shuffle=True)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            flashy.distrib.sync_model(self.model)
            self.optimizer.step()
        return {"loss": loss}


def synchronised(report: Report, root: str, until: int | None) -> None:
    done = ran(Synchronised, Path(root), "style", until=until)
    report(digests({"model": done.weights}))


def test_solvers_that_leave_it_to_flashy_train_on_several_ranks(tmp_path: Path) -> None:
    whole_run = good(on_ranks(2, synchronised, tmp_path / "whole", None))
    assert whole_run[0] == whole_run[1]
    good(on_ranks(2, synchronised, tmp_path / "halves", 2))
    assert good(on_ranks(2, synchronised, tmp_path / "halves", None)) == whole_run


class Odd(Regression):
    """Ranks that do not do the same."""

    fault = ""

    def wrap(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        return model if self.fault == "model" else super().wrap(model, **options)

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        if self.fault == "updates" and self.ranks.rank == 1:
            self.dataloaders["train"] = self.dataloaders["valid"]

    def make_model(self) -> torch.nn.Module:
        if self.fault == "model":
            torch.manual_seed(self.ranks.rank)
        return super().make_model()


def odd(report: Report, root: str, fault: str, settings: list[str]) -> None:
    kind = type("Odd", (Odd,), {"fault": fault})
    try:
        ran(kind, Path(root), "odd", *settings)
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
    finally:
        # Others may still wait for this one.
        torch.distributed.barrier()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("updates", "ValueError: the ranks have 2, 1 batches in an epoch"),
        ("model", "StateMismatch: ranks 1 have another 'best_state' than rank 0"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_told_what_differs(
    tmp_path: Path, fault: str, words: str
) -> None:
    for reports in good(on_ranks(2, odd, tmp_path, fault, [])):
        assert reports[0].startswith(words)


def prepare(report: Report, key: str, size: int) -> None:
    cfg = config(f"{key}={size}")
    try:
        mine = prepared(cfg)
    except ConfigError as error:
        report(str(error))
    else:
        report([OmegaConf.select(mine, key), OmegaConf.select(cfg, key)])


@pytest.mark.parametrize("key", ["dataset.batch_size", "dataset.valid.batch_size"])
def test_the_batch_of_all_ranks_is_divided_and_the_configuration_stays(key: str) -> None:
    assert good(on_ranks(2, prepare, key, 12)) == [[[6, 12]]] * 2
    (refusal,) = good(on_ranks(2, prepare, key, 7))[1]
    assert refusal.startswith(f"{key}=7 is the batch of all ranks together")


def metrics_of_ranks(report: Report) -> None:
    """Unequal numbers of batches, and keys in another order."""
    ranks, average = Ranks.here(), Averager()
    batches = [{"a": 1.0, "b": 10.0}, {"b": 20.0, "a": 2.0}, {"a": 6.0, "b": 60.0}]
    for batch in batches[:1] if ranks.rank == 0 else batches[1:]:
        average.update(batch)
    report(average.averages_over(ranks))


def test_S12_metrics_are_averaged_by_key_over_the_batches_of_all_ranks() -> None:
    assert good(on_ranks(2, metrics_of_ranks)) == [[{"a": 3.0, "b": 30.0}]] * 2


class Chain(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


class Chained(Regression):
    """Trains on what the test gives it."""

    def make_model(self) -> torch.nn.Module:
        torch.manual_seed(1)
        return Chain()

    def learn(self, inputs: list[torch.Tensor]) -> float:
        """Two updates of two batches each, whose gradients are added up; the last loss."""
        for idx, x in enumerate(inputs):
            with self.no_sync() if idx % 2 == 0 else nullcontext():
                loss = self.model(x).square().mean()
                loss.backward()
            if idx % 2:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return float(loss)


def learned(report: Report, root: str, ranks: int, settings: list[str]) -> None:
    """Report the weights after two updates on what `ranks` ranks would see, or on one's share."""
    mine = range(ranks) if Ranks.here().size == 1 else [Ranks.here().rank]
    inputs = [
        torch.cat([torch.full((2, 4), 1.0 + idx + rank) for rank in mine]) for idx in range(4)
    ]
    for recompute in ("false", "true"):
        again = f"optim.activation_checkpointing={recompute}"
        with built(Chained, Path(root), "c", again, *settings) as solver:
            solver.learn(inputs)
            weights = whole(solver._saver.state()["model"])
            report(torch.cat([w.flatten() for w in weights.values()]).tolist())


@pytest.mark.parametrize(
    ("count", "strategy"),
    [(2, "full_shard"), (2, "shard_grad_op"), (2, "no_shard"), (4, "hybrid_shard")],
)
def test_T4_every_way_of_spreading_a_model_learns_the_same(
    tmp_path: Path, count: int, strategy: str
) -> None:
    settings = ["fsdp.use=true", "fsdp.param_dtype=float32", f"fsdp.sharding_strategy={strategy}"]
    ranks = good(on_ranks(count, learned, tmp_path, count, settings))
    ((alone, recomputed),) = good(on_ranks(1, learned, tmp_path, count, settings))
    assert alone == recomputed
    for both in ranks:
        for weights in both:
            assert weights == pytest.approx(alone, abs=1e-6)


def test_parameters_compute_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    settings = ["fsdp.use=true", "fsdp.param_dtype=bfloat16"]
    (half, _), _ = good(on_ranks(2, learned, tmp_path, 2, settings))
    ((alone, _),) = good(on_ranks(1, learned, tmp_path, 2, []))
    assert half == pytest.approx(alone, abs=0.05)
    assert half != pytest.approx(alone, abs=1e-5)


class Recorded(Regression):
    """Writes down each sample that it trains on, in a file of each rank."""

    def build_dataloaders(self) -> None:
        data = TensorDataset(torch.randn(48, 4), torch.randn(48, 1), torch.arange(48))
        self.dataloaders = {
            # Of 11 in the validation some ranks have a batch less.
            "train": DataLoader(data, 12 // self.ranks.size, shuffle=True),
            "valid": DataLoader(Subset(data, range(11)), 2),
        }

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y, indices = batch
        metrics = super().run_step(idx, (x, y), metrics)
        stage = f"{self.current_stage}-{self.epoch}"
        with (self.folder / f"seen-{self.ranks.rank}.jsonl").open("a") as file:
            file.write(json.dumps([stage, indices.tolist()]) + "\n")
        if self.is_training and self._progress.step + 1 == self.cfg.get("stop_at"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return metrics


def record(report: Report, root: str, stop_at: int | None) -> None:
    ran(Recorded, Path(root), "seen", "optim.epochs=3", stop_at=stop_at)


@pytest.mark.parametrize(
    "counts",
    [(2, 4, 3), pytest.param((3, 1, 2), marks=pytest.mark.slow), (1, 2, 1)],
    ids=str,
)
def test_with_another_number_of_ranks_no_sample_is_seen_twice_or_left_out(
    tmp_path: Path, counts: tuple[int, ...]
) -> None:
    # In the middle of the first epoch, and twice in the second.
    for count, stop_at in zip(counts, (2, 5, None), strict=True):
        ranks = on_ranks(count, record, tmp_path, stop_at)
        assert {one.status for one in ranks} == {0 if stop_at is None else 128 + signal.SIGUSR1}
    seen: dict[str, list[int]] = {}
    for file in (tmp_path / "xps/seen").glob("seen-*.jsonl"):
        for line in file.read_text().splitlines():
            stage, indices = json.loads(line)
            seen.setdefault(stage, []).extend(indices)
    for epoch in (1, 2, 3):
        assert sorted(seen[f"train-{epoch}"]) == list(range(48))
        assert sorted(seen[f"valid-{epoch}"]) == list(range(11))


def continued(report: Report, root: str, where: str, overrides: dict[str, Any]) -> None:
    """Start another experiment from `where`; report the digest of its weights and best state."""
    xp, cfg = build(Path(root), "new", **overrides, continue_from=where)
    with xp.enter():
        solver = ExactSolver(cfg)
        assert solver.restore()
        state = whole(solver._saver.state())
        report(digests({"model": state["model"], "best": state["best_state"]["model"]}))


def test_another_experiment_continues_whatever_its_ranks_and_its_kind(tmp_path: Path) -> None:
    good(run(tmp_path, "there", **SHARDED, optim={"epochs": 2}))
    folder = tmp_path / "xps/there/checkpoints/epoch_0002"
    best = load_checkpoint(folder).state["best_state"]["model"]
    weights = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in best.items()}, weights)
    expected = digests({"model": best, "best": best})
    for where in (folder, weights):
        for readers, reader in [(1, "single"), (2, "sharded"), (2, "replicated")]:
            ranks = good(on_ranks(readers, continued, tmp_path, str(where), KINDS[reader]))
            assert ranks == [[expected]] * readers, (where, reader)


def same_buffers(report: Report) -> None:
    """Ranks have other values, in types that gloo does not know, and in other layouts."""
    rank = Ranks.here().rank
    tensors = [
        torch.full((3, 2), rank).to(dtype)
        for dtype in (torch.int16, torch.uint16, torch.float8_e4m3fn, torch.bool, torch.bfloat16)
    ]
    tensors += [torch.full((2, 3), float(rank)).t(), torch.tensor(rank), torch.empty(0)]
    same_as_first(tensors)
    report([bool((tensor.float() == 0).all()) for tensor in tensors])


def test_buffers_of_every_type_are_those_of_the_first_rank() -> None:
    assert good(on_ranks(2, same_buffers)) == [[[True] * 8]] * 2


class Special(Regression):
    """Does what has to be told of, or has to be the same whatever is done."""

    kind = ""

    def make_model(self) -> torch.nn.Module:
        model = super().make_model()
        if self.kind == "window":
            model.register_buffer("window", torch.ones(4))
        return model

    def wrap(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        return model if self.kind == "unwrapped" else super().wrap(model, **options)

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        if self.kind == "tiny":
            one = Subset(self.dataloaders["valid"].dataset, [3])
            self.dataloaders["valid"] = DataLoader(one, 4)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.kind == "eval":
            self.model.eval()
        if self.kind == "late" and self._progress.step == 5:
            # The others wait for this one when the signal comes.
            if self.ranks.rank == 0:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
                signal.setitimer(signal.ITIMER_REAL, 0.2)
            else:
                time.sleep(0.5)
        return super().run_step(idx, batch, metrics)

    def train(self) -> dict[str, Any]:
        if self.kind == "logs" and self.ranks.is_first:
            self.log_metrics("extra", {"more": 1})
        return super().train()


def special(report: Report, root: str, kind: str, settings: list[str]) -> None:
    try:
        done = ran(type("Special", (Special,), {"kind": kind}), Path(root), kind, *settings)
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
    else:
        report(done.solver.epoch)


def test_models_that_come_apart_are_not_saved(tmp_path: Path) -> None:
    for reports in good(on_ranks(2, special, tmp_path, "unwrapped", [])):
        assert reports[0].startswith("StateMismatch: ranks 1 have another 'model' than rank 0")
    assert Checkpointer(tmp_path / "xps/unwrapped").positions() == []


def test_a_model_that_trains_in_evaluation_mode_is_averaged_too(tmp_path: Path) -> None:
    assert good(on_ranks(2, special, tmp_path, "eval", [])) == [[4], [4]]


def test_a_signal_that_comes_while_ranks_wait_for_each_other_is_not_lost(tmp_path: Path) -> None:
    ranks = on_ranks(2, special, tmp_path, "late", [])
    assert [one.status for one in ranks] == [128 + signal.SIGUSR1] * 2, ranks[0].error


def test_a_rank_without_any_sample_of_a_stage_waits_for_the_others(tmp_path: Path) -> None:
    assert good(on_ranks(2, special, tmp_path, "tiny", [])) == [[4], [4]]


def test_what_one_rank_logs_alone_is_in_nobodys_way(tmp_path: Path) -> None:
    settings = ["checkpoint.every_steps=3"]
    assert good(on_ranks(2, special, tmp_path, "logs", settings)) == [[4], [4]]
    assert newest(tmp_path, "logs").epoch == 3


def test_a_buffer_may_be_called_window(tmp_path: Path) -> None:
    settings = ["fsdp.use=true", "fsdp.param_dtype=float32"]
    for epochs in (1, 2):
        more = [*settings, f"optim.epochs={epochs}"]
        assert good(on_ranks(2, special, tmp_path, "window", more)) == [[epochs + 1]] * 2


class Scaled(torch.nn.Module):
    """Multiplies by a buffer that each rank moves by what it sees, and that training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(x.mean().abs() * 0.1)
        return self.inner(x) * self.scale


class Moving(ExactSolver):
    """Trains `Scaled`, and averages a part of it under a name that is no source."""

    def build_model(self) -> None:
        self.model = self.wrap(Scaled())
        self.optimizer = get_optimizer(self.model, self.cfg.optim)
        self.lr_scheduler = None
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model.inner" if self.cfg.get("part") else "model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        loss = (self.model(batch) - batch.mean()).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self._progress.step + 1 == self.cfg.get("stop_at"):
                os.kill(os.getpid(), signal.SIGUSR1)
        return {"loss": loss}


def move(report: Report, root: str, sig: str, overrides: dict[str, Any]) -> None:
    torch.manual_seed(1)
    xp, cfg = build(Path(root), sig, **overrides, optim={"epochs": 2})
    with xp.enter():
        Moving(cfg).run()


@pytest.mark.parametrize("options", [SHARDED, {"part": True}], ids=str)
def test_buffers_that_training_reads_are_the_same_run_too(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    good(on_ranks(2, move, tmp_path, "whole", options))
    on_ranks(2, move, tmp_path, "stopped", options | {"stop_at": 5})
    assert newest(tmp_path, "stopped").step == 5
    good(on_ranks(2, move, tmp_path, "stopped", options))
    assert_same_end(tmp_path, "whole", "stopped")
