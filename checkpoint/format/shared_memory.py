"""Tensors that share memory: written once, sharing again when they come back.

Three cases: the same view under two names (tied weights) becomes one tensor with two references;
a view inside a larger tensor becomes a window on it; views that overlap without one that covers the
others become windows on the memory under all of them. Views of one storage that do not overlap are
written apart, since nothing that happens to one is ever seen in the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CorruptCheckpoint
from ..io.page_memory import new_memory
from ..ranks import is_sharded
from .safetensors_header import DTYPE_NAMES, MAX_DIMENSIONS

Reference = dict[str, Any]

_WIDEST = 16  # bytes of an element


@dataclass
class _View:
    key: str
    tensor: torch.Tensor
    reference: Reference

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.start, self.tensor.dtype, self.tensor.shape, self.tensor.stride()

    @property
    def start(self) -> int:
        """First byte in the storage."""
        return int(self.tensor.storage_offset()) * self.tensor.element_size()

    @property
    def end(self) -> int:
        """The byte after the last in the storage."""
        return (
            self.start
            + _extent(self.tensor.shape, self.tensor.stride()) * self.tensor.element_size()
        )


@dataclass
class SharedMemoryMap:
    """Collects the tensors of one source under unique names; `finish` completes the references.

    Attributes:
        tensors: what has to be written, by name; complete after `finish`.
        aliases: further names of whole tensors in `tensors`, name -> name in `tensors`.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    _taken: list[_View] = field(default_factory=list)
    # `__metadata__` is the one name that safetensors keeps for itself.
    _names: set[str] = field(default_factory=lambda: {"__metadata__"})

    def add(self, key: str, tensor: torch.Tensor) -> Reference:
        """Take a tensor in; return the reference to it, for `rebuild`, to be completed later."""
        name, count = key, 2
        while name in self._names:
            name, count = f"{key}#{count}", count + 1
        self._names.add(name)
        taken = _View(name, tensor, {"$tensor": name, **_strides(tensor)})
        self._taken.append(taken)
        return taken.reference

    def finish(self) -> None:
        """Find out what shares memory, and fill `tensors`, `aliases` and the references."""
        by_storage: dict[Any, list[_View]] = {}
        for taken in self._taken:
            by_storage.setdefault(_memory(taken.tensor), []).append(taken)
        for group in by_storage.values():
            if len(group) == 1:
                # Nearly all of them, and with many tensors the rest takes as long as encoding.
                self.tensors[group[0].key] = group[0].tensor
                continue
            for cluster in _overlapping(group):
                self._settle_cluster(cluster)

    def _settle_cluster(self, cluster: list[_View]) -> None:
        distinct: dict[tuple[Any, ...], _View] = {}
        for taken in cluster:
            first = distinct.setdefault(taken.geometry, taken)
            if first is not taken:
                self.aliases[taken.key] = first.key
                taken.reference["$tensor"] = first.key
        if len(distinct) == 1:
            self.tensors[cluster[0].key] = cluster[0].tensor
            return
        base = _covering(list(distinct.values()))
        self.tensors[base.key] = base.tensor
        for taken in cluster:
            if self.aliases.get(taken.key, taken.key) != base.key:
                self.aliases.pop(taken.key, None)
                _point_into(taken, base)


def rebuild(tensor: torch.Tensor, reference: Mapping[str, Any]) -> torch.Tensor:
    """Give back the tensor that a reference describes.

    Raises:
        CorruptCheckpoint: the reference reaches outside the tensor.
        MemoryError: there is not enough for a copy.
    """
    if "window" in reference:
        return _window(tensor, reference["window"])
    if "stride" not in reference:
        return tensor
    stride = reference["stride"]
    # All that torch could refuse is refused here: what it raises then is of the machine.
    if not _is_dense(tensor.shape, stride) or not _are_sizes(stride):
        raise CorruptCheckpoint("a tensor has strides that cannot be")
    return new_memory(tensor.shape, tensor.dtype, stride).copy_(tensor)


def _window(tensor: torch.Tensor, window: Mapping[str, Any]) -> torch.Tensor:
    dtype = vars(torch)[window["dtype"]]
    offset, shape, stride = window["offset"], window["shape"], window["stride"]
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise CorruptCheckpoint(f"a view is of dtype {window['dtype']!r}")
    if not _are_sizes([offset, *shape, *stride]) or 0 in shape or not _can_be(shape):
        raise CorruptCheckpoint("a view has a shape that cannot be")
    if len(shape) != len(stride):
        raise CorruptCheckpoint("a view has a shape and strides that disagree")
    if (offset + _extent(shape, stride)) * dtype.itemsize > tensor.numel() * tensor.element_size():
        raise CorruptCheckpoint("a view reaches outside its tensor")
    view = torch.empty(0, dtype=dtype, device="cpu")
    return view.set_(tensor.untyped_storage(), offset, shape, stride)


def _can_be(shape: Sequence[int]) -> bool:
    # With strides of 0, a few bytes may make more elements than can be counted.
    return len(shape) <= MAX_DIMENSIONS and math.prod(shape) < 2**59


def _are_sizes(numbers: Sequence[Any]) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _memory(tensor: torch.Tensor) -> Any:
    """Give a key that tensors in the same memory have in common."""
    if is_sharded(tensor):
        # Of these only those count that are one and the same.
        local = tensor.to_local()  # type: ignore[attr-defined]
        return _memory(local), local.storage_offset(), tensor.shape, local.stride()
    # Not the address: reading that would make a copy-on-write tensor copy.
    return tensor.untyped_storage()._cdata if tensor.numel() else object()


def _overlapping(group: list[_View]) -> list[list[_View]]:
    clusters: list[list[_View]] = []
    end = -1
    for taken in sorted(group, key=lambda t: (t.start, -t.end)):
        if taken.start < end:
            clusters[-1].append(taken)
        else:
            clusters.append([taken])
        end = max(end, taken.end)
    return clusters


def _covering(views: list[_View]) -> _View:
    start, end = min(v.start for v in views), max(v.end for v in views)
    for view in views:
        whole = view.tensor.is_contiguous() and (view.start, view.end) == (start, end)
        if whole and all((v.start - start) % v.tensor.element_size() == 0 for v in views):
            return view
    # All bytes under them: a tensor of bytes can be the base of any dtype, when it begins where
    # elements of each may begin.
    start -= start % _WIDEST
    under = torch.empty(0, dtype=torch.uint8, device=views[0].tensor.device)
    under.set_(views[0].tensor.untyped_storage(), start, (end - start,), (1,))
    return _View(f"{views[0].key}#memory", under, {})


def _point_into(taken: _View, base: _View) -> None:
    tensor = taken.tensor
    taken.reference.clear()
    taken.reference["$tensor"] = base.key
    taken.reference["window"] = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "offset": (taken.start - base.start) // tensor.element_size(),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last that a view touches, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0


def _strides(tensor: torch.Tensor) -> dict[str, Any]:
    """Record the strides of a dense tensor in another memory format, such as channels_last."""
    if tensor.is_contiguous() or not _is_dense(tensor.shape, tensor.stride()):
        return {}
    return {"stride": list(tensor.stride())}


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a permutation of the dimensions makes the tensor contiguous."""
    if len(shape) != len(stride):
        return False
    wide = sorted((s, n) for n, s in zip(shape, stride, strict=True) if n != 1)
    expected = [math.prod(n for _, n in wide[:i]) for i in range(len(wide))]
    return [s for s, _ in wide] == expected and all(type(s) is int and s >= 0 for s in stride)
