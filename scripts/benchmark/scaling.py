"""How the cost of our checkpoints grows with tensors, bytes, processes, checkpoints and epochs."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpointer, Position, resolve
from checkpoint.integration import Ranks

from .clock import Stopwatch, usage
from .files import is_in_memory
from .peers.base import Setting
from .together import together

Row = dict[str, Any]
State = dict[str, dict[str, torch.Tensor]]


def tensors(folder: str, count: int) -> Row:
    """Save and load so many tensors of 64 bytes."""
    return _saved(Path(folder), {"model": _tensors(count, 64)})


def nbytes(folder: str, size: int) -> Row:
    """Save and load so many bytes, in a hundred tensors."""
    return _saved(Path(folder), {"model": _tensors(100, size // 100)})


def ranks(folder: str, count: int, size: int) -> Row:
    """Save and load the same bytes, which all of some processes have, together."""
    return together(count, _rank, folder, size)


def checkpoints(folder: str, count: int) -> Row:
    """List, plan and resolve among so many checkpoints, then save one more and flush."""
    state = {"model": _tensors(2, 64)}
    root = Path(folder) / "xps" / "bench"
    with closing(Checkpointer(root, save_every=1)) as filling:
        for epoch in range(1, count + 1):
            filling.save(state, epoch=epoch)
    # As a run sees it that starts now, and then as one that goes on.
    with closing(Checkpointer(root, save_every=1)) as opened:
        listing = _seconds(opened.positions)
        planning = _seconds(opened.plan)
        again = _seconds(opened.plan)
        resolving = _seconds(lambda: resolve("//sig/bench", xps=root.parent))
        saving = _seconds(lambda: (opened.save(state, epoch=count + 1), opened.flush()))
        loading = _seconds(lambda: opened.load(Position(count + 1)))
    return {
        "list_s": listing,
        "plan_s": planning,
        "plan again_s": again,
        "resolve_s": resolving,
        "save_s": saving,
        "restore_s": loading,
    }


def history(folder: str, epochs: int) -> Row:
    """Commit an epoch of a solver that has so many behind it."""
    from .peers.ours import OursSync

    place = Path(folder)
    in_memory = is_in_memory(place)
    peer = OursSync(Setting(place, "tiny"))
    past = [_metrics(epoch) for epoch in range(1, epochs + 3)]
    peer.solver.history.extend(past[:-2])
    # The first two have nothing to link to.
    for metrics in past[-2:]:
        peer.solver._pending_metrics = metrics
        peer.save()
    peer.world.change()
    peer.solver._pending_metrics = _metrics(epochs + 3)
    before, watch = usage(in_memory), Stopwatch()
    peer.save()
    peer.settle()
    row = {"save_s": watch.seconds, "written": (usage(in_memory) - before).written}
    row["restore_s"] = _seconds(peer.restore)
    peer.close()
    return row


def _metrics(epoch: int) -> dict[str, Any]:
    return {stage: {"loss": 1 / epoch, "duration": 1.5} for stage in ("train", "valid")}


def _saved(folder: Path, state: State, group: Ranks | None = None) -> Row:
    options = {} if group is None else {"ranks": group}
    with closing(Checkpointer(folder, **options)) as checkpointer:
        checkpointer.save(state, epoch=1)
        for one in state["model"].values():
            one.add_(1)
        saving = _seconds(lambda: checkpointer.save(state, epoch=2))
        restoring = _seconds(checkpointer.load_newest)
    return {"save_s": saving, "restore_s": restoring}


def _rank(folder: str, size: int) -> Row:
    return _saved(Path(folder), {"model": _tensors(100, size // 100)}, Ranks.here())


def _tensors(count: int, size: int) -> dict[str, torch.Tensor]:
    return {f"block.{index}.weight": torch.rand(size // 4) for index in range(count)}


def _seconds(action: Callable[[], Any]) -> float:
    watch = Stopwatch()
    action()
    return watch.seconds
