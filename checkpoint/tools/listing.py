"""List what lies in an experiment: its checkpoints, and what is none."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import CheckpointError
from ..format.manifest import Manifest
from ..layout import Position, is_quarantined
from ..run_folder import folder_contents as remains
from ..run_folder.manifest_file import is_committed, read_head
from ..run_folder.pins import Pins, read_pins
from ..storage import Storage


@dataclass(frozen=True)
class Row:
    """One folder of an experiment.

    Attributes:
        name: of the folder.
        kind: `checkpoint`; `damaged`: committed, with a manifest that cannot be used, or was lost;
            `set aside`: was found damaged before; `interrupted`: without a manifest, since its save
            or its deletion was interrupted or is going on.
        size: bytes in its files.
        own: bytes in those of its files that no folder before it in the list has too.
        created: when it was saved, ISO 8601 in UTC.
        reasons: why it was saved, see `layout`.
        pins: what keeps it besides.
        metrics: of its epoch, by stage.
        best_metric: name of the one that the configuration says is to be best; None if it does not.
        problem: why the manifest cannot be used.
    """

    name: str
    kind: Literal["checkpoint", "damaged", "set aside", "interrupted"]
    size: int
    own: int
    created: str | None = None
    reasons: tuple[str, ...] = ()
    pins: Pins = field(default_factory=Pins)
    metrics: Mapping[str, Any] | None = None
    best_metric: str | None = None
    problem: str = ""


def list_checkpoints(storage: Storage) -> list[Row]:
    """List the folders that are checkpoints, oldest first, or were or may become some.

    Raises:
        UnreadableCheckpoint: the storage refused to list them.
    """
    names = [name for name in storage.folders() if _is_listed(storage, name)]
    seen: set[Hashable] = set()
    return [_row(storage, name, seen) for name in sorted(names, key=_order)]


def _is_listed(storage: Storage, name: str) -> bool:
    is_named = Position.parse(name) is not None or is_quarantined(name)
    return is_named or is_committed(storage, name)


def _order(name: str) -> tuple[int, tuple[float, ...], str]:
    position = Position.parse(name)
    if position is not None:
        return 0, position.order, name
    return (2 if is_quarantined(name) else 1), (), name


def _row(storage: Storage, name: str, seen: set[Hashable]) -> Row:
    size, own = _sizes(storage, name, seen)
    aside = is_quarantined(name)
    if not is_committed(storage, name):
        found = remains.examine(storage, name)
        if aside or found.may_be_deleted:
            return Row(name, "set aside" if aside else "interrupted", size, own)
        marks = read_pins(storage, name)
        return Row(name, "damaged", size, own, pins=marks, problem=found.what)
    marks = read_pins(storage, name)
    try:
        manifest = read_head(storage, name)
    except CheckpointError as error:
        return Row(
            name, "set aside" if aside else "damaged", size, own, pins=marks, problem=str(error)
        )
    return Row(
        name,
        "set aside" if aside else "checkpoint",
        size,
        own,
        manifest.created,
        manifest.reasons,
        marks,
        metrics_of(manifest),
        _best_metric(manifest),
    )


def _sizes(storage: Storage, name: str, seen: set[Hashable]) -> tuple[int, int]:
    size = own = 0
    for file in storage.files(name):
        path = f"{name}/{file}"
        bytes_of_file = (storage.stamp(path) or (0, 0))[0]
        identity = storage.identity(path) or path
        size += bytes_of_file
        own += 0 if identity in seen else bytes_of_file
        seen.add(identity)
    return size, own


def metrics_of(manifest: Manifest) -> dict[str, Any]:
    """Metrics of the epoch of a checkpoint by stage; empty if the saving program gave none."""
    metrics = manifest.info.get("metrics")
    return dict(metrics) if isinstance(metrics, Mapping) else {}


def _best_metric(manifest: Manifest) -> str | None:
    config = manifest.info.get("config")
    section = config.get("checkpoint") if isinstance(config, Mapping) else None
    name = section.get("best_metric") if isinstance(section, Mapping) else None
    return name if isinstance(name, str) else None
