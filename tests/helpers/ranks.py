"""Several real processes with gloo between them."""

import importlib
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import preload  # noqa: F401  # before the ranks are forked
from torch import distributed

from checkpoint.testing import in_child

PATIENCE = 40
"""Seconds for which a rank waits for the others before it gives up."""

NODES = 2
"""Machines that four ranks are told to be on, two on each; fewer are on one."""


@dataclass(frozen=True)
class Rank:
    """What became of one rank.

    Attributes:
        reports: what it reported, in order.
        status: exit code, or minus the number of the signal that ended it.
        error: traceback of what it raised.
    """

    reports: list[Any]
    status: int
    error: str


def on_ranks(
    count: int, function: Callable[..., None], *arguments: Any, kill_after: float | None = None
) -> list[Rank]:
    """Run `function(report, *arguments)` of a module in `count` processes that know each other.

    Returns what became of each; nothing if they were killed.

    Args:
        count: number of processes; one has no process group.
        function: reports what is to be known through its first argument, as JSON.
        arguments: JSON too; paths become strings.
        kill_after: seconds after which all of them are killed at once.
    """
    arguments_ = [str(a) if isinstance(a, Path) else a for a in arguments]
    name = [function.__module__, function.__qualname__]
    outcome = in_child(_fork, count, name, arguments_, kill_after=kill_after)
    if kill_after is not None and outcome.status == -signal.SIGKILL:
        return []
    assert outcome.status == 0, outcome.error
    return [Rank(**report) for report in outcome.reports]


def good(ranks: list[Rank]) -> list[list[Any]]:
    """Return what the ranks reported; each has to have ended well."""
    for number, rank in enumerate(ranks):
        assert rank.status == 0, f"rank {number} ended with {rank.status}\n{rank.error}"
    return [rank.reports for rank in ranks]


def _fork(
    report: Callable[[Any], None], count: int, function: list[str], arguments: list[Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_start(rank, count, folder, function, arguments) for rank in range(count)]
        for child, reading in pipes:
            with os.fdopen(reading) as pipe:
                lines = [json.loads(line) for line in pipe if line.endswith("}\n")]
            _, status = os.waitpid(child, 0)
            report(
                {
                    "reports": [line["report"] for line in lines if "report" in line],
                    "error": "".join(line.get("error", "") for line in lines),
                    "status": os.waitstatus_to_exitcode(status),
                }
            )


def _start(
    rank: int, count: int, folder: str, function: list[str], arguments: list[Any]
) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    leave, code = os._exit, 1

    def tell(line: dict[str, Any]) -> None:
        os.write(writing, json.dumps(line).encode() + b"\n")

    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
        if count == NODES * 2:
            os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))
        if count > 1:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meeting",
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=PATIENCE),
            )
        module, name = function
        getattr(importlib.import_module(module), name)(
            lambda value: tell({"report": value}), *arguments
        )
        code = 0
    except SystemExit as asked:
        code = int(asked.code or 0)
    except BaseException:
        tell({"error": traceback.format_exc()})
    finally:
        leave(code)


def die() -> None:
    """End this process at once, as when its machine goes down."""
    os.kill(os.getpid(), signal.SIGKILL)
