"""Loaders of classes derived from torch's `DataLoader`, shared out over ranks."""

import copy
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

_RANKS = re.compile(r"(^|_)(ranks?|world_size|num_replicas|distributed|distrib)($|_)", re.I)
# The classes of torch have such words in them, whatever they are used for.
_OF_TORCH = ("torch.utils.data.", "torchdata.", "builtins", "typing", "abc")


def shared_out(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """Return a copy of a loader that takes the samples of another sampler.

    A constructor may take anything, so none is called. The user's own object stays what it is.
    """
    batches = BatchSampler(sampler, loader.batch_size or 1, loader.drop_last)
    other = copy.copy(loader)
    # A loader refuses to have these set.
    vars(other).update(sampler=sampler, batch_sampler=batches, _iterator=None)
    return other


def iterates_as_torch(kind: type) -> bool:
    """Whether a class takes its batches as torch's `DataLoader` does, from its batch sampler."""
    for name in ("__iter__", "_index_sampler"):
        own = next(vars(base)[name] for base in kind.__mro__ if name in vars(base))
        if own is not vars(DataLoader)[name] and not _calls_super(own):
            return False
    return True


def _calls_super(method: Any) -> bool:
    code = getattr(method, "__code__", None)
    if code is None:
        return False
    return "__class__" in code.co_freevars or "DataLoader" in code.co_names


def knows_ranks(loader: Any) -> bool:
    """Whether a loader, its samplers or its data set say something of ranks.

    An attribute such as `rank` says it; where there is none, the code of the class may.
    """
    names = ("sampler", "batch_sampler", "dataset")
    parts = [loader, *(getattr(loader, name, None) for name in names)]
    parts += [getattr(part, name, None) for part in parts[1:] for name in ("sampler", "dataset")]
    return any(_says_ranks(part) for part in parts if part is not None)


def _says_ranks(part: Any) -> bool:
    held = getattr(part, "__dict__", {})
    said = [value for name, value in held.items() if _RANKS.search(name)]
    if said:
        return any(value is not None for value in said)
    return any(_RANKS.search(name) for name in _names_in_code(type(part)))


def _names_in_code(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        if not f"{base.__module__}.".startswith(_OF_TORCH):
            for member in vars(base).values():
                yield from _names(getattr(member, "__code__", None))


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from (*code.co_names, *code.co_varnames)
        yield from (one for one in code.co_consts if isinstance(one, str) and one.isidentifier())
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _names(inner)
