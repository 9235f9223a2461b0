"""Checkpoints of several processes: whole or not at all, and good for any number of readers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import die, good, on_ranks
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    Position,
    load_checkpoint,
)
from checkpoint.integration import AllRanks, PerRank, Ranks
from checkpoint.layout import COPY

Report = Callable[[Any], None]


def whole_state() -> dict[str, Any]:
    """A model whose tensors divide by no number of ranks, tied weights, and plain values."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 3, generator=generator)
    model = {
        "weight": weight,
        "tied": weight,
        "bias": torch.randn(5, generator=generator),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "narrow": torch.randn(2, 2, generator=generator).to(torch.bfloat16),
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    return {"model": model, "history": [{"train": {"loss": 0.5}}], "count": {"step": 7}}


def sharded_state() -> dict[str, Any]:
    """The same, each tensor sharded over the ranks there are."""
    torch.manual_seed(5)
    state, ranks = whole_state(), Ranks.here()
    if ranks.size > 1:
        mesh = init_device_mesh("cpu", (ranks.size,))
        of_weight = distribute_tensor(state["model"]["weight"], mesh, [Shard(0)])
        for key, tensor in state["model"].items():
            if tensor.dim() > 0:
                shared = key in ("weight", "tied")
                state["model"][key] = (
                    of_weight if shared else distribute_tensor(tensor, mesh, [Shard(0)])
                )
    return state


def replicated_state() -> dict[str, Any]:
    torch.manual_seed(5)
    return whole_state()


def save(report: Report, root: str, kind: str, epoch: int) -> None:
    ranks = Ranks.here()
    state = globals()[kind]() | {
        "own": PerRank({"rank": ranks.rank, "seed": torch.tensor([ranks.rank])})
    }
    report(Checkpointer(Path(root), ranks=ranks).save(state, epoch=epoch))


def load(report: Report, root: str) -> None:
    """Load, laid out as each kind of state is, and compare with that."""
    for kind in KINDS:
        report(load_like(root, globals()[kind]()))


def load_like(root: str, here: dict[str, Any]) -> int:
    """Return of how many ranks there was a state of their own, other than of this one."""
    ranks = Ranks.here()
    loaded = Checkpointer(Path(root), ranks=ranks).load_newest(like=here)
    assert loaded is not None
    for key, ours in here["model"].items():
        theirs = loaded.state["model"][key]
        assert isinstance(theirs, DTensor) == isinstance(ours, DTensor), key
        if isinstance(ours, DTensor):
            assert theirs.placements == ours.placements
            ours, theirs = ours.to_local(), theirs.to_local()
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), key
    assert loaded.state["history"] == here["history"]
    own = loaded.state["own"]
    if loaded.manifest.world_size == 1:
        values = [own]
    elif isinstance(own, AllRanks):
        values = list(own.values)
    else:
        assert own["rank"] == ranks.rank
        values = []
    assert [int(value["seed"]) for value in values] == [value["rank"] for value in values]
    return len(values)


KINDS = ("replicated_state", "sharded_state")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("writers", "readers"), [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2)]
)
def test_what_some_ranks_saved_others_load(
    tmp_path: Path, writers: int, readers: int, kind: str
) -> None:
    good(on_ranks(writers, save, tmp_path, kind, 1))
    others = 0 if writers == readers > 1 else writers
    assert good(on_ranks(readers, load, tmp_path)) == [[others] * len(KINDS)] * readers


def test_each_rank_writes_its_part_and_others_read_it_with_safetensors_alone(
    tmp_path: Path,
) -> None:
    good(on_ranks(2, save, tmp_path, "replicated_state", 1))
    folder = tmp_path / "checkpoints/epoch_0001"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {
        key: tensor for file in folder.glob("model-*") for key, tensor in load_file(file).items()
    }
    whole = whole_state()["model"]
    assert len(set(index["weight_map"].values())) == 2
    assert index["weight_map"].keys() == whole.keys() - {"tied"}
    assert torch.equal(tensors["weight"], whole["weight"])
    sizes = [file.stat().st_size for file in sorted(folder.glob("model-*"))]
    assert max(sizes) < 0.8 * sum(sizes)


def save_broken(report: Report, root: str, fault: str) -> None:
    ranks = Ranks.here()
    checkpointer = Checkpointer(Path(root), ranks=ranks)
    checkpointer.save(replicated_state(), epoch=1)
    state = replicated_state()
    if fault == "value" and ranks.rank == 1:
        state["count"]["step"] = object()
    if fault == "names" and ranks.rank == 1:
        state["model"]["more"] = torch.zeros(2)
    if fault in ("write", "die") and ranks.rank == 1:
        write = checkpointer.storage.write

        def failing(name: str, parts: Any) -> None:
            if fault == "die":
                die()
            write(name, iter([b"torn"]))
            raise OSError(28, "No space left on device")

        checkpointer.storage.write = failing  # type: ignore[method-assign]
    try:
        checkpointer.save(state, epoch=2)
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
    report(Checkpointer(Path(root)).positions()[-1].name)


@pytest.mark.parametrize(
    ("fault", "here", "there"),
    [
        ("value", "UnsupportedState: rank 1: cannot save source 'count'", "UnsupportedState: cann"),
        (
            "names",
            "UnsupportedState: ranks 0 and 1 have different",
            "UnsupportedState: ranks 0 and",
        ),
        ("write", "CannotSave: rank 1: cannot save", "CannotSave: cannot save"),
    ],
)
def test_when_one_rank_cannot_save_all_fail_and_the_one_before_is_good(
    tmp_path: Path, fault: str, here: str, there: str
) -> None:
    first, second = good(on_ranks(2, save_broken, tmp_path, fault))
    assert first[0].startswith(here)
    assert second[0].startswith(there)
    assert first[1] == second[1] == "epoch_0001"
    assert Checkpointer(tmp_path).interrupted() == []


def test_a_rank_that_dies_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    first, second = on_ranks(2, save_broken, tmp_path, "die")
    assert second.status == -9
    # It was told by the connection that broke.
    assert first.status == 0, first.error
    assert first.reports[1] == "epoch_0001"
    loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.manifest.position == Position(1)


def load_with_a_slow_disk(report: Report, root: str) -> None:
    """Load where rank 1 does not see yet what rank 0 sees."""
    ranks = Ranks.here()
    checkpointer = Checkpointer(Path(root), ranks=ranks)
    if ranks.rank == 1:
        checkpointer.storage.folders = list  # type: ignore[method-assign]
    loaded = checkpointer.load_newest()
    report(None if loaded is None else loaded.manifest.position.name)


def test_D2_D3_one_rank_looks_and_renames_for_all(tmp_path: Path) -> None:
    good(on_ranks(2, save, tmp_path, "replicated_state", 1))
    assert good(on_ranks(2, load_with_a_slow_disk, tmp_path)) == [["epoch_0001"]] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreign", ["rank", "epoch", "missing"])
def test_a_shard_that_is_not_of_this_checkpoint_is_detected(
    tmp_path: Path, kind: str, foreign: str
) -> None:
    good(on_ranks(2, save, tmp_path, kind, 1))
    folder = tmp_path / "checkpoints/epoch_0001"
    shard = folder / "model-00002-of-00002.safetensors"
    if foreign == "missing":
        shard.unlink()
    elif foreign == "rank":
        shard.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    else:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="model-00002-of-00002"):
        load_checkpoint(folder)
    for rank in on_ranks(2, load, tmp_path):
        assert "model-00002-of-00002" in rank.error


def hostile(manifest: dict[str, Any], fault: str) -> None:
    """Change what a manifest of two ranks says."""
    weight = manifest["tensors"]["model"]["weight"]
    first = weight["chunks"][0]
    if fault == "one file":
        weight["shape"][0] += first["shape"][0]
        weight["chunks"].append({**first, "offsets": [7, 0]})
    elif fault == "huge":
        weight["shape"] = [2**46, 3]
        weight["chunks"] = [{**first, "offsets": [0, 0], "shape": [2**46, 3]}]
    elif fault == "absurd":
        weight["shape"] = [2**70, 0]
        for chunk in weight["chunks"]:
            chunk |= {"offsets": [0, 0], "shape": [2**70, 0]}
    elif fault == "gap":
        first["shape"][0] -= 1
    elif fault == "ranks":
        manifest["world_size"] = -1
    elif fault == "nobody":
        manifest["sources"]["own"] = {"$ranks": []}


@pytest.mark.parametrize("fault", ["one file", "huge", "absurd", "gap", "ranks", "nobody"])
def test_a_manifest_that_nobody_wrote_is_refused_before_memory_is_taken(
    tmp_path: Path, fault: str
) -> None:
    good(on_ranks(2, save, tmp_path, "sharded_state", 1))
    file = tmp_path / "checkpoints/epoch_0001/manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["digest"]
    hostile(manifest, fault)
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in manifest.items()]
    sealed = ("{\n" + "".join(lines)).encode()
    digest = hashlib.sha256(sealed).hexdigest()
    file.write_bytes(sealed + f'"digest": "sha256:{digest}"\n}}\n'.encode())
    (file.parent / COPY).unlink()
    with pytest.raises(CorruptCheckpoint, match="manifest.json is damaged"):
        load_checkpoint(file.parent)
