"""Which objects a walk over a solver enters, and which it takes as plain data."""

import functools
import io
import logging
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable
from datetime import date, time, timedelta
from enum import Enum
from itertools import islice
from numbers import Number
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from flashy.solver import BaseSolver
from omegaconf import Container
from torch.utils.data.dataloader import _BaseDataLoaderIter

GENERATORS = (
    *(torch.Generator, random.Random),
    *(np.random.Generator, np.random.BitGenerator, np.random.RandomState),
)
"""Types of random generators."""

_ATOMS: tuple[type, ...] = (
    *(Number, str, bytes, bytearray, types.NoneType, Enum, PurePath, range, slice),
    *(date, time, timedelta, types.EllipsisType),
    *(np.ndarray, np.generic, np.dtype),
    *(torch.Tensor, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_CONTAINERS = (list, tuple, deque, set, frozenset, dict)
_SHORT = 64
"""Items of a container that are all looked at; of a longer one, some at both ends."""
_DEPTH = 4
"""Containers in containers that are looked into."""

_NEVER: tuple[type, ...] = (
    *(type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.GeneratorType),
    *(logging.Filterer, logging.Formatter, threading.Thread, io.IOBase, BaseException, property),
    # Also of a subclass that is ours, see `reads`.
    *(_BaseDataLoaderIter, Container),
)
# Of the standard library, what holds things of the user's; all else of it is machinery.
_HOLDS = {"argparse", "builtins", "collections", "functools", "random", "types"}
_MACHINERY = set(sys.stdlib_module_names) - _HOLDS | {
    *("checkpoint", "dora", "flashy", "hydra", "omegaconf", "numpy"),
    *("tensorboard", "tensorboardX", "wandb", "mlflow", "neptune", "comet_ml", "matplotlib"),
    *("PIL", "pandas", "polars", "pyarrow", "h5py", "zarr", "fsspec", "boto3", "botocore"),
}
# Hooks of optimizers lead to these. What they hold is in sources of the framework.
_PARTS_OF_A_SOLVER = (
    *("solvers.distributed.", "solvers.health.", "solvers.loop.", "solvers.persistence."),
    *("solvers.run_context", "solvers.state.", "solvers.weights."),
)
_OF_TORCH = (
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torch.amp",
    "torch.cuda.amp",
    "torch.quasirandom",
)


@functools.lru_cache(maxsize=4096)
def sort_of(kind: Any) -> Literal["atom", "generator", "closed", "container", "open"]:
    """Sort objects by their type: data, a generator, machinery, or what is to be entered."""
    if issubclass(kind, GENERATORS):
        return "generator"
    if issubclass(kind, _ATOMS):
        return "atom"
    if is_closed(kind):
        return "closed"
    return "container" if issubclass(kind, _CONTAINERS) else "open"


@functools.lru_cache(maxsize=4096)
def is_closed(kind: Any) -> bool:
    """Whether objects of a type are machinery, which holds nothing that training changes."""
    # A solver walks over itself: a walk that begins elsewhere, such as at a loader whose
    # `collate_fn` is a method, ends there.
    if issubclass(kind, (*_NEVER, BaseSolver)):
        return True
    module = str(kind.__module__)
    root = module.partition(".")[0]
    if root == "torch":
        # A module that a compiler or FSDP makes of one of the user's is a module all the same.
        return not issubclass(kind, torch.nn.Module) and not module.startswith(_OF_TORCH)
    if module.startswith(_PARTS_OF_A_SOLVER):
        return not issubclass(kind, torch.nn.Module)
    return root in _MACHINERY


def is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is data: a number, text, tensor, array, or a container of nothing else.

    Of a long container, some items decide.
    """
    kind: Any = type(value)
    sort = sort_of(kind)
    if sort != "container" or not depth or kind.__dictoffset__:
        return sort == "atom"
    return all(is_plain(one, depth - 1) for one in sampled(value))


def sampled(container: Any) -> Iterable[Any]:
    """Give the items of a short container, and some of a long one; of a dict, its values."""
    items = dict.values(container) if isinstance(container, dict) else container
    if not long(container, _SHORT):
        return items
    ends = islice(items, 16)
    return ends if isinstance(container, set | frozenset) else (*ends, *islice(reversed(items), 16))


def long(container: Any, limit: int) -> bool:
    """Whether a container has more items than a limit."""
    return len(container) > limit
