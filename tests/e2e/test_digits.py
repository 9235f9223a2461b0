"""The demo: its data, its sampler, its numbers and pictures, and its grid."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import Command
from matplotlib.image import imread

from solvers.digits import FlowNetwork, energy_distance, load_splits, nearest_distance, sample
from solvers.grids.digits import explorer

TINY = [
    "solver=digits",
    "optim.epochs=2",
    "optim.updates_per_epoch=3",
    "sampling.steps=2",
    "generate.columns=5",
]


def test_the_splits_share_no_image_and_depend_on_their_seed_alone() -> None:
    splits = load_splits(held_out=300, seed=0)
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {
        "train": 1197,
        "valid": 300,
        "test": 300,
    }
    images = torch.cat([images for images, _ in splits.values()])
    assert images.min() == -1
    assert images.max() == 1
    assert len(images.unique(dim=0)) == 1797
    again, other = (load_splits(held_out=300, seed=seed)["test"][0] for seed in (0, 1))
    assert torch.equal(splits["test"][0], again)
    assert not torch.equal(splits["test"][0], other)


def test_the_network_tells_digits_and_times_apart() -> None:
    network = FlowNetwork(width=16, hidden=32, blocks=2)
    images, time, labels = torch.zeros(2, 64), torch.tensor([0.2, 0.2]), torch.tensor([3, 4])
    velocities = network(images, time, labels)
    assert velocities.shape == (2, 64)
    assert not torch.allclose(velocities[0], velocities[1])
    assert not torch.allclose(velocities, network(images, time + 0.5, labels))


def test_the_sampler_follows_the_velocity_of_the_label_to_the_end() -> None:
    class Constant(torch.nn.Module):
        def forward(self, images, time, labels):
            return labels[:, None] * torch.full_like(images, 0.1)

    noise = torch.linspace(-0.1, 0.1, 3 * 64).view(3, 64)
    drawn = sample(Constant(), torch.tensor([0, 1, 2]), noise, steps=5)
    torch.testing.assert_close(drawn, noise + torch.tensor([[0.0], [0.1], [0.2]]))


def test_sampled_pixels_stay_in_range() -> None:
    network = FlowNetwork(width=8, hidden=8, blocks=1)
    drawn = sample(network, torch.arange(10), 5 * torch.randn(10, 64), steps=3)
    assert drawn.shape == (10, 64)
    assert drawn.abs().max() <= 1


def test_the_distances_are_zero_for_the_same_images_and_grow_with_a_shift() -> None:
    images = load_splits(held_out=100, seed=0)["test"][0]
    assert energy_distance(images, images) == pytest.approx(0, abs=1e-5)
    # Not exactly 0: cdist rounds.
    assert nearest_distance(images, images) == pytest.approx(0, abs=0.02)
    near, far = (energy_distance(images + shift, images) for shift in (0.1, 0.5))
    assert 0 < near < far


def test_a_run_leaves_pictures_and_honest_numbers_and_goes_on_as_it_says(
    command: Command, tmp_path: Path
) -> None:
    first = command("dora", "-P", "solvers", "run", *TINY, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs" / "xps").iterdir()
    # Five columns and ten rows of 48 pixels, with 4 between.
    assert imread(folder / "samples" / "2.png").shape[:2] == (10 * 52 - 4, 5 * 52 - 4)
    assert imread(folder / "curves.png").size
    last = json.loads((folder / "history.json").read_text())[-1]
    numbers = last["evaluate"]
    assert numbers["accuracy_reference"] > 0.95
    # Hardly trained: far from as good as real ones.
    assert numbers["accuracy"] < numbers["accuracy_reference"]
    assert numbers["distance"] > numbers["distance_reference"]
    assert numbers["nearest"] > 0 < numbers["nearest_reference"]
    assert "Nothing left to do" not in first.stderr
    assert f"best valid loss  {last['valid']['loss']:.4f} in epoch 2 of 2" in first.stderr
    assert str(folder / "curves.png") in first.stderr

    again = command("dora", "-P", "solvers", "run", *TINY, cwd=tmp_path)
    assert "Nothing left to do" in again.stderr
    assert _summary(again.stderr) == _summary(first.stderr)

    # What the summary says goes on from there; here through two batches of every stage.
    arguments = re.search(r"to train on .*?dora (run .*)", first.stderr)
    assert arguments is not None
    words = [*arguments[1].split(), "fast_dev_run=true"]
    on = command("dora", "-P", "solvers", *words, cwd=tmp_path)
    assert f"Continuing from //sig/{folder.name}" in on.stderr
    for stage in ("Train", "Valid", "Evaluate", "Generate"):
        assert f"{stage} Summary | Epoch 1" in on.stderr
    assert list((tmp_path / "outputs" / "xps").iterdir()) == [folder]


def _summary(log: str) -> str:
    return log[log.index("Summary\n  best") :]


def test_the_grid_lists_an_experiment_for_each_setting(command: Command, tmp_path: Path) -> None:
    flags = ["--dry_run", "--init", "--no_monitoring"]
    done = command("dora", "-P", "solvers", "grid", "digits", *flags, cwd=tmp_path)
    assert len(set(re.findall(r" N/A  ([0-9a-f]{8}) ", done.stdout))) == 4


def test_the_grid_shows_the_latest_metrics_and_the_best_loss() -> None:
    history = [
        {"train": {"loss": 3.0}, "valid": {"loss": 1.0}, "evaluate": {"accuracy": 0.5}},
        {"train": {"loss": 2.0}, "valid": {"loss": 2.0}},
    ]
    row = explorer.process_history(history)
    assert row == {
        "train": {"epoch": 2, "loss": 2.0},
        "valid": {"loss": 2.0, "best": 1.0},
        "evaluate": {"accuracy": 0.5},
    }
    assert explorer.process_history([]) == {"train": {"epoch": 0}}
