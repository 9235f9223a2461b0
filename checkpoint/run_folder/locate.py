"""What is named on the command line -> a folder of checkpoints, and perhaps one of them.

An experiment is its folder, its folder `checkpoints`, `//sig/<sig>`, or just the signature; one of
its checkpoints is any of these followed by `/<name>` or `/<epoch>`, or the path of its folder.
"""

from dataclasses import dataclass
from pathlib import Path

from ..errors import BadReference, MissingCheckpoint
from ..layout import CHECKPOINTS, MANIFEST, Position, is_quarantined
from ..storage import LocalStorage
from .resolve import SIG, resolve

XPS = Path("outputs/xps")
"""Where Dora keeps the experiments, unless it is told otherwise."""


@dataclass(frozen=True)
class CheckpointRef:
    """A folder in which checkpoints lie, and the name of one of them; None for all."""

    root: Path
    name: str | None = None

    @property
    def storage(self) -> LocalStorage:
        """What the checkpoints are read from."""
        return LocalStorage(self.root)


def locate(reference: str, xps: Path = XPS) -> CheckpointRef:
    """Find what was named; the folder is there, and nothing in it is believed yet.

    Args:
        reference: what was named.
        xps: folder of all experiments, in which signatures are looked up.

    Raises:
        BadReference: it cannot be the name of a checkpoint or an experiment.
        MissingCheckpoint: nothing is there; the message says what is nearby.
    """
    for path in _candidates(reference, xps):
        found = _at(path) or _inside(path)
        if found is not None:
            return found
    is_name = "/" not in reference and reference.isalnum()
    location = resolve(f"{SIG}{reference}" if is_name else reference, xps=xps)
    if location.kind == "file":
        raise BadReference(
            f"{location.path} is a file, and this is about folders of checkpoints: name an "
            "experiment or a checkpoint of it"
        )
    is_one = location.kind == "checkpoint"
    return (
        CheckpointRef(location.path.parent, location.path.name)
        if is_one
        else CheckpointRef(location.path / CHECKPOINTS)
    )


def locate_checkpoint(reference: str, xps: Path = XPS) -> tuple[LocalStorage, str]:
    """Find one checkpoint that was named; return the storage that it lies in, and its folder.

    Raises:
        BadReference: it is an experiment, or see `locate`.
        MissingCheckpoint: see `locate`.
    """
    place = locate(reference, xps)
    if place.name is None:
        raise BadReference(
            f"{reference} is an experiment: name one of its checkpoints, as in "
            f"{reference.rstrip('/')}/NAME{_others(place)}"
        )
    return place.storage, place.name


def experiments(xps: Path) -> list[Path]:
    """Folders of the experiments that have a folder of checkpoints, by name.

    Raises:
        MissingCheckpoint: there are none.
    """
    found = sorted(folder.parent for folder in xps.glob(f"*/{CHECKPOINTS}") if folder.is_dir())
    if not found:
        raise MissingCheckpoint(
            f"there are no experiments with checkpoints in {xps}: name another folder with --xps"
        )
    return found


def _candidates(reference: str, xps: Path) -> list[Path]:
    if reference.startswith(SIG):
        return [xps / reference.removeprefix(SIG)]
    if reference.startswith("//") or "://" in reference:
        return []
    return [Path(reference).expanduser(), xps / reference]


def _at(path: Path) -> CheckpointRef | None:
    if path.name == MANIFEST and path.is_file():
        path = path.parent
    if not path.is_dir():
        return None
    if (path / CHECKPOINTS).is_dir():
        return CheckpointRef(path / CHECKPOINTS)
    if path.name == CHECKPOINTS:
        return CheckpointRef(path)
    is_checkpoint = Position.parse(path.name) is not None or is_quarantined(path.name)
    if is_checkpoint or (path / MANIFEST).is_file():
        return CheckpointRef(path.parent, path.name)
    return None


def _inside(path: Path) -> CheckpointRef | None:
    """Take the last part as the name of a checkpoint, or an epoch, of the experiment before it."""
    place = _at(path.parent)
    if place is None or place.name is not None:
        return None
    name = Position(int(path.name)).name if path.name.isdecimal() else path.name
    if not (place.root / name).is_dir():
        raise MissingCheckpoint(f"there is no {place.root / name}{_others(place)}")
    return CheckpointRef(place.root, name)


def _others(place: CheckpointRef) -> str:
    names = sorted(place.storage.folders())
    return f"; the last ones there are {', '.join(names[-5:])}" if names else "; it has none"
