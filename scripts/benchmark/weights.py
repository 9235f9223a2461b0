"""What it costs to swap weights in and out, to keep the best ones, and to average them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import limits, peers
from .clock import peak_memory
from .peers.base import Setting

Row = dict[str, Any]


def keep(folder: str, name: str, size: str, repeats: int) -> Row:
    """Measure what a framework does with weights; medians of some repeats."""
    peer = peers.kind(name)(Setting(Path(folder), size))
    keeping, model = peer.keeping(), peer.world.model
    tensors = list(model.parameters())
    nbytes = sum(one.nbytes for one in tensors)
    memcpy, lerp = limits.copy_time(nbytes, rounds=repeats), _lerp(tensors, repeats)
    row: Row = {"tensors": len(tensors), "bytes": nbytes, "memcpy_s": memcpy, "lerp_s": lerp}
    for label, swap in (("swap best", keeping.swap_best), ("swap ema", keeping.swap_ema)):
        if swap is not None:
            seconds, memory = _measured(partial(_in_and_out, swap), repeats)
            row[f"{label}_s"] = seconds
            row[f"{label} us / tensor"] = seconds / len(tensors) * 1e6
            row[f"{label} memory / model"] = memory / nbytes
    if keeping.update_best is not None:
        seconds, memory = _measured(keeping.update_best, repeats)
        row |= {"best update / memcpy": seconds / memcpy, "best memory / model": memory / nbytes}
    if keeping.step_ema is not None:
        seconds, memory = _measured(keeping.step_ema, repeats)
        row |= {"ema step / lerp": seconds / lerp, "ema memory / model": memory / nbytes}
    return row


def _in_and_out(swap: Callable[[], AbstractContextManager[Any]]) -> None:
    with torch.no_grad(), swap():
        pass


def _measured(action: Callable[[], Any], repeats: int) -> tuple[float, int]:
    # Of the first time: what was freed since is there for the next ones.
    with peak_memory() as peak:
        action()
    return limits.median_of(action, repeats), peak.bytes


@torch.no_grad()
def _lerp(tensors: list[torch.Tensor], repeats: int) -> float:
    """Seconds of the least that an average needs: one pass over prepared lists."""
    averages, values = [one.detach().clone() for one in tensors], [one.detach() for one in tensors]
    step = partial(torch._foreach_lerp_, averages, values, 0.01)
    step()
    return limits.median_of(step, repeats)
