"""Several processes that do the same at the same time, with gloo between them."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


def together(count: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in this process and in forks of it, `count` in all; return what this one got.

    With one, nothing is forked and there is no process group. The others are children of this
    process, so that `clock.usage` counts them.

    Raises:
        RuntimeError: another one failed.
    """
    if count == 1:
        return function(*arguments)
    with tempfile.TemporaryDirectory() as place:
        children = [_forked(place, rank, count, function, arguments) for rank in range(1, count)]
        _meet(place, 0, count)
        result = function(*arguments)
        statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"processes beside this one ended with {statuses}: see above")
    return result


def _forked(place: str, rank: int, count: int, function: Callable[..., Any], arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        _meet(place, rank, count)
        function(*arguments)
        code = 0
    finally:
        # Otherwise this fork would go on as what forked it.
        os._exit(code)


def _meet(place: str, rank: int, count: int) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{place}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(minutes=10),
    )
