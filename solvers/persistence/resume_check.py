"""What comes next in a run, in a few words: a resumed run must be about to do just that."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..data.contents import is_of_data
from ..state.optimizers import Optimizer, rates_of

Fingerprint = dict[str, str]
"""What it is -> its value, or a digest that begins with `#`; the most telling first."""

_ABSENT = "nothing"


def rate_of(optimizer: str) -> str:
    """Return what a fingerprint calls the learning rates of an optimizer."""
    return f"the learning rate of {optimizer!r}"


def fingerprint(
    step: int,
    optimizers: Mapping[str, Optimizer],
    random_state: Mapping[str, Any],
    generators: Mapping[str, Any],
    upcoming: list[int] | None = None,
    data: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Take it, without drawing from anything.

    Args:
        step: optimizer updates since the start of the run.
        optimizers: by name.
        random_state: the global generators, as `RandomState` captures them.
        generators: states of those of loaders and samplers, by name.
        upcoming: indices of the next batch, where they are known.
        data: what the data sets are, see `Contents`.
    """
    taken = {"the number of updates": str(step), **(data or {})}
    for name, optimizer in optimizers.items():
        taken[rate_of(name)] = ", ".join(map(_rate, rates_of(optimizer)))
    for name, state in random_state.items():
        for device, one in enumerate(state) if name == "cuda" else [(None, state)]:
            shown = name if device is None else f"{name}:{device}"
            taken[f"the generator of {shown}"] = _digest(one)
    for name, state in generators.items():
        taken[f"the generator {name}"] = _digest(state)
    if upcoming is not None:
        taken["the next batch"] = str(upcoming)
    return taken


def _rate(rate: Any) -> str:
    try:
        return f"{float(rate):g}"
    except (TypeError, ValueError, RuntimeError):
        # Optimizers that find their rate by themselves have None, or something of their own.
        return str(_plain(rate))


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say in words what differs, the most telling first.

    Args:
        then: what a checkpoint says.
        now: that of the run that resumes from it.
    """
    found = []
    for what, was in then.items():
        value = now.get(what, _ABSENT)
        # What an epoch makes anew at its beginning is not there yet.
        is_later = what == "the next batch" or what.startswith("the generator self.")
        of_data = is_of_data(what)
        if value != was and not (what not in now and (is_later or of_data)):
            moved = f"{what} is not {'what' if of_data else 'where'} it was"
            found.append(moved if was.startswith("#") else f"{what} was {was}, is {value} now")
    return found


def _digest(state: Any) -> str:
    data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(_plain(state))
    digest = hashlib.sha256(data if isinstance(data, bytes) else data.encode())
    return f"#{digest.hexdigest()[:16]}"


def _plain(state: Any) -> Any:
    # An array of NumPy shows only its ends.
    if isinstance(state, dict):
        return {key: _plain(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(item) for item in state]
    return state.tolist() if hasattr(state, "tolist") else state
