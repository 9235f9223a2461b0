"""Saves one checkpoint into a folder of its own, without a run; see `load_checkpoint`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..format.manifest import Manifest
from ..layout import Position
from ..ranks import ALONE
from ..run_folder.file_names import check_names
from ..storage import LocalStorage, locked
from .encode import encoded
from .save_job import SaveJob
from .shards import shards_of_one_process


def save_checkpoint(
    path: str | Path,
    state: Mapping[str, Any],
    *,
    epoch: int,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into a folder of the file system that does not exist yet.

    Raises:
        CheckpointError: see `Checkpointer.save`.
    """
    path = Path(path)
    storage = LocalStorage(path.parent)
    sources = encoded(state)
    check_names(sources, storage)
    trees = {source: tree for source, (tree, _, _) in sources.items()}
    draft = Manifest(Position(epoch), (), trees, {}, {}, info or {})
    with locked(storage) as lock:
        parts = shards_of_one_process(sources, {})
        SaveJob(storage, path.name, draft, parts, ALONE, check=lock.check).run_collective(
            lambda: ()
        )
