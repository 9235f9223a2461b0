"""A run in a world that fails for a while: what each epoch came to, and what is left of it."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign import Telling, Way, restored
from faults import OPTIONS, restart
from mounts import command
from ranks import on_ranks

from checkpoint import Checkpointer, CheckpointError
from checkpoint.integration import Ranks
from checkpoint.testing import in_child

Report = Callable[[Any], None]


@dataclass(frozen=True)
class Lived:
    """What became of a run.

    Attributes:
        saved: epochs that were acknowledged, in order.
        told: errors and warnings, in order.
        restored: number of the epoch that it went on from.
    """

    saved: list[int]
    told: list[str]
    restored: int


def run(
    folder: Path,
    way: Way,
    last: int,
    *,
    on_error: str = "stop",
    user: int = 0,
    events: dict[int, list[Any]] | None = None,
) -> Lived:
    """Restore and go on to the `last` epoch, in processes of their own.

    Args:
        folder: of the experiment.
        way: how saves are made.
        last: number of the last epoch.
        on_error: of the Checkpointer.
        user: number of the user who runs it.
        events: commands that the first rank runs before the save of an epoch.
    """
    commands = {epoch: list(map(str, words)) for epoch, words in (events or {}).items()}
    arguments = (folder, last, way.background, on_error, user, commands)
    if way.ranks == 1:
        one = in_child(live, *arguments)
        outcomes = [(one.reports, one.status, one.error)]
    else:
        ranks = on_ranks(way.ranks, live, *arguments)
        outcomes = [(one.reports, one.status, one.error) for one in ranks]
    for _, status, error in outcomes:
        assert status == 0, error
    told = [text for reports, _, _ in outcomes for name, text in reports if name == "told"]
    first = outcomes[0][0]
    return Lived(
        [epoch for name, epoch in first if name == "saved"],
        told,
        next((epoch for name, epoch in first if name == "restored"), 0),
    )


def live(
    report: Report,
    folder: str,
    last: int,
    background: bool,
    on_error: Any,
    user: int,
    events: dict[str, Any],
) -> None:
    """Do so in this process; report what was acknowledged and what was told."""
    if user:
        os.seteuid(user)
    ranks = Ranks.here()
    logging.getLogger("checkpoint").addHandler(Telling(lambda text: report(["told", text])))
    checkpointer = Checkpointer(
        folder, ranks=ranks, background=background, on_error=on_error, **OPTIONS
    )

    def before(epoch: int, done: int) -> None:
        if str(epoch) in events and ranks.is_first:
            command(*events[str(epoch)])

    try:
        restart(report, checkpointer, last, before=before)
    except CheckpointError as error:
        report(["told", str(error)])


def nothing_is_lost(folder: Path, acknowledged: int) -> int:
    """Restore, which must give the newest acknowledged epoch or the one after it; return which."""
    found, epoch = restored(folder, acknowledged)
    assert not found, f"epoch {epoch} restores, {acknowledged} was acknowledged: {found}"
    return epoch
