"""Read the state of this or another experiment, or of a file, in one shape whatever wrote it."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dora.git_save import to_absolute_path

from checkpoint import (
    Checkpointer,
    CheckpointError,
    Loaded,
    Manifest,
    MissingCheckpoint,
    load_checkpoint,
    read_foreign,
    resolve,
)
from checkpoint.integration import Ranks, pin_as_parent

from ..metrics import plain
from .restore_plan import sources_of_best, unseen_with_best

logger = logging.getLogger(__name__)

LEGACY = "checkpoint.th"
_CONFIG = ("xp.cfg", "xp.sig")


@dataclass(frozen=True)
class LoadedState:
    """A state that was read, and where it comes from.

    Attributes:
        state: by source; without configuration and signature.
        where: path of the folder or file.
        lineage: plain values that say which checkpoint of which experiment it is.
        dropped: sources that had been thinned out of it.
        manifest: what a checkpoint of ours says of itself.
    """

    state: dict[str, Any]
    where: str
    lineage: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    manifest: Manifest | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""
        return 1 if self.manifest is None else self.manifest.world_size

    def keep_for(self, sig: str, folder: Path) -> None:
        """Mark a checkpoint of ours, so that its run keeps it as long as that other one is there.

        A mark that cannot be written, as in the folder of another user, is a line in the log.

        Args:
            sig: of the experiment that continues from it.
            folder: of that experiment.
        """
        if self.manifest is None:
            return
        try:
            pin_as_parent(Path(self.where), by=sig, where=str(folder))
        except (CheckpointError, OSError, MemoryError) as error:
            logger.info("%s may be deleted by its own run: %s", self.where, error)


def read_own(
    checkpointer: Checkpointer,
    folder: Path,
    ignored: Collection[str],
    *,
    quarantine: bool,
    like: Mapping[str, Any] | None,
    into: Mapping[str, Any],
    overlaid: Collection[str] | None,
    ranks: Ranks,
) -> LoadedState | None:
    """Read the newest good checkpoint of the experiment in `folder`; None when there is none.

    A folder that Audiocraft or flashy wrote is read too, as long as it has no checkpoint of ours.

    Args:
        checkpointer: that of the experiment.
        folder: of the experiment.
        ignored: sources that are not read.
        quarantine: whether damaged checkpoints are renamed.
        like: how tensors are laid out over the ranks.
        into: live state that is read into where it fits.
        overlaid: sources that the best weights will be put over; None when they will not.
        ranks: of this run.

    Raises:
        CorruptCheckpoint: there are checkpoints and none is good.
    """
    loaded = checkpointer.load_newest(
        None if overlaid is None else partial(_beside_best, overlaid),
        without=ignored,
        quarantine=quarantine,
        like=like,
        into=into,
    )
    if loaded is not None:
        return _from_loaded(loaded)
    # One looks for all: they might not see the same.
    if ranks.run_on_rank0((folder / LEGACY).is_file):
        return ranks.run_everywhere(lambda: _from_foreign(folder / LEGACY))
    return None


def read_other(reference: str, xps: Path) -> LoadedState:
    """Read what `continue_from` leads to, only as much of it as another run takes.

    Raises:
        CheckpointError: it leads nowhere, or to something that is not good.
    """
    location = resolve(_absolute(reference), xps=xps)
    if location.kind == "file":
        return _from_foreign(location.path)
    if location.kind == "checkpoint":
        return _from_loaded(load_checkpoint(location.path, _of_best))
    loaded = Checkpointer(location.path).load_newest(_of_best)
    if loaded is None:
        raise MissingCheckpoint(f"{reference!r} leads to {location.path}, which is empty by now")
    return _from_loaded(loaded)


def _beside_best(registered: Collection[str], manifest: Manifest) -> set[str]:
    return manifest.sources.keys() - unseen_with_best(manifest.sources, registered)


def _of_best(manifest: Manifest) -> list[str]:
    return sources_of_best(manifest.sources)


def _absolute(reference: str) -> str:
    # Under --git_save the run is in a copy of the code, and a path was meant from where it began.
    is_path = not reference.startswith(("//", "~")) and "://" not in reference
    return to_absolute_path(reference) if is_path else reference


def _from_loaded(loaded: Loaded) -> LoadedState:
    position, info = loaded.manifest.position, loaded.manifest.info
    lineage = {
        "sig": info.get("sig"),
        "epoch": position.epoch,
        "step": position.step,
        "path": loaded.where,
        "from": info.get("lineage"),
    }
    return LoadedState(
        loaded.state, loaded.where, lineage, loaded.manifest.dropped, loaded.manifest
    )


def _from_foreign(path: Path) -> LoadedState:
    state = read_foreign(path)
    sig = state.get("xp.sig")
    state = {name: part for name, part in state.items() if name not in _CONFIG}
    history = state.get("history")
    if isinstance(history, list):
        state["history"] = [_plain_epoch(epoch) for epoch in history]
    lineage = {
        "sig": sig if isinstance(sig, str) else None,
        "epoch": len(history) if isinstance(history, list) else None,
        "step": None,
        "path": str(path),
        "from": None,
    }
    return LoadedState(state, str(path), lineage)


def _plain_epoch(stages: Mapping[str, Any]) -> dict[str, Any]:
    return {stage: plain(stage, metrics) for stage, metrics in stages.items()}
