"""What the user writes, and where it leads; or what is said when it leads nowhere."""

from pathlib import Path

import pytest
import torch

from checkpoint import BadReference, Checkpointer, Location, MissingCheckpoint, resolve
from checkpoint.layout import COPY, MANIFEST, UNFINISHED


@pytest.fixture
def xps(tmp_path: Path) -> Path:
    for sig in ("aaaa1111", "bbbb2222"):
        checkpointer = Checkpointer(tmp_path / "xps" / sig)
        for epoch in (1, 2):
            checkpointer.save({"model": {"w": torch.ones(1)}}, epoch=epoch)
    (tmp_path / "xps" / "empty000").mkdir()
    return tmp_path / "xps"


def test_a_signature_leads_to_its_experiment(xps: Path) -> None:
    assert resolve("//sig/aaaa1111", xps=xps) == Location("experiment", xps / "aaaa1111")


def test_a_signature_with_an_epoch_leads_to_that_checkpoint(xps: Path) -> None:
    path = xps / "aaaa1111/checkpoints/epoch_0001"
    assert resolve("//sig/aaaa1111/1", xps=xps) == Location("checkpoint", path)


def test_paths_of_every_kind_lead_where_they_should(xps: Path) -> None:
    experiment = xps / "aaaa1111"
    folder = experiment / "checkpoints" / "epoch_0002"
    assert resolve(str(experiment)).kind == "experiment"
    assert resolve(str(experiment / "checkpoints")) == Location("experiment", experiment)
    assert resolve(str(folder)) == Location("checkpoint", folder)
    assert resolve(str(folder / "manifest.json")) == Location("checkpoint", folder)
    assert resolve(folder.as_uri()) == Location("checkpoint", folder)
    weights = folder / "model.safetensors"
    assert resolve(str(weights)) == Location("file", weights)


def test_an_experiment_of_audiocraft_leads_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.th").write_bytes(b"")
    assert resolve(str(tmp_path)) == Location("file", tmp_path / "checkpoint.th")


def test_an_unknown_signature_says_which_there_are(xps: Path) -> None:
    with pytest.raises(MissingCheckpoint, match=r"no experiment 'aaaa1112'.*aaaa1111"):
        resolve("//sig/aaaa1112", xps=xps)


def test_an_unknown_epoch_says_which_there_are(xps: Path) -> None:
    with pytest.raises(MissingCheckpoint, match=r"epoch 7; there are epoch_0001, epoch_0002"):
        resolve("//sig/aaaa1111/7", xps=xps)


def test_an_experiment_without_checkpoint_says_so(xps: Path) -> None:
    with pytest.raises(MissingCheckpoint, match="holds no committed checkpoint"):
        resolve("//sig/empty000", xps=xps)


def test_a_path_that_does_not_exist_says_what_is_nearby(xps: Path) -> None:
    with pytest.raises(MissingCheckpoint, match=r"does not exist; nearby in .*bbbb2222"):
        resolve(str(xps / "bbbb222"))
    with pytest.raises(MissingCheckpoint, match=f"nearest folder that exists is {xps}"):
        resolve(str(xps / "no" / "such" / "folder"))


@pytest.mark.parametrize(
    "reference",
    [
        "//sig/",
        "//sig/../x",
        "//sig/aaaa1111/x",
        "//sgi/aaaa1111",
        "s3://bucket/x",
        "file://host/x",
    ],
)
def test_what_is_no_reference_is_refused(xps: Path, reference: str) -> None:
    with pytest.raises(BadReference):
        resolve(reference, xps=xps)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadReference, match=r"notes\.txt"):
        resolve(str(tmp_path / "notes.txt"))


def test_a_checkpoint_whose_deletion_was_interrupted_is_none(xps: Path) -> None:
    folder = xps / "aaaa1111/checkpoints/epoch_0002"
    (folder / MANIFEST).unlink()
    assert (folder / COPY).exists()
    # Without the mark, the copy of the manifest stands in for a manifest that was lost.
    assert resolve(str(folder)) == Location("checkpoint", folder)
    (folder / UNFINISHED).touch()
    with pytest.raises(MissingCheckpoint, match="holds no committed checkpoint"):
        resolve(str(folder))
