"""`load_checkpoint` takes what the command `checkpoint` takes: signatures, paths, epochs, files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import BadReference, Checkpointer, MissingCheckpoint, load_checkpoint


@pytest.fixture(scope="module")
def xps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "xps"
    checkpointer = Checkpointer(folder / "1a2b3c4d", save_every=1)
    for epoch in (1, 2, 3):
        state = {"model": {"weight": torch.full((2,), float(epoch))}, "history": [{}] * epoch}
        checkpointer.save(state, epoch=epoch)
    checkpointer.close()
    return folder


@pytest.mark.parametrize(
    ("reference", "epoch"),
    [
        ("1a2b3c4d", 3),
        ("//sig/1a2b3c4d", 3),
        ("1a2b3c4d/2", 2),
        ("//sig/1a2b3c4d/1", 1),
        ("1a2b3c4d/epoch_0002", 2),
        ("{xps}/1a2b3c4d", 3),
        ("{xps}/1a2b3c4d/checkpoints", 3),
        ("{xps}/1a2b3c4d/checkpoints/epoch_0001", 1),
        ("{xps}/1a2b3c4d/checkpoints/epoch_0001/manifest.json", 1),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_every_name_of_a_checkpoint_loads_it(
    xps: Path, reference: str, epoch: int, lazy: bool
) -> None:
    loaded = load_checkpoint(reference.format(xps=xps), lazy=lazy, xps=xps)
    assert loaded.manifest.position.epoch == epoch
    assert loaded.state["model"]["weight"].tolist() == [epoch, epoch]


def test_the_newest_of_an_experiment_is_the_newest_good_one(xps: Path, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "run", save_every=1)
    for epoch in (1, 2):
        checkpointer.save({"model": {"weight": torch.full((2,), float(epoch))}}, epoch=epoch)
    checkpointer.close()
    (tmp_path / "run/checkpoints/epoch_0002/model.safetensors").write_bytes(b"damaged")
    assert load_checkpoint(tmp_path / "run").manifest.position.epoch == 1


def test_a_file_of_another_program_loads_by_source(xps: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.state["model"]["weight"].tolist() == [1, 1]
    torch.save({"model": {"weight": torch.ones(3)}, "history": [{}, {}]}, tmp_path / "a.th")
    loaded = load_checkpoint(tmp_path / "a.th", ["model"])
    assert loaded.state["model"]["weight"].tolist() == [1, 1, 1]
    assert len(loaded.state) == 1
    assert loaded.manifest.position.epoch == 2
    with pytest.raises(BadReference, match=r"a\.th has no source 'modl': did you mean 'model'"):
        load_checkpoint(tmp_path / "a.th", ["modl"])


def test_what_does_not_exist_is_refused_with_what_is_nearby(xps: Path) -> None:
    with pytest.raises(MissingCheckpoint, match="1a2b3c4d"):
        load_checkpoint("1a2b3c4e", xps=xps)
    with pytest.raises(MissingCheckpoint, match="epoch_0003"):
        load_checkpoint("1a2b3c4d/7", xps=xps)
    with pytest.raises(MissingCheckpoint, match="does not exist"):
        load_checkpoint(xps / "nothing" / "here")
