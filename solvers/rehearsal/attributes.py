"""What hangs on a solver and is in no source: every value that the walk over it finds."""

import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ..discovery.reach import Reached, reachable
from ..discovery.reach_types import is_plain
from ..state.sources import unwrap_source
from .digest import is_generator, leaves

_SET_LATER = (
    *("device", "autocast_dtype", "train_updates_per_epoch", "total_updates", "profiler"),
    *("deadlock_detect", "ema", "best_state", "cfg", "xp"),
)
_WRAPPERS = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
# The walk does not enter these, and nothing can save them.
_ITERATORS = (types.GeneratorType, _BaseDataLoaderIter)
_LOOKED_INTO = ("dataloaders",)


def framework_names(before: Collection[str], after: Collection[str]) -> set[str]:
    """Name the attributes of a solver that belong to the framework.

    Args:
        before: names that a subclass had set before `StandardSolver.__init__` ran.
        after: names that exist when `build_dataloaders` is called.
    """
    return {*after, *_SET_LATER} - {*before} - {*_LOOKED_INTO}


def of_attributes(solver: Any, without: Collection[str], hide: Mapping[str, str]) -> dict[str, str]:
    """Digest every value that can be reached, except for what the registered sources hold.

    Args:
        solver: the solver.
        without: attributes of the framework.
        hide: see `digest.leaves`.
    """
    kept, closed = _registered(solver)
    # What torch's wrapper notes for itself.
    wrappers = {id(vars(one)) for one in vars(solver).values() if isinstance(one, _WRAPPERS)}
    stateless = tuple(solver.stateful.stateless)
    found: dict[str, str] = {}
    for one in reachable(solver, without=without, closed=closed):
        if id(one.value) in kept or (id(one.holder) in wrappers and one.key != "module"):
            continue
        if not is_private_to_torch(one.path):
            found[one.path] = text_of(one, hide)
    for name, value in list(vars(solver).items()):
        if name not in without and isinstance(value, _ITERATORS):
            found[name] = f"iterator {_place_of(value)}"
    inside = tuple(f"{name}{sign}" for name in stateless for sign in ".[")
    return {k: v for k, v in found.items() if k not in stateless and not k.startswith(inside)}


def _place_of(iterator: Any) -> str:
    """Tell how far an iterator is that no state can be asked for."""
    if isinstance(iterator, types.GeneratorType):
        texts = [leaf.text for leaf in leaves(inspect.getgeneratorlocals(iterator), "")]
        line = iterator.gi_frame and iterator.gi_frame.f_lineno
        return f"at line {line} {_joined([type(iterator).__name__, *texts])}"
    return f"after {iterator._num_yielded} batches"


def is_private_to_torch(path: str) -> bool:
    """Whether torch alone looks at a value: such as whether a loader is built already."""
    last = path.rpartition(".")[2]
    return last.startswith("_DataLoader__") or last in ("training", "_iterator", "_made")


def text_of(one: Reached, hide: Mapping[str, str]) -> str:
    """Return kind and value of what was reached; of an object that holds others, its type."""
    value = one.value
    if isinstance(one.holder, types.CellType) and is_plain(value):
        return f"variable {_joined(['', *(leaf.text for leaf in leaves(value, '', hide))])}"
    if isinstance(value, nn.Module):
        return f"module {type(value).__name__}"
    if is_generator(value):
        return f"generator {next(leaves(value, '')).text}"
    if isinstance(value, torch.Tensor | str | int | float | None) or is_plain(value):
        texts = [leaf.text for leaf in leaves(value, "", hide)]
        kind = "tensor" if isinstance(value, torch.Tensor) else "value"
        return f"{kind} {texts[0] if len(texts) == 1 else _joined(texts)}"
    has_state = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    return f"{'stateful' if has_state else 'object'} {type(value).__name__}"


def _joined(texts: list[str]) -> str:
    digest = next(leaves("\n".join(texts[1:]) + " " * 60, "")).text
    return f"{texts[0]} {digest}"


def _registered(solver: Any) -> tuple[set[int], set[int]]:
    """Return the `id` of what sources hold, and of what is not entered since they hold it all."""
    kept: set[int] = set()
    closed: set[int] = set()
    for source in solver.stateful.sources.values():
        live = unwrap_source(source)
        kept.add(id(live))
        if isinstance(live, nn.Module):
            kept |= {id(one) for one in _held(live)}
        elif not isinstance(live, int | float | str | bool | None):
            closed.add(id(live))
    return kept, closed


def _held(module: nn.Module) -> Iterator[Any]:
    yield from module.state_dict(keep_vars=True).values()
    # Gradients are compared by themselves; a module has its own mode.
    yield from (p.grad for p in module.parameters() if p.grad is not None)
