"""Compilation of models in place, as the key `compile` says: names of weights stay plain."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..settings.errors import ConfigError, did_you_mean

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_options(choice: Any) -> dict[str, Any] | None:
    """Return the arguments of `torch.compile` that a value of the key `compile` means.

    Args:
        choice: `True`, or the name of a mode or of a backend. False, None and a section, which is
            one of the user's own, mean that nothing is compiled.

    Returns:
        The arguments; None where nothing is compiled.

    Raises:
        ConfigError: torch knows no mode or backend of that name.
    """
    if choice is True:
        return {}
    if not isinstance(choice, str):
        return None
    if choice in _MODES:
        return {"mode": choice}
    # Not above: the compiler takes a second to import.
    if choice not in torch.compiler.list_backends(()):
        usual = [*_MODES, *torch.compiler.list_backends(), "eager", "aot_eager"]
        raise ConfigError(
            f"compile={choice}: torch.compile has no such mode or backend: "
            f"{did_you_mean(choice, usual)}"
        )
    return {"backend": choice}


def compile_in_place(
    model: nn.Module, options: dict[str, Any], parts: Collection[nn.Module] = ()
) -> None:
    """Compile the forward pass of a model at its first call; compiled modules stay as they are.

    Args:
        model: the model; a module that `torch.compile` returned stays as it is, too.
        options: of `torch.compile`.
        parts: submodules to compile instead of the model as a whole.
    """
    for module in parts or [model]:
        done = getattr(module, "_compiled_call_impl", None) is not None
        if not done and not hasattr(module, "_orig_mod"):
            module.compile(**options)
