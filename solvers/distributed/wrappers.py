"""Modules that wrap another one, such as those of `torch.compile` and DDP: saved names lack them.

A wrapper is known by its type, so that a model may have a submodule called `module`. The names of a
file that other code wrote are matched by text, and only where the plain names do not fit.
"""

import copy
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_CHECKPOINTED = "_checkpoint_wrapped_module"
"""Name of torch's wrapper for activation checkpointing, whose state dict lacks it already."""
_SEGMENTS = frozenset({"_orig_mod", "module", _CHECKPOINTED})
"""Names under which wrappers hold the module inside."""

_PREFIXES = ("_orig_mod.", "module.")

Paths = Mapping[str, str]
"""Paths of modules in one naming, by those in the other one."""


def unwrapped(value: Any) -> Any:
    """Return the module inside of all wrappers; anything else as it is."""
    while isinstance(value, nn.Module) and (name := _inner_name(value)):
        value = value._modules[name]
    return value


def layers(value: Any) -> Iterator[Any]:
    """Yield a value, and the modules that it wraps, outermost first."""
    yield value
    while isinstance(value, nn.Module) and (name := _inner_name(value)):
        value = value._modules[name]
        yield value


def compilable(model: nn.Module) -> nn.Module:
    """Return the model inside of DDP, which is what to compile; one that is compiled as it is."""
    while _inner_name(model) == "module":
        model = cast(nn.Module, model._modules["module"])
    return model


def _inner_name(module: nn.Module) -> str | None:
    kind: Any = type(module)
    return _inner(kind)


@lru_cache(maxsize=1024)
def _inner(kind: Any) -> str | None:
    """Name the attribute in which a class of wrappers holds the module inside."""
    if issubclass(kind, DataParallel | DistributedDataParallel):
        return "module"
    # Without this module nothing was compiled; its import takes seconds.
    compiling = sys.modules.get("torch._dynamo.eval_frame")
    if compiling is not None and issubclass(kind, compiling.OptimizedModule):
        return "_orig_mod"
    return None


def is_wrapper(kind: Any) -> bool:
    """Whether modules of a class only wrap another one."""
    return _inner(kind) is not None


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module, and itself, once each, by their plain paths."""
    paths = _paths(unwrapped(module))
    for path, one in unwrapped(module).named_modules():
        yield _saved(paths[path]), one


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module, once each, by their plain names."""
    module = unwrapped(module)
    found = dict(module.named_parameters())
    paths = _paths(module) if _may_be_wrapped(found) else None
    for name, parameter in found.items():
        yield _saved(name if paths is None else _renamed(name, paths)), parameter


def _saved(name: str) -> str:
    """Leave out of a path what a state dict never has."""
    if _CHECKPOINTED not in name:
        return name
    return ".".join(one for one in name.split(".") if one != _CHECKPOINTED)


def plain_state(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Return the state dict of a module with plain names, whatever wraps it or modules in it."""
    module = unwrapped(module)
    state: dict[str, Any] = module.state_dict(keep_vars=keep_vars)
    if not isinstance(state, dict) or not _may_be_wrapped(state):
        return state
    paths = _paths(module)
    return state if _are_same(paths) else _with_names(state, paths)


def state_as_held(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state with plain names as `load_state_dict` of the module expects it."""
    paths = _paths(unwrapped(module))
    if _are_same(paths):
        return state
    # Of a wrapper and the module inside it, the latter comes later and counts.
    return _with_names(state, {plain: wrapped for wrapped, plain in paths.items()})


def without_foreign_prefixes(state: Mapping[str, Any], ours: Collection[str]) -> Mapping[str, Any]:
    """Return a state whose names are plain, as far as wrappers are all that keeps them from it.

    Args:
        state: of a file, by any names.
        ours: plain names of what is to take it.
    """
    names = matched(state, ours)
    if not names:
        return state
    # Of modules without tensors of their own, no version is kept.
    owners = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    found = {names.get(key, key): value for key, value in state.items()}
    versions = getattr(state, "_metadata", {})
    return with_versions(found, versions={owners.get(k, k): v for k, v in versions.items()})


def matched(theirs: Collection[str], ours: Collection[str]) -> dict[str, str]:
    """Give new names to those that differ from ours by the prefixes of wrappers alone.

    Args:
        theirs: names in a file.
        ours: plain names.
    """
    names = {one: one for one in theirs if isinstance(one, str)}
    if not any(_SEGMENTS.intersection(one.split(".")) for one in names if one not in ours):
        return {}
    for prefix in (*_PREFIXES, *_PREFIXES):
        if all(one.startswith(prefix) for one in names.values()) and not any(
            one.startswith(prefix) for one in ours
        ):
            # Names that a hook of the module changes afterwards have it, too.
            names = {old: new.removeprefix(prefix) for old, new in names.items()}
    free: dict[str, list[str]] = {}
    for one in set(ours) - set(names.values()):
        free.setdefault(_short(one), []).append(one)
    for old, new in names.items():
        if new not in ours and len(found := free.get(_short(new), [])) == 1:
            names[old] = found[0]
    changed = {old: new for old, new in names.items() if old != new}
    return changed if len(set(names.values())) == len(names) else {}


def _short(name: str) -> str:
    return ".".join(one for one in name.split(".") if one not in _SEGMENTS)


def _may_be_wrapped(names: Collection[Any]) -> bool:
    """Whether names hold one of a wrapper; much faster than to look at each module."""
    text = "\n".join(map(str, names))
    return "_orig_mod." in text or "module." in text


def _paths(module: nn.Module, wrapped: str = "", plain: str = "") -> dict[str, str]:
    """Give the plain path of each module in a module, itself under the empty path."""
    found = {wrapped: plain}
    inner = _inner_name(module)
    for name, one in module._modules.items():
        if one is not None:
            below = plain if name == inner else _joined(plain, name)
            found.update(_paths(one, _joined(wrapped, name), below))
    return found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _are_same(paths: Paths) -> bool:
    return all(one == other for one, other in paths.items())


def _renamed(name: str, paths: Paths) -> str:
    """Put the path of the module that holds a value in the place of the one that its name has."""
    owner = name
    while owner not in paths:
        owner = owner.rpartition(".")[0]
    return _joined(paths[owner], name[len(owner) :].removeprefix("."))


def _with_names(state: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    versions = getattr(state, "_metadata", None)
    renamed = {_renamed(key, paths): value for key, value in state.items()}
    if versions is None:
        return renamed
    return with_versions(renamed, versions={_renamed(k, paths): v for k, v in versions.items()})


def with_versions(
    state: dict[str, Any], of: Any = None, *, versions: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a state with the versions of modules that torch keeps beside another one, if any.

    Args:
        state: without versions.
        of: the state whose versions these are to be.
        versions: the versions themselves, instead of `of`.
    """
    versions = getattr(of, "_metadata", None) if versions is None else versions
    if versions is None:
        return state
    found = OrderedDict(state)
    found._metadata = OrderedDict(copy.deepcopy(dict(versions)))  # type: ignore[attr-defined]
    return found
