"""The memory into which tensors are read: live tensors where they fit, else new memory."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ..format.safetensors_header import DTYPE_NAMES, DTYPES
from ..format.tensor_index import Chunk, TensorRecord
from ..io.page_memory import new_memory

_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass
class _TensorPlace:
    """The memory of a live tensor, and all names of the tensor in a source."""

    source: str
    names: list[str]
    tensor: torch.Tensor
    begin: int
    end: int

    def is_same(self, other: "_TensorPlace") -> bool:
        ours, theirs = self.tensor, other.tensor
        same = self.source == other.source and self.begin == other.begin
        return same and ours.dtype == theirs.dtype and ours.shape == theirs.shape


class LiveTensors:
    """Tensors of a running program into which a checkpoint may be read directly.

    Only dense CPU tensors qualify, and only if no other tensor of the state shares their memory.

    Args:
        states: the live state by source, as for a save.

    Attributes:
        touched: sources of which a tensor was overwritten.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self.touched: set[str] = set()
        self._of: dict[str, dict[str, _TensorPlace]] = {}
        places = [place for source, state in states.items() for place in _places(source, state)]
        for place in _without_shared_memory(places):
            self._of.setdefault(place.source, {})[place.names[0]] = place

    def fitting(
        self, source: str, records: Mapping[str, TensorRecord], without: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Return the live tensors into which tensors of a checkpoint can be read.

        Args:
            source: name of the source.
            records: its tensors in the checkpoint, by name.
            without: names of tensors that need memory of their own.
        """
        return {
            name: place.tensor
            for name, place in self._of.get(source, {}).items()
            if name in records
            and name not in without
            and (DTYPE_NAMES[place.tensor.dtype], tuple(place.tensor.shape))
            == (records[name].dtype, records[name].shape)
            # If two names share memory here, but were two tensors in the checkpoint, the caller
            # must compare them.
            and not any(other in records for other in place.names[1:])
        }


class Destinations:
    """The tensors of a source, which are filled chunk by chunk.

    Args:
        source: name of the source.
        records: its tensors in the checkpoint, by name.
        live: tensors into which it may be read, or None.
        without: names of tensors that need memory of their own.

    Attributes:
        tensors: the tensors by name; complete after all chunks are filled and `finish` was called.
    """

    def __init__(
        self,
        source: str,
        records: Mapping[str, TensorRecord],
        live: LiveTensors | None = None,
        without: Collection[str] = (),
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._source, self._records, self._live = source, records, live
        self._fitting = {} if live is None else live.fitting(source, records, without)
        self._aside: list[tuple[torch.Tensor, torch.Tensor]] = []

    def memory(self, name: str, chunk: Chunk) -> torch.Tensor:
        """Return the memory for a chunk: a contiguous tensor of its shape.

        Raises:
            MemoryError: there is not enough memory.
        """
        if name not in self.tensors:
            self.tensors[name] = self._whole(name, self._records[name])
        if self._records[name].is_whole:
            return self.tensors[name]
        sides = zip(chunk.offsets, chunk.shape, strict=True)
        part = self.tensors[name][tuple(slice(at, at + length) for at, length in sides)]
        if part.is_contiguous():
            return part
        aside = new_memory(chunk.shape, part.dtype)
        self._aside.append((part, aside))
        return aside

    def _whole(self, name: str, record: TensorRecord) -> torch.Tensor:
        found = self._fitting.get(name)
        if found is None or self._live is None:
            return new_memory(record.shape, DTYPES[record.dtype])
        self._live.touched.add(self._source)
        # autograd must see the write, although it goes past torch.
        increment_version(found)
        return found.detach()

    def finish(self) -> None:
        """Copy the chunks that were read beside their place, which is not contiguous."""
        for part, aside in self._aside:
            part.copy_(aside)
        self._aside.clear()


def _tensors(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a state with the names that `codec` gives them."""
    if isinstance(value, torch.Tensor):
        yield ".".join(map(str, path)), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))


def _places(source: str, state: Any) -> Iterator[_TensorPlace]:
    named = [(name or source, tensor) for name, tensor in _tensors(state, ())]
    times = Counter(name for name, _ in named)
    for name, tensor in named:
        if times[name] == 1 and _is_plain(tensor):
            begin = tensor.data_ptr()
            yield _TensorPlace(source, [name], tensor, begin, begin + tensor.nbytes)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _KINDS
        and not tensor.is_nested
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.dtype in DTYPE_NAMES
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )


def _without_shared_memory(places: Iterable[_TensorPlace]) -> Iterator[_TensorPlace]:
    """Yield tensors that overlap no other one; equal tensors are one place with several names."""
    group: list[_TensorPlace] = []
    end = 0
    for place in sorted(places, key=lambda one: one.begin):
        if place.begin >= end:
            yield from _alone(group)
            group = []
        group.append(place)
        end = max(end, place.end)
    yield from _alone(group)


def _alone(group: list[_TensorPlace]) -> Iterator[_TensorPlace]:
    if group and all(group[0].is_same(other) for other in group[1:]):
        group[0].names += [name for one in group[1:] for name in one.names]
        yield group[0]
