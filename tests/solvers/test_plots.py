"""Learning curves and image grids: what is in the picture, and that it is never half written."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread

from solvers.plots import image_grid, learning_curves

HISTORY = [
    {
        "train": {"loss": 10.0**-epoch, "duration": 3.0},
        "valid": {"loss": 1.0 / epoch, "accuracy": 0.5, "accuracy_reference": 0.9},
    }
    for epoch in range(1, 5)
]


def test_each_metric_has_a_panel_and_references_share_that_of_their_metric(tmp_path: Path) -> None:
    one = imread(learning_curves([{"a": {"x": 1.0}}], tmp_path / "one.png", "t"))
    # loss and accuracy; not duration.
    two = imread(learning_curves(HISTORY, tmp_path / "two.png", "t"))
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] == 2 * one.shape[1]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{}],
        [{"valid": {"loss": math.nan}}, {"valid": {"loss": 1.0}}],
        [{"valid": {"loss": math.inf, "name": "text", "many": [1, 2], "none": None}}],
        [{"valid": {"loss": 0.0}}, {"valid": {"loss": -5.0}}, {}],
        [{"train": {"loss": 0}}, {"train": {"loss": 1_000_000}}],
    ],
)
def test_any_history_can_be_drawn(history: list[dict], tmp_path: Path) -> None:
    path = learning_curves(history, tmp_path / "new" / "curves.png", "any")
    assert imread(path).size
    assert list(path.parent.iterdir()) == [path]


def test_drawing_leaves_no_global_state_behind(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from solvers.plots import learning_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "learning_curves([{'a': {'b': 1.0}}], Path(sys.argv[1]), 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    path = tmp_path / "curves.png"
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=True)
    assert path.exists()


def test_images_lie_row_by_row_with_grey_between(tmp_path: Path) -> None:
    shades = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, -1.0])
    images = shades[:, None, None].expand(6, 8, 8)
    path = image_grid(images, columns=3, path=tmp_path / "grid.png", cell=16, gap=2)
    picture = torch.from_numpy(imread(path)[..., 0].copy())
    assert picture.shape == (2 * 18 - 2, 3 * 18 - 2)
    centres = picture[8::18, 8::18].flatten()
    torch.testing.assert_close(centres, (shades + 1) / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(picture[16], torch.full((52,), 0.2), atol=0.01, rtol=0)


def test_a_picture_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    path = image_grid(torch.zeros(1, 8, 8), 1, tmp_path / "grid.png")
    before = path.read_bytes()
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        image_grid(torch.ones(1, 8, 8), 1, tmp_path / "taken")
    with pytest.raises(RuntimeError, match="shape"):
        image_grid(torch.ones(3, 8, 8), 2, path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "taken"]
