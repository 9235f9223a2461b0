"""What comes next in a run, in a few words: a resumed run must be about to do just that."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch

from .knobs import KNOBS

Fingerprint = dict[str, str]
"""What it is -> its value, or a digest that begins with `#`; the most telling first."""

_TRAINS_THE_SAME = (
    *("checkpoint.*", "evaluate.*", "generate.*", "dora.*", "slurm.*", "hydra.*", "seed"),
    *("continue_from", "execute_only", "execute_inplace", "show", "label", "fast_dev_run"),
)
_ABSENT = "nothing"


def fingerprint(
    step: int,
    optimizers: Mapping[str, torch.optim.Optimizer],
    random_state: Mapping[str, Any],
    generators: Mapping[str, Any],
    upcoming: list[int] | None = None,
) -> Fingerprint:
    """Take it, without drawing from anything.

    Args:
        step: optimizer updates since the start of the run.
        optimizers: by name.
        random_state: the global generators, as `RandomState` captures them.
        generators: states of those of loaders and samplers, by name.
        upcoming: indices of the next batch, where they are known.
    """
    taken = {"the number of updates": str(step)}
    for name, optimizer in optimizers.items():
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        taken[f"the learning rate of {name!r}"] = ", ".join(f"{rate:g}" for rate in rates)
    for name, state in random_state.items():
        for device, one in enumerate(state) if name == "cuda" else [(None, state)]:
            shown = name if device is None else f"{name}:{device}"
            taken[f"the generator of {shown}"] = _digest(one)
    for name, state in generators.items():
        taken[f"the generator {name}"] = _digest(state)
    if upcoming is not None:
        taken["the next batch"] = str(upcoming)
    return taken


def first_difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say in words what differs first; None when nothing does.

    Args:
        then: what a checkpoint says.
        now: that of the run that resumes from it.
    """
    for what, was in then.items():
        value = now.get(what, _ABSENT)
        if value != was and not (what == "the next batch" and what not in now):
            moved = f"{what} is not where it was"
            return moved if was.startswith("#") else f"{what} was {was}, is {value} now"
    return None


def changed_settings(then: Any, now: Any, excluded: Collection[str]) -> list[str]:
    """Say which keys of the configuration have another value, of those that change training.

    Args:
        then: the configuration that a checkpoint holds, plain and nested.
        now: that of the run that resumes from it.
        excluded: patterns of keys that do not count, as in `dora.exclude`.
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    patterns = (*excluded, *_TRAINS_THE_SAME)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        was, value = (side.get(key, _default(key)) for side in (before, after))
        if was != value and not any(fnmatch(key, pattern) for pattern in patterns):
            changes.append(f"{key} was {was}, is {value} now")
    return changes


def _default(key: str) -> Any:
    return KNOBS[key].default if key in KNOBS else _ABSENT


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
