"""Audiocraft's `utils/checkpoint` over our format, for solvers that read another's state.

A checkpoint here is a folder of ours; `checkpoint.th` files that Audiocraft or flashy wrote are
read too, without running anything in them. The state comes back as those solvers expect it: a dict
of sources, with `xp.cfg` as a DictConfig that may be assigned to.
"""

import logging
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from dora.xp import get_xp, is_xp
from omegaconf import OmegaConf

from checkpoint import Checkpointer, MissingCheckpoint, Position, read_foreign, resolve
from checkpoint import load_checkpoint as load_folder
from checkpoint import save_checkpoint as save_folder

from .experiment.lookup import plain_config

logger = logging.getLogger(__name__)

_CHECKPOINTS = "checkpoints"
_SHARD = re.compile(r"\.th\.\d+$")


class CheckpointSource(Enum):
    """Where a state comes from."""

    CURRENT_XP = "current_xp"
    PRETRAINED = "pretrained"
    OTHER = "other"


def checkpoint_name(
    name: str | None = None, rank: int | None = None, use_fsdp: bool = False
) -> str:
    """Path of a checkpoint inside an experiment's folder.

    Args:
        name: an epoch, for the checkpoint at its end; another name, for one of the user's own; None
            for the folder of all, in which the newest counts.
        rank: all ranks have the same folder.
        use_fsdp: sharded or not, it is the same folder.
    """
    if name is None:
        return _CHECKPOINTS
    return f"{_CHECKPOINTS}/{Position(int(name)).name if name.isdecimal() else name}"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is one rank's part of a checkpoint that Audiocraft sharded.

    A folder of ours is a whole checkpoint, whatever number of ranks wrote it.
    """
    return _SHARD.search(path.name) is not None


def resolve_checkpoint_path(
    sig_or_path: Path | str, name: str | None = None, use_fsdp: bool = False
) -> Path | None:
    """Find the checkpoint that a signature or path leads to; None when there is none.

    Args:
        sig_or_path: `//sig/<sig>`, an experiment's folder, a checkpoint, or a file.
        name: see `checkpoint_name`, in an experiment's folder.
        use_fsdp: sharded or not, it is the same folder.

    Raises:
        BadReference: it cannot be a reference.
    """
    try:
        location = resolve(str(sig_or_path), xps=_experiments())
    except MissingCheckpoint as error:
        logger.info("%s", error)
        return None
    path = location.path
    if name is None or location.kind == "checkpoint" or Path(sig_or_path).is_file():
        return path
    if location.kind == "file":
        # The folder is one that Audiocraft wrote.
        path = path.with_name(f"{path.stem}_{name}{path.suffix}")
        return path if path.is_file() else None
    path = path / checkpoint_name(name)
    return path if (path / "manifest.json").is_file() else None


def load_checkpoint(checkpoint_path: Path | str, is_sharded: bool = False) -> dict[str, Any]:
    """Load all sources of a checkpoint, as Audiocraft's solvers read them.

    Args:
        checkpoint_path: what `resolve_checkpoint_path` gave; in an experiment's folder, the newest
            good checkpoint counts.
        is_sharded: sharded or not, it is the same folder.

    Returns:
        The state of each source, and `xp.cfg` (a DictConfig), `xp.sig` and `fsdp_best_state`.

    Raises:
        CheckpointError: it is not there, or not good.
    """
    location = resolve(str(checkpoint_path), xps=_experiments())
    if location.kind == "file":
        state = read_foreign(location.path)
        if "xp.cfg" in state:
            state["xp.cfg"] = OmegaConf.create(state["xp.cfg"])
        return state
    if location.kind == "checkpoint":
        loaded = load_folder(location.path)
    else:
        newest = Checkpointer(location.path).load_newest()
        if newest is None:
            raise MissingCheckpoint(f"{location.path} holds no committed checkpoint")
        loaded = newest
    info = loaded.manifest.info
    state = dict(loaded.state)
    state["xp.cfg"] = OmegaConf.create(info.get("config") or {})
    state["xp.sig"] = info.get("sig")
    state.setdefault("fsdp_best_state", {})
    logger.info("Checkpoint loaded from %s", loaded.where)
    return state


def save_checkpoint(
    state: Mapping[str, Any], checkpoint_path: Path, is_sharded: bool = False
) -> None:
    """Save a state in our format, in a folder that must not hold a checkpoint yet.

    Args:
        state: by source; `xp.cfg` and `xp.sig` go where ours keep configuration and signature.
        checkpoint_path: the folder.
        is_sharded: sharded or not, it is the same folder.

    Raises:
        CheckpointError: it cannot be saved; nothing that was committed is touched.
    """
    sources = {name: part for name, part in state.items() if name not in ("xp.cfg", "xp.sig")}
    info = {"config": plain_config(state.get("xp.cfg")), "sig": state.get("xp.sig")}
    position = Position.parse(checkpoint_path.name)
    epoch = len(state.get("history", ())) if position is None else position.epoch
    save_folder(checkpoint_path, sources, epoch=epoch, info=info)
    logger.info("Checkpoint saved to %s", checkpoint_path)


def flush_stale_checkpoints(checkpoint_path: Path, keep_last: int | None = None) -> None:
    """Delete all but the newest `keep_last` periodic checkpoints, and all but two rolling ones.

    Args:
        checkpoint_path: an experiment's folder, that of its checkpoints, or one of these.
        keep_last: how many stay; None or 0 for all, and then nothing is deleted at all.
    """
    if not keep_last or keep_last < 0:
        return
    for folder in (checkpoint_path, *checkpoint_path.parents[:2]):
        if (folder / _CHECKPOINTS).is_dir():
            Checkpointer(folder, keep_last=keep_last).flush()
            return


def check_sharded_checkpoint(checkpoint_path: Path, rank0_checkpoint_path: Path) -> None:
    """Check that a checkpoint is whole and every byte of it is good; changes nothing.

    Raises:
        CheckpointError: it is not.
    """
    load_checkpoint(rank0_checkpoint_path)


def _experiments() -> Path | None:
    """Folder of all experiments, of the one that runs or of this process's working directory."""
    if is_xp():
        return Path(get_xp().folder.parent)
    local = Path("outputs/xps")
    return local if local.is_dir() else None
