"""Where a module holds the tensors of its state dict, found faster than by asking for that dict."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..distributed.wrappers import is_wrapper, plain_state, unwrapped

_SAVES = ("state_dict", "_save_to_state_dict", "get_extra_state")
_LOADS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
"""Methods that customise how a module saves and loads its `state_dict()`."""


Places = list[tuple[dict[str, Any], dict[str, Any]]]
"""Dicts that hold tensors of a module, each with a copy of it."""


class ModuleTensors(NamedTuple):
    """The live tensors of a module.

    Attributes:
        slots: by plain key of the state dict; a tensor that is tied has several.
        places: each dict that holds some of them, and a copy of it without buffers that are not
            persistent: these are caches, which may well grow with the code around them.
        loaders: modules whose own code takes part in loading; without any, values are copied key
            by key.
    """

    slots: dict[str, torch.Tensor]
    places: Places
    loaders: list[nn.Module]


def module_tensors(target: Any) -> ModuleTensors | None:
    """Return the live tensors of a module; None of what is none, or keeps more than tensors."""
    target = unwrapped(target)
    if not isinstance(target, nn.Module):
        return None
    found = ModuleTensors({}, [], [])
    return found if _walk(target, "", found) else _asked(target)


def live_tensors(module: nn.Module) -> dict[str, Any]:
    """Return what a module has in its state dict, by plain keys; its tensors are the live ones."""
    found = module_tensors(module)
    return plain_state(module, keep_vars=True) if found is None else found.slots


def loads_as_torch_does(module: nn.Module) -> bool:
    """Whether only code of torch loads a state into a module: it then copies values, key by key."""
    return not any(map(_has_loader, module.modules()))


def _has_loader(module: nn.Module) -> bool:
    kind: Any = type(module)
    return not (
        _loads_plainly(kind)
        and vars(module).keys().isdisjoint(_LOADS)
        and all(map(is_of_torch, module._load_state_dict_pre_hooks.values()))
        and all(map(is_of_torch, module._load_state_dict_post_hooks.values()))
    )


@lru_cache(maxsize=1024)
def _loads_plainly(kind: Any) -> bool:
    if is_wrapper(kind):
        return True
    return all(is_of_torch(getattr(kind, name)) for name in _LOADS)


def is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether a function, or a hook, is code of torch."""
    return str(getattr(function, "__module__", "")).startswith("torch.")


def _walk(module: nn.Module, prefix: str, found: ModuleTensors) -> bool:
    """Add what a module and those in it hold; return whether their state dicts are just that."""
    kind: Any = type(module)
    parameters, buffers = module._parameters, module._buffers
    if (
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or not _is_plain(kind)
        or not vars(module).keys().isdisjoint(_SAVES)
        # Those of a compiled script are none.
        or type(parameters) is not dict
    ):
        return False
    slots, places, loaders = found
    if (
        not _loads_plainly(kind)
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not vars(module).keys().isdisjoint(_LOADS)
    ) and _has_loader(module):
        loaders.append(module)
    if parameters:
        places.append((parameters, parameters.copy()))
        for name, parameter in parameters.items():
            if parameter is not None:
                slots[prefix + name] = parameter
    if buffers:
        kept = persistent(module)
        places.append((buffers, kept))
        for name, buffer in kept.items():
            if buffer is not None:
                slots[prefix + name] = buffer
    for name, one in module._modules.items():
        if one is not None and not _walk(one, f"{prefix}{name}.", found):
            return False
    return True


def persistent(module: nn.Module) -> dict[str, Any]:
    """Return the buffers of a module itself that are in its state dict, by name."""
    caches = module._non_persistent_buffers_set
    return {name: one for name, one in module._buffers.items() if name not in caches}


@lru_cache(maxsize=1024)
def _is_plain(kind: Any) -> bool:
    # Names of wrappers are taken off the state dict, which is asked for then.
    saves = (getattr(kind, name) is getattr(nn.Module, name) for name in _SAVES)
    return not is_wrapper(kind) and all(saves)


def places_of(module: nn.Module) -> Places:
    """Return each dict that holds tensors of a module's state, and a copy.

    See `ModuleTensors.places`.
    """
    places: Places = []
    for one in unwrapped(module).modules():
        # A compiled script has other ones, and nothing can be put into these.
        if type(one._parameters) is dict:
            places.append((one._parameters, dict(one._parameters)))
            places.append((one._buffers, persistent(one)))
    return places


def _asked(module: nn.Module) -> ModuleTensors | None:
    """Ask for the state dict, which runs hooks; None when it is not just the tensors held."""
    slots: dict[str, torch.Tensor] = dict(plain_state(module, keep_vars=True))
    places = places_of(module)
    own = {id(tensor) for _, kept in places for tensor in kept.values() if tensor is not None}
    plain = all(isinstance(one, torch.Tensor) and id(one) in own for one in slots.values())
    loaders = [one for one in module.modules() if _has_loader(one)]
    return ModuleTensors(slots, places, loaders) if plain else None
