"""What the user wrote -> where it is.

A reference is one of:
  //sig/<sig>            an experiment by Dora's signature: its newest checkpoint
  //sig/<sig>/<epoch>    its checkpoint at the end of that epoch
  a path                 of a checkpoint, of an experiment, or of a `.safetensors` or `.th` file
  file://<path>          the same as a URL
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from ..errors import BadReference, MissingCheckpoint
from ..layout import CHECKPOINTS, COPY, MANIFEST, UNFINISHED, Position

SIG = "//sig/"
LEGACY = "checkpoint.th"
"""What Audiocraft and flashy keep their rolling checkpoint in."""

_FOREIGN_SUFFIXES = {".th", ".pt", ".pth", ".ckpt", ".safetensors"}


@dataclass(frozen=True)
class Location:
    """Where a reference leads.

    Attributes:
        kind: `experiment`: a folder with checkpoints, the newest good one counts; `checkpoint`: one
            committed folder; `file`: a file that others wrote.
        path: of that folder or file.
    """

    kind: Literal["experiment", "checkpoint", "file"]
    path: Path


def resolve(reference: str, *, xps: Path | None = None) -> Location:
    """Find what a reference leads to.

    Args:
        reference: what the user wrote.
        xps: folder of all experiments, which `//sig/` looks in.

    Raises:
        BadReference: it is not a reference.
        MissingCheckpoint: nothing is there; the message says what is nearby.
    """
    if reference.startswith(SIG):
        return _resolve_sig(reference, xps)
    if reference.startswith("//"):
        raise BadReference(
            f"{reference!r} is not a reference: write //sig/<sig>, //sig/<sig>/<epoch>, "
            "//pretrained/<name>, or a path"
        )
    path = Path(_path_of_url(reference)).expanduser()
    if not path.exists():
        if xps is not None and reference.isalnum() and (xps / reference).is_dir():
            raise BadReference(f"there is no {path}: did you mean {SIG}{reference}?")
        raise MissingCheckpoint(
            f"{reference!r} leads to {path}, which does not exist{_nearby(path)}"
        )
    return _classify(path, reference)


def _resolve_sig(reference: str, xps: Path | None) -> Location:
    sig, _, epoch = reference.removeprefix(SIG).partition("/")
    if not sig.isalnum() or (epoch and not epoch.isdecimal()):
        raise BadReference(
            f"{reference!r} is not a reference: write //sig/<sig> or //sig/<sig>/<epoch>"
        )
    if xps is None:
        raise BadReference(f"{reference!r} needs the folder of the experiments, and none is known")
    folder = xps / sig
    if not folder.is_dir():
        raise MissingCheckpoint(f"there is no experiment {sig!r} in {xps}{_nearby(folder)}")
    if not epoch:
        return _classify(folder, reference)
    path = folder / CHECKPOINTS / Position(int(epoch)).name
    if not _is_committed(path):
        raise MissingCheckpoint(
            f"experiment {sig!r} has no checkpoint of epoch {epoch}{_existing(path.parent)}"
        )
    return Location("checkpoint", path)


def _classify(path: Path, reference: str) -> Location:
    if path.is_file():
        if path.name == MANIFEST:
            return Location("checkpoint", path.parent)
        if path.suffix in _FOREIGN_SUFFIXES:
            return Location("file", path)
        raise BadReference(
            f"{reference!r} leads to {path}, which is no checkpoint: give a folder, or a file with "
            f"one of the suffixes {', '.join(sorted(_FOREIGN_SUFFIXES))}"
        )
    if _is_committed(path):
        return Location("checkpoint", path)
    if path.name == CHECKPOINTS and _existing(path):
        return Location("experiment", path.parent)
    if _existing(path / CHECKPOINTS):
        return Location("experiment", path)
    if (path / LEGACY).is_file():
        return Location("file", path / LEGACY)
    raise MissingCheckpoint(
        f"{reference!r} leads to {path}, which holds no committed checkpoint{_nearby(path / 'x')}"
    )


def _path_of_url(reference: str) -> str:
    if "://" not in reference:
        return reference
    url = urlsplit(reference)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise BadReference(
            f"{reference!r} is a URL that cannot be read: copy the checkpoint to a local folder "
            "and give its path"
        )
    return unquote(url.path)


def _is_committed(path: Path) -> bool:
    """Whether a folder holds a commit record: the first one, or where that was lost the second."""
    if (path / MANIFEST).exists():
        return True
    return (path / COPY).exists() and not (path / UNFINISHED).exists()


def _existing(folder: Path) -> str:
    """Describe the committed checkpoints in a folder; empty when there are none."""
    found = {p.parent for name in (MANIFEST, COPY) for p in folder.glob(f"*/{name}")}
    names = sorted(p.name for p in found if Position.parse(p.name) and _is_committed(p))
    return f"; there are {', '.join(names[-5:])}" if names else ""


def _nearby(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        existing = next((p for p in parent.parents if p.is_dir()), None)
        return f"; the nearest folder that exists is {existing}" if existing else ""
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=5, cutoff=0.5) or names[:5]
    return f"; nearby in {parent}: {', '.join(close)}" if close else f"; {parent} is empty"
