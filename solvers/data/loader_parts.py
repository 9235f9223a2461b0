"""What a data loader is made of, and the state of each part."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..discovery.generators import generator_state, is_generator, set_generator_state
from ..state.rng import preserved_rng
from .combined import Combined
from .epoch_sampler import EpochSampler
from .worker_signals import begin

_DEPTH = 4
"""How many data sets inside of each other are looked into."""
_WIDTH = 64
"""Longest list of data sets, such as that of a `ConcatDataset`, that is looked into; also how many
items of a list are asked whether they are loaders."""

# Of a part: the state that was loaded, and what the part said of itself right after that. A stream
# of Hugging Face says where it is going to begin only after it began.
_loaded: "WeakKeyDictionary[Any, tuple[Any, Any]]" = WeakKeyDictionary()


def loaders_in(value: Any) -> dict[Any, Any]:
    """Return the loaders that a list, tuple, dict or `Combined` holds; none of a loader.

    A list that begins with many batches is a list of batches: the rest is not looked at.
    """
    if isinstance(value, Combined):
        value = value.loaders
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = islice(enumerate(value), _WIDTH)
    return {
        key: one
        for key, one in items
        if isinstance(one, DataLoader) or is_source(one) or loaders_in(one)
    }


def parts_of(loader: Any) -> dict[str, Any]:
    """Return a loader and what it is made of, by name; of a list or dict, those of each loader."""
    parts = {"loader": loader}
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, name, None)
        if part is not None:
            parts[name] = part
    # A batch sampler of the user's own hides the sampler that shuffles.
    inner = getattr(parts.get("batch_sampler"), "sampler", None)
    if inner is not None and inner is not parts.get("sampler"):
        parts["batch_sampler.sampler"] = inner
    if "dataset" in parts:
        parts |= _inside("dataset", parts["dataset"])
    for key, one in loaders_in(loader).items():
        parts |= {f"{key}.{name}": part for name, part in parts_of(one).items()}
    return parts


def _inside(name: str, dataset: Any, depth: int = _DEPTH) -> dict[str, Any]:
    """Return the data sets inside of another one."""
    found: dict[str, Any] = {}
    inner = getattr(dataset, "dataset", None)
    if inner is not None:
        found[f"{name}.dataset"] = inner
    several = getattr(dataset, "datasets", None)
    if isinstance(several, list | tuple) and len(several) <= _WIDTH:
        found |= {f"{name}.datasets.{place}": one for place, one in enumerate(several)}
    if depth > 1:
        for inside, one in list(found.items()):
            found |= _inside(inside, one, depth - 1)
    return found


def is_source(part: Any) -> bool:
    """Whether a part has a state of its own, which it tells and takes without arguments."""
    if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
        return False
    # Some want to be told how far they are, such as the streams of mosaicml and litdata.
    code = getattr(getattr(part.state_dict, "__func__", None), "__code__", None)
    if code is None:
        return True
    wanted = code.co_argcount - len(part.state_dict.__func__.__defaults__ or ()) - 1
    without_default = set(code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])
    without_default -= set(part.state_dict.__func__.__kwdefaults__ or {})
    return wanted <= 0 and not without_default


def moved_by_a_pass(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts with a state that a pass over the loader moves: samplers and streams.

    If the loader has a state itself, it knows where they are, and there are none. The state of an
    `EpochSampler` is where the next pass begins: a pass does not move it.
    """
    if is_source(parts["loader"]):
        return {}
    return {
        name: part
        for name, part in parts.items()
        if is_source(part)
        and (name.endswith("sampler") or isinstance(part, IterableDataset))
        and not isinstance(part, EpochSampler)
    }


def generators_of(part: Any) -> dict[str, Any]:
    """Return the generators that a part holds as attributes; `generator` may also be computed."""
    held = {"generator": getattr(part, "generator", None), **getattr(part, "__dict__", {})}
    return {name: value for name, value in held.items() if is_generator(value)}


def capture(part: Any) -> dict[str, Any]:
    """Return the state of a part: its generators, its own state, and whether it has workers."""
    captured: dict[str, Any] = {}
    if generators := generators_of(part):
        captured["generators"] = {name: generator_state(one) for name, one in generators.items()}
    if is_source(part):
        captured |= _state(part)
    if getattr(part, "persistent_workers", False):
        captured["has_workers"] = part._iterator is not None
    return captured


def _state(part: Any) -> dict[str, Any]:
    loaded = _get_loaded(part)
    # To tell the state of a pass that has not begun, torchdata's loader would begin it: it would
    # start workers, and these would not know what is said to the data set before the pass.
    if getattr(part, "_initial_iter_for_state_dict", None) is False and part._iterator is None:
        return {} if loaded is None else {"state": loaded[0]}
    with preserved_rng():
        state = part.state_dict()
    if loaded is None:
        return {"state": state}
    if same(state, loaded[1]):
        return {"state": loaded[0]}
    _loaded.pop(part, None)
    return {"state": state}


def _get_loaded(part: Any) -> tuple[Any, Any] | None:
    try:
        return _loaded.get(part)
    except TypeError:
        return None


def load(part: Any, state: Any) -> None:
    """Load the state of a part, and remember it until the part has moved."""
    part.load_state_dict(state)
    shown = None
    if not hasattr(part, "_initial_iter_for_state_dict"):
        with preserved_rng():
            shown = part.state_dict()
    try:
        _loaded.pop(part, None)
        if not same(state, shown):
            _loaded[part] = (state, shown)
    except TypeError:
        return


def restore(part: Any, captured: Mapping[str, Any], with_state: bool = True) -> None:
    """Put a part back where it was.

    Args:
        part: the part.
        captured: what `capture` said.
        with_state: also load its own state.
    """
    kept = captured.get("generators", {})
    for name, value in generators_of(part).items():
        if name in kept:
            set_generator_state(value, kept[name], repr(name))
    if with_state and "state" in captured and is_source(part):
        load(part, captured["state"])
    if getattr(part, "persistent_workers", False):
        _restore_workers(part, captured.get("has_workers", False))


def _restore_workers(loader: Any, had_workers: bool) -> None:
    # Starting workers draws from the generators: whether the next pass does has to be the same.
    if not had_workers:
        loader._iterator = None
    elif loader._iterator is None:
        with preserved_rng():
            begin(loader)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, in all tensors and arrays too."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and bool(one == other)
