"""What the data sets of a run are, in a few words: another start must have the same ones."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from .loader_parts import loaders_in

_ROWS = 8
_VALUES = 64
"""Of an array, so many rows count, and so many values of each."""
_DEPTH = 4

logger = logging.getLogger(__name__)


class Contents:
    """Lengths and contents of the data sets, as far as nothing has to be asked of their code.

    Of a data set count its length, and a few rows of the arrays, tensors and lists of names that
    it holds and that are as long as itself. `__getitem__` is never called: it may be slow, and may
    draw. What changes while the run goes on (a cache, a buffer) says nothing about the next start,
    and is left out.

    Args:
        loaders: returns the loaders by split.
    """

    def __init__(self, loaders: Callable[[], Mapping[str, Any]]) -> None:
        self._loaders = loaders
        self._first: dict[str, str] | None = None

    def steady(self) -> dict[str, str]:
        """Return what it is -> its value, or a digest; only what has not changed in this run."""
        now = dict(self._now())
        if self._first is None:
            self._first = now
        self._first = {what: was for what, was in self._first.items() if now.get(what) == was}
        return dict(self._first)

    def _now(self) -> Iterator[tuple[str, str]]:
        for split, loader in self._loaders().items():
            yield from _of_loader(split, loader)


def is_of_data(what: str) -> bool:
    """Whether an entry of a fingerprint is one of these."""
    return what.startswith((_LENGTH, _CONTENT))


_LENGTH, _CONTENT = "the length of the data set of ", "the content of the data set of "


def _of_loader(name: str, loader: Any) -> Iterator[tuple[str, str]]:
    several = loaders_in(loader)
    for key, one in several.items():
        yield from _of_loader(f"{name}[{key!r}]", one)
    dataset = getattr(loader, "dataset", loader if isinstance(loader, list | tuple) else None)
    if several or dataset is None:
        return
    try:
        found = [_digest(values) for values in _arrays(dataset)]
        length = len(dataset)
    except Exception as error:
        # It is the user's, and may be anything: to know nothing of it is no reason to fail.
        logger.debug("The data set of %r tells nothing of itself: %s", name, error)
        return
    yield f"{_LENGTH}{name!r}", str(length)
    if found := [one for one in found if one]:
        yield f"{_CONTENT}{name!r}", f"#{hashlib.sha256(repr(found).encode()).hexdigest()[:16]}"


def _arrays(dataset: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield what a data set and those inside of it hold that is as long as themselves."""
    if isinstance(dataset, list | tuple):
        yield dataset
        return
    length, held = len(dataset), getattr(dataset, "__dict__", {})
    values = [*held.values(), *held.get("tensors", ())]
    yield from (one for one in values if _length(one) == length)
    inner = [held.get("dataset"), *(held.get("datasets") or ())][:_VALUES]
    for one in inner if depth else ():
        if one is not None and hasattr(one, "__len__"):
            yield from _arrays(one, depth - 1)


def _length(values: Any) -> int | None:
    if isinstance(values, torch.Tensor):
        # Others would have to be waited for.
        is_here = values.device.type == "cpu" and values.layout is torch.strided
        return len(values) if is_here and values.dim() else None
    if isinstance(values, np.ndarray):
        return len(values) if values.ndim and not values.dtype.hasobject else None
    return len(values) if isinstance(values, list | tuple) else None


def _digest(values: Any) -> str:
    """Say what a few rows are; nothing of a list that holds other things than names and numbers."""
    length = len(values)
    places = sorted({place * (length - 1) // max(_ROWS - 1, 1) for place in range(_ROWS)})
    rows = [_row(values[place]) for place in places] if length else []
    return "" if None in rows else repr(rows)


def _row(row: Any) -> str | None:
    if isinstance(row, torch.Tensor):
        is_here = row.device.type == "cpu" and row.layout is torch.strided
        return repr(row.detach().reshape(-1)[:_VALUES].tolist()) if is_here else None
    if isinstance(row, np.ndarray | np.generic):
        return None if row.dtype.hasobject else repr(np.ravel(row)[:_VALUES].tolist())
    if isinstance(row, str | PurePath):
        # The folder may be another one on another machine.
        return str(row).replace("\\", "/").rpartition("/")[2]
    if isinstance(row, list | tuple):
        inside = [_row(one) for one in row[:_VALUES]]
        return None if None in inside else repr(inside)
    return repr(row) if isinstance(row, bool | int | float | bytes) else None
