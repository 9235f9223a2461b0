"""Where a module holds the tensors of its state dict, found faster than by asking for that dict."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

_SAYS = frozenset({"state_dict", "_save_to_state_dict", "get_extra_state"})
"""What of a module decides what its state dict is."""


class Held(NamedTuple):
    """The live tensors of a module.

    Attributes:
        slots: by key of the state dict; a tensor that is tied has several.
        places: each dict that holds some of them, and a copy of it without buffers that are not
            persistent: these are caches, which may well grow with the code around them.
    """

    slots: dict[str, torch.Tensor]
    places: list[tuple[dict[str, Any], dict[str, Any]]]


def held(target: Any) -> Held | None:
    """Return the live tensors of a module; None of what is none, or keeps more than tensors."""
    if not isinstance(target, nn.Module):
        return None
    found = Held({}, [])
    return found if _walk(target, "", found) else _asked(target)


def _walk(module: nn.Module, prefix: str, found: Held) -> bool:
    """Add what a module and those in it hold; return whether their state dicts are just that."""
    kind: Any = type(module)
    parameters, buffers = module._parameters, module._buffers
    if (
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or not _is_plain(kind)
        or not _SAYS.isdisjoint(vars(module))
        # Those of a compiled script are none.
        or type(parameters) is not dict
    ):
        return False
    slots, places = found
    if parameters:
        places.append((parameters, parameters.copy()))
        for name, parameter in parameters.items():
            if parameter is not None:
                slots[prefix + name] = parameter
    if buffers:
        kept = _persistent(module)
        places.append((buffers, kept))
        for name, buffer in kept.items():
            if buffer is not None:
                slots[prefix + name] = buffer
    for name, one in module._modules.items():
        if one is not None and not _walk(one, f"{prefix}{name}.", found):
            return False
    return True


def _persistent(module: nn.Module) -> dict[str, Any]:
    caches = module._non_persistent_buffers_set
    return {name: one for name, one in module._buffers.items() if name not in caches}


@lru_cache(maxsize=1024)
def _is_plain(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in _SAYS)


def _asked(module: nn.Module) -> Held | None:
    """Ask for the state dict, which runs hooks; None when it is not just the tensors held."""
    slots: dict[str, torch.Tensor] = dict(module.state_dict(keep_vars=True))
    places: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for one in module.modules():
        places.append((one._parameters, dict(one._parameters)))
        places.append((one._buffers, _persistent(one)))
    own = {id(tensor) for _, kept in places for tensor in kept.values() if tensor is not None}
    plain = all(isinstance(one, torch.Tensor) and id(one) in own for one in slots.values())
    return Held(slots, places) if plain else None
