"""What one checkpoint says of itself, for people and programs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..format.manifest import Manifest
from ..format.safetensors_header import DTYPES
from ..format.tensor_index import TensorRecord
from ..run_folder.manifest_file import read_manifest
from ..run_folder.pins import Pins, read_pins
from ..storage import Storage
from .listing import metrics_of


@dataclass(frozen=True)
class FileDescription:
    """A data file: bytes, and the digest that they should have."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class TensorDescription:
    """A tensor: safetensors dtype, global shape, and the files that it lies in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class SourceDescription:
    """A source: its tensors, how many numbers and bytes these have, and its files."""

    name: str
    tensors: tuple[TensorDescription, ...]
    numbers: int
    size: int
    files: tuple[FileDescription, ...]


@dataclass(frozen=True)
class CheckpointDescription:
    """A checkpoint, see `Manifest`; what follows `sources`, and `metrics`, are of its `info`.

    Attributes:
        config: the configuration that the run had when it saved this; None if it gave none.
        changes: what the user changed in it before, between two starts of the run.
    """

    path: str
    epoch: int
    step: int | None
    stages: int
    created: str
    reasons: tuple[str, ...]
    pins: Pins
    world_size: int
    versions: Mapping[str, str]
    sig: str | None
    lineage: Any
    metrics: Mapping[str, Any]
    dropped: tuple[str, ...]
    sources: tuple[SourceDescription, ...]
    config: Any
    changes: tuple[Mapping[str, Any], ...]


def describe(storage: Storage, name: str) -> CheckpointDescription:
    """Read the manifest and the marks of a checkpoint.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    manifest = read_manifest(storage, name)
    position, info = manifest.position, manifest.info
    sig = info.get("sig")
    return CheckpointDescription(
        path=storage.describe(name),
        epoch=position.epoch,
        step=position.step,
        stages=position.stages,
        created=manifest.created,
        reasons=manifest.reasons,
        pins=read_pins(storage, name),
        world_size=manifest.world_size,
        versions=manifest.versions,
        sig=sig if isinstance(sig, str) else None,
        lineage=info.get("lineage"),
        metrics=metrics_of(manifest),
        dropped=manifest.dropped,
        sources=tuple(_source(manifest, source) for source in manifest.sources),
        config=info.get("config"),
        changes=tuple(one for one in info.get("changes") or () if isinstance(one, Mapping)),
    )


def _source(manifest: Manifest, source: str) -> SourceDescription:
    records = manifest.tensors.get(source, {})
    return SourceDescription(
        source,
        tuple(_tensor(name, record) for name, record in records.items()),
        sum(math.prod(record.shape) for record in records.values()),
        sum(math.prod(record.shape) * _itemsize(record.dtype) for record in records.values()),
        tuple(
            FileDescription(file, record.size, record.digest)
            for file, record in sorted(manifest.files.items())
            if record.source == source
        ),
    )


def _tensor(name: str, record: TensorRecord) -> TensorDescription:
    files = tuple(dict.fromkeys(chunk.file for chunk in record.chunks))
    return TensorDescription(name, record.dtype, record.shape, files)


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 0
