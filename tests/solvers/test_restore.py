"""Restoring reads what is asked for, straight into what is live, and leaves nothing half done."""

import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from faults import fingerprint
from torch import nn
from toy import Regression, built, ran

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    MissingCheckpoint,
    Position,
    UnreadableCheckpoint,
    UnsupportedFormat,
    load_checkpoint,
)
from checkpoint.storage import LocalStorage
from checkpoint.testing import FaultyStorage, failing, in_child

MEBI = 2**20


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


@pytest.fixture
def large(work: Path) -> Iterator[Path]:
    """Give the checkpoint of a file that two threads read."""
    if not (work / "original").exists():
        Checkpointer(work / "original").save({"model": large_state()}, epoch=1)
    shutil.copytree(work / "original", work / "run")
    yield work / "run/checkpoints/epoch_0001"
    shutil.rmtree(work / "run")


def large_state() -> dict[str, Any]:
    state = {f"layer{i}.weight": noise(MEBI, seed=i) for i in range(9)}
    return state | {"tied": state["layer3.weight"], "bias": noise(5), "none": torch.zeros(0)}


# --- two threads


def test_a_flipped_bit_anywhere_in_a_file_that_two_threads_read_is_found(large: Path) -> None:
    file = large / "model.safetensors"
    assert load_checkpoint(large).manifest.files[file.name].header
    size = file.stat().st_size
    draw = random.Random(0)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    # What nothing but the digest of the header tells: an alias, in the metadata.
    offsets = [
        file.read_bytes().index(b'"tied"') + 1,
        0,
        3,
        7,
        8,
        *range(9, 1000, 150),
        header - 1,
        header,
        size - 1,
    ]
    for offset in [*offsets, *(draw.randrange(size) for _ in range(6))]:
        bit = draw.randrange(8) if offset != offsets[0] else 0
        flip(file, offset, bit)
        with pytest.raises(CorruptCheckpoint, match=re.escape(f"{file} is damaged")):
            load_checkpoint(large)
        if offset < header:
            with pytest.raises(CorruptCheckpoint, match=re.escape(f"{file} is damaged")):
                load_checkpoint(large, lazy=True)
        flip(file, offset, bit)
    assert fingerprint(load_checkpoint(large).state["model"]) == fingerprint(large_state())
    # One without a number was never started, by a test before this one.
    running = [thread.name for thread in threading.enumerate() if thread.ident is not None]
    assert "checkpoint-pair" not in running


def flip(file: Path, offset: int, bit: int) -> None:
    with file.open("r+b", buffering=0) as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))


def test_a_read_that_fails_in_either_thread_is_raised(large: Path) -> None:
    storage = LocalStorage(large.parent)
    counting = FaultyStorage(storage, only=["read"])
    Checkpointer(counting).load(Position(1))
    for number in range(2, len(counting.operations), 12):
        faulty = FaultyStorage(storage, failing(number), only=["read"])
        with pytest.raises(UnreadableCheckpoint, match=re.escape(str(large))):
            Checkpointer(faulty).load(Position(1))


def test_many_small_tensors_cost_few_calls_of_the_system(tmp_path: Path) -> None:
    state = {f"{i}": torch.full((1,), float(i)) for i in range(5000)}
    Checkpointer(tmp_path).save({"model": state}, epoch=1)
    counting = FaultyStorage(LocalStorage(tmp_path / "checkpoints"), only=["read"])
    loaded = Checkpointer(counting).load(Position(1))
    assert fingerprint(loaded.state["model"]) == fingerprint(state)
    assert sum(one.name.endswith(".safetensors") for one in counting.operations) < 10


# --- into live tensors


def state_of(seed: int) -> dict[str, Any]:
    return {
        "weight": noise(3, 4, seed=seed),
        "bias": nn.Parameter(noise(4, seed=seed + 1)),
        "number": torch.tensor(seed),
        "deep": [{"inner": noise(2, seed=seed + 2).bfloat16()}],
    }


def test_what_fits_is_read_into_the_live_tensors_and_counted_as_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": state_of(0)}, epoch=1)
    live = state_of(50)
    tensors = [live["weight"], live["bias"], live["number"], live["deep"][0]["inner"]]
    versions = [one._version for one in tensors]
    loaded = checkpointer.load(Position(1), into={"model": live}).state["model"]
    assert fingerprint(live) == fingerprint(state_of(0))
    assert fingerprint(loaded) == fingerprint(state_of(0))
    found = [loaded["weight"], loaded["bias"], loaded["number"], loaded["deep"][0]["inner"]]
    assert [one.data_ptr() for one in found] == [one.data_ptr() for one in tensors]
    assert all(one._version > was for one, was in zip(tensors, versions, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: noise(4, 3).t(),
        lambda: noise(3, 4).double(),
        lambda: noise(4, 3),
        lambda: noise(12),
        lambda: noise(1, 4).expand(3, 4),
    ],
    ids=["strides", "dtype", "shape", "dimensions", "expanded"],
)
def test_what_does_not_fit_is_left_alone(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": state_of(0)}, epoch=1)
    live, was = make(), make()
    state = checkpointer.load(Position(1), into={"model": {"weight": live}}).state
    assert torch.equal(live, was)
    assert fingerprint(state) == fingerprint({"model": state_of(0)})


def test_memory_that_several_have_a_part_of_is_left_alone(tmp_path: Path) -> None:
    saved = {"model": {"a": noise(6), "b": noise(6, seed=1)}, "other": {"c": noise(6, seed=2)}}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(saved, epoch=1)
    memory = torch.zeros(10)
    overlapping = {"model": {"a": memory[:6], "b": memory[4:]}}
    assert fingerprint(checkpointer.load(Position(1), into=overlapping).state) == fingerprint(saved)
    shared = {"model": {"a": memory[:6]}, "other": {"c": memory[:6]}}
    assert fingerprint(checkpointer.load(Position(1), into=shared).state) == fingerprint(saved)
    assert not memory.any()
    # One behind the other is fine.
    memory = torch.zeros(12)
    apart = {"model": {"a": memory[:6], "b": memory[6:]}}
    checkpointer.load(Position(1), into=apart)
    assert torch.equal(memory, torch.cat([saved["model"]["a"], saved["model"]["b"]]))


def test_tied_tensors_are_read_into_once_and_others_that_were_two_are_not(tmp_path: Path) -> None:
    weight = noise(6)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"tied": {"a": weight, "b": weight}}, epoch=1)
    checkpointer.save({"tied": {"a": weight, "b": weight + 1}}, epoch=2)
    live = torch.zeros(6)
    loaded = checkpointer.load(Position(1), into={"tied": {"a": live, "b": live}}).state["tied"]
    assert torch.equal(live, weight)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() == live.data_ptr()
    live.zero_()
    loaded = checkpointer.load(Position(2), into={"tied": {"a": live, "b": live}}).state["tied"]
    assert not live.any()
    assert torch.equal(loaded["b"], weight + 1)


def test_a_tensor_with_windows_into_it_gets_memory_of_its_own(tmp_path: Path) -> None:
    base = noise(8)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": {"base": base, "part": base[2:4]}}, epoch=1)
    live = torch.zeros(20)[5:13]
    loaded = checkpointer.load(Position(1), into={"model": {"base": live}}).state["model"]
    assert torch.equal(loaded["base"], base)
    loaded["part"].zero_()
    assert not loaded["base"][2:4].any()


def damage(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_behind_a_damaged_one_everything_live_is_written_over_by_an_older_one(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    for epoch in (1, 2):
        checkpointer.save({"model": state_of(epoch), "other": state_of(10 + epoch)}, epoch=epoch)
    damage(tmp_path / "checkpoints/epoch_0002/other.safetensors")
    live = {"model": state_of(50), "other": state_of(60)}
    loaded = checkpointer.load_newest(into=live)
    assert loaded is not None
    assert fingerprint(live) == fingerprint({"model": state_of(1), "other": state_of(11)})


def test_an_older_one_that_lacks_what_is_half_written_is_refused_and_the_next_start_takes_it(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": state_of(1)}, epoch=1)
    checkpointer.save({"model": state_of(2), "other": state_of(12)}, epoch=2)
    damage(tmp_path / "checkpoints/epoch_0002/other.safetensors")
    live = {"model": state_of(50), "other": state_of(60)}
    with pytest.raises(CorruptCheckpoint, match=r"'other' the live tensors hold half .* again"):
        checkpointer.load_newest(into=live, quarantine=True)
    loaded = checkpointer.load_newest(into={"model": state_of(50), "other": state_of(60)})
    assert loaded is not None
    assert fingerprint(loaded.state) == fingerprint({"model": state_of(1)})


def test_a_damaged_one_that_is_not_live_hinders_nobody(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": state_of(1)}, epoch=1)
    checkpointer.save({"model": state_of(2), "other": state_of(12)}, epoch=2)
    for record in ("manifest.json", ".manifest.json"):
        damage(tmp_path / "checkpoints/epoch_0002" / record)
    loaded = checkpointer.load_newest(into={"model": state_of(50), "other": state_of(60)})
    assert loaded is not None
    assert loaded.manifest.position == Position(1)


def test_checkpoints_that_go_away_while_they_are_read_do_not_leave_half_of_one(
    tmp_path: Path,
) -> None:
    state = {"model": {"weight": noise(4)}, "other": {"weight": noise(4, seed=1)}}
    Checkpointer(tmp_path).save(state, epoch=1)
    folder = tmp_path / "checkpoints"

    def deleting(operation: Any, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.kind == "open" and operation.name.endswith("other.safetensors"):
            shutil.rmtree(folder / "epoch_0001", ignore_errors=True)
        return really(*arguments)

    checkpointer = Checkpointer(FaultyStorage(LocalStorage(folder), deleting))
    with pytest.raises(MissingCheckpoint, match=r"were deleted while 'model' was read"):
        checkpointer.load_newest(into=state)
    assert checkpointer.load_newest(into=state) is None


def extra_memory(report: Callable[[Any], None], folder: str) -> None:
    torch.set_num_threads(1)
    state = {"model": {f"{i}": torch.full((MEBI,), float(i)) for i in range(16)}}
    checkpointer = Checkpointer(Path(folder))
    checkpointer.save(state, epoch=1)
    for one in state["model"].values():
        one.zero_()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    assert checkpointer.load_newest(into=state) is not None
    rise = status("VmHWM") - before
    assert all(torch.equal(one, torch.full_like(one, int(i))) for i, one in state["model"].items())
    report(rise)


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


def test_reading_into_live_tensors_takes_little_memory(tmp_path: Path) -> None:
    outcome = in_child(extra_memory, str(tmp_path))
    assert outcome.status == 0, outcome.error
    (mebibytes,) = outcome.reports
    # Of 64.
    assert mebibytes <= 16


# --- a solver


def pointers(solver: Any) -> dict[str, int]:
    live = {
        **solver.model.state_dict(),
        **{f"best.{k}": v for k, v in solver.best_state.states["model"].items()},
        **{f"ema.{k}": v for k, v in solver.ema.state["model"].items()},
    }
    for index, state in solver.optimizer.state_dict()["state"].items():
        live |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    return {name: one.data_ptr() for name, one in live.items()}


EMA = "optim.ema.use=true"


def test_a_solver_restores_into_its_own_memory(tmp_path: Path) -> None:
    ran(Regression, tmp_path, "aaaa", EMA)
    with built(Regression, tmp_path, "aaaa", EMA) as solver:
        assert solver.restore()
        there, state = pointers(solver), fingerprint(solver._saver.state())
        for one in (*solver.model.parameters(), *solver.best_state.states["model"].values()):
            one.detach().zero_()
        version = solver.best_state.version
        assert solver.restore()
        assert pointers(solver) == there
        assert fingerprint(solver._saver.state()) == state
        assert solver.best_state.version != version


class Choosy(nn.Linear):
    """Keeps its bias, whatever is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict = {**state_dict, f"{prefix}bias": self.bias.detach().clone()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ChoosySolver(Regression):
    def make_model(self) -> nn.Module:
        return Choosy(4, 1)


class SolverThatSkips(Regression):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state.items() if k != "model"})


class WriteOnly(Regression):
    def build_model(self) -> None:
        super().build_model()
        self.encoder = nn.Linear(2, 2)
        self.register_stateful("encoder", write_only=True)


@pytest.mark.parametrize(
    ("kind", "key"),
    [(ChoosySolver, "model.bias"), (SolverThatSkips, "model.0.bias"), (WriteOnly, "encoder.bias")],
)
def test_what_decides_by_itself_what_it_loads_keeps_what_it_had(
    tmp_path: Path, kind: type[Regression], key: str
) -> None:
    ran(kind, tmp_path, "aaaa", EMA)
    with built(kind, tmp_path, "aaaa", EMA) as solver:
        name, _, rest = key.partition(".")
        bias = getattr(solver, name).get_parameter(rest)
        bias.detach().fill_(7)
        assert solver.restore()
        assert bool((bias == 7).all())


# --- only what is asked for


def checkpoint_of(tmp_path: Path) -> Path:
    return max((tmp_path / "xps/aaaa/checkpoints").iterdir())


def delete_data(folder: Path, *kept: str) -> None:
    for file in folder.glob("*.safetensors"):
        if file.name.partition(".")[0] not in kept:
            file.unlink()


def test_a_checkpoint_is_read_without_the_files_of_other_sources(tmp_path: Path) -> None:
    ran(Regression, tmp_path, "aaaa", EMA)
    folder = checkpoint_of(tmp_path)
    delete_data(folder, "model")
    assert load_checkpoint(folder, ["model", "history"]).state.keys() == {"model", "history"}
    with pytest.raises(CorruptCheckpoint, match="missing"):
        load_checkpoint(folder, ["model", "optimizer"])


def test_continuing_from_another_run_reads_its_best_state_alone(tmp_path: Path) -> None:
    there = ran(Regression, tmp_path, "aaaa", EMA)
    best = fingerprint(there.solver.best_state.state_dict())
    for folder in (tmp_path / "xps/aaaa/checkpoints").iterdir():
        delete_data(folder, "best_state")
    for reference in ("//sig/aaaa", str(checkpoint_of(tmp_path))):
        with built(Regression, tmp_path, "bbbb", EMA, f"continue_from={reference}") as solver:
            assert solver.restore()
            assert fingerprint(solver.best_state.state_dict()) == best


def test_the_best_weights_are_restored_without_reading_those_they_replace(tmp_path: Path) -> None:
    there = ran(Regression, tmp_path, "aaaa", EMA)
    best = fingerprint(there.solver.best_state.state_dict())
    for folder in (tmp_path / "xps/aaaa/checkpoints").iterdir():
        delete_data(folder, "best_state", "optimizer", "random_state")
    with built(Regression, tmp_path, "aaaa", EMA) as solver:
        assert solver.restore(load_best=True)
        assert fingerprint(solver.best_state.state_dict()) == best
        weights, best_weights = solver.model.state_dict(), solver.best_state.states["model"]
        assert all(torch.equal(weights[key], best_weights[key]) for key in weights)
        averages = solver.ema.state["model"]
        assert all(torch.equal(averages[key], best_weights[key]) for key in averages)
    with (
        built(Regression, tmp_path, "aaaa", EMA) as solver,
        pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"),
    ):
        solver.restore()


# --- lazily


def test_tensors_are_mapped_and_what_is_written_to_them_stays_in_this_process(large: Path) -> None:
    file = large / "model.safetensors"
    before = file.read_bytes()
    state = load_checkpoint(large, ["model"], lazy=True).state["model"]
    assert fingerprint(state) == fingerprint(large_state())
    assert state["tied"].data_ptr() == state["layer3.weight"].data_ptr()
    assert any(str(file) in line for line in Path("/proc/self/maps").read_text().splitlines())
    state["bias"].zero_()
    assert file.read_bytes() == before
    # Deleted files stay for those who have them.
    shutil.rmtree(large)
    assert torch.equal(state["layer8.weight"], large_state()["layer8.weight"])


def test_values_that_are_mapped_are_not_verified_but_sizes_and_headers_are(large: Path) -> None:
    file = large / "model.safetensors"
    size = file.stat().st_size
    flip(file, size - 1, 0)
    load_checkpoint(large, lazy=True)
    with file.open("r+b") as opened:
        opened.truncate(size - 1)
    with pytest.raises(CorruptCheckpoint, match=re.escape(f"{file} is damaged")):
        load_checkpoint(large, lazy=True)


def test_a_compressed_file_is_not_mapped(tmp_path: Path) -> None:
    Checkpointer(tmp_path, compress=["model"]).save({"model": state_of(0)}, epoch=1)
    with pytest.raises(UnsupportedFormat, match=r"model\.safetensors\.zst is compressed"):
        load_checkpoint(tmp_path / "checkpoints/epoch_0001", lazy=True)
