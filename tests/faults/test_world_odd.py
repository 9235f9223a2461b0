"""File systems without links, locks or syncs of folders, and one of layers: a run lives on each."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import WAYS, Way
from faults import memory_folder, train
from mounts import in_user_space, mounted, needs
from worlds import nothing_is_lost, run

pytestmark = [pytest.mark.nightly, needs("mount", "/dev/fuse"), pytest.mark.timeout(600)]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
LACKS = {
    "links": {"link": errno.EPERM},
    "links, in its own words": {"link": errno.EIO},
    "locks": {"flock": errno.ENOSYS},
    "a server of locks": {"flock": errno.ENOLCK},
    "syncs of folders": {"fsyncdir": errno.EINVAL},
    "numbers of free bytes": {"statfs": errno.ENOSYS},
    "all of these": {
        "link": errno.EPERM,
        "flock": errno.ENOSYS,
        "fsyncdir": errno.EINVAL,
        "statfs": errno.ENOSYS,
    },
}


@pytest.fixture
def work() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@EACH_WAY
@pytest.mark.parametrize("lacks", LACKS)
def test_a_run_needs_nothing_of_a_file_system_that_may_be_missing(
    lacks: str, way: Way, work: Path
) -> None:
    with in_user_space(work / "real", work / "shown", errors=LACKS[lacks]):
        folder = work / "shown" / "xp"
        assert run(folder, way, 7).saved == [1, 2, 3, 4, 5, 6, 7]
        assert run(folder, way, 8).restored == 7
        assert nothing_is_lost(folder, 8) == 8


@EACH_WAY
def test_a_damaged_checkpoint_in_a_lower_layer_is_passed_over(way: Way, work: Path) -> None:
    """Overlay file systems rename no folder of a lower layer (EXDEV)."""
    train(work / "lower" / "xp", 1, 6)
    file = work / "lower" / "xp" / "checkpoints" / "epoch_0006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for name in ("upper", "work"):
        (work / name).mkdir()
    layers = f"lowerdir={work}/lower,upperdir={work}/upper,workdir={work}/work"
    with mounted(work / "both", "-t", "overlay", "-o", layers, "overlay") as top:
        lived = run(top / "xp", way, 8)
        assert lived.restored == 5
        assert "model.safetensors" in " ".join(lived.told)
        if lived.saved:
            assert nothing_is_lost(top / "xp", lived.saved[-1]) == lived.saved[-1]
        print(lived)
