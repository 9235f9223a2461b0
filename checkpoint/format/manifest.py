"""The manifest of a checkpoint, its commit record: the contents, and the digest of every file."""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any, Self

import numpy as np
import torch

from ..errors import (
    CheckpointError,
    CorruptCheckpoint,
    UnsupportedState,
)
from ..layout import MANIFEST, NONFINITE, Position, index_file, is_plain
from ..machine_errors import is_machine_error
from .codec import encode
from .decode import (
    BLOCKS,
    MALFORMED,
    OF_VERSION_5,
    RANKS,
    Json,
    decode,
    in_short,
)
from .digest import TREE
from .json_text import dump, is_absurd
from .safetensors_header import DTYPES
from .seal import FORMAT, MAX_BYTES, seal, unsealed, unsealed_head
from .tensor_index import FileRecord, TensorRecord


@cache
def current_versions() -> Mapping[str, str]:
    """Versions of the packages that write a checkpoint."""
    try:
        package = metadata.version("standard-solver")
    except metadata.PackageNotFoundError:
        package = "not installed"
    return {
        "standard-solver": package,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Manifest:
    """The commit record of a checkpoint.

    Attributes:
        position: epoch, step and finished stages.
        reasons: why it was saved, see `layout`.
        sources: the JSON tree of each source, see `codec`.
        tensors: the files and chunks of each tensor, by source and name.
        files: size and digest of each file, by name.
        info: plain values about the run: metrics, config, sig, lineage.
        dropped: names of sources that retention has removed since.
    """

    position: Position
    reasons: tuple[str, ...]
    sources: Mapping[str, Json]
    tensors: Mapping[str, Mapping[str, TensorRecord]]
    files: Mapping[str, FileRecord]
    info: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    world_size: int = 1
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=current_versions)

    def _format_version(self, sources: str) -> int:
        # The lowest version that can express the content, so that older code reads what it can.
        if any(f'{{"{tag}":' in sources for tag in OF_VERSION_5):
            return 5
        if any(one.digest.startswith(TREE) for one in self.files.values()):
            return 4
        if any(isinstance(tree, dict) and BLOCKS in tree for tree in self.sources.values()):
            return 3
        return 2 if any(one.encoding or one.header for one in self.files.values()) else 1

    @property
    def is_finite(self) -> bool:
        """Whether all weights were finite when it was saved."""
        return NONFINITE not in self.reasons

    def digests(self) -> dict[str, str]:
        """Digests of the files of each source with files, to find the sources that changed."""
        found: dict[str, str] = {}
        for _, record in sorted(self.files.items()):
            found[record.source] = found.get(record.source, "") + record.digest
        return found

    def without(self, kept: frozenset[str]) -> Self:
        """Return the manifest of the same checkpoint with only the sources in `kept`."""
        gone = sorted(set(self.sources) - kept)
        return replace(
            self,
            sources={name: tree for name, tree in self.sources.items() if name in kept},
            tensors={name: tensors for name, tensors in self.tensors.items() if name in kept},
            files={name: one for name, one in self.files.items() if one.source in kept},
            dropped=(*self.dropped, *gone),
        )

    def outline(self) -> Self:
        """Return the manifest without values, which needs little memory.

        Of `info`, it keeps what retention needs: `metrics`, the numbers of each stage, and
        `resumed`, the name of the checkpoint from which the run had started, or None.
        """
        names: dict[str, Json] = dict.fromkeys(self.sources)
        resumed = self.info.get("resumed")
        info = {
            "metrics": _numbers(self.info.get("metrics")),
            "resumed": resumed if isinstance(resumed, str) else None,
        }
        return replace(self, sources=names, tensors={}, info=info)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file: one line a field, and the digest of these lines last.

        Raises:
            UnsupportedState: the file would be too large to be read again.
        """
        fields = {
            "format": FORMAT,
            "version": None,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "stages": self.position.stages,
            "created": self.created,
            "reasons": self.reasons,
            "world_size": self.world_size,
            "versions": self.versions,
            "info": _plain(self.info),
            "dropped": self.dropped,
            "files": {
                name: {k: v for k, v in asdict(f).items() if v or k == "size"}
                for name, f in self.files.items()
            },
            "source_names": list(self.sources),
            # `head` reads only the fields above this line.
            "tensors": {
                source: {name: t.to_json() for name, t in tensors.items()}
                for source, tensors in self.tensors.items()
            },
            "sources": self.sources,
        }
        texts = {key: dump(value) for key, value in fields.items()}
        texts["version"] = dump(self._format_version(texts["sources"]))
        lines = [f"{json.dumps(key)}: {one},\n" for key, one in texts.items()]
        text = ("{\n" + "".join(lines)).encode()
        if len(text) > MAX_BYTES - 1024 or is_absurd(text):
            largest = max(self.sources, key=lambda name: len(dump(self.sources[name])))
            raise UnsupportedState(
                f"cannot save source {largest!r}: it has more values outside of tensors than a "
                "manifest can hold; keep long lists of numbers as tensors or NumPy arrays"
            )
        return seal(text)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a manifest and check everything that does not need the data files.

        Raises:
            CorruptCheckpoint: damaged, or not consistent (the message does not name the path).
            UnsupportedFormat: of another format, or of a version from the future.
        """
        with _refusing_malformed():
            return cls._from_json(unsealed(data))

    @classmethod
    def head(cls, data: bytes) -> Self:
        """Read a manifest without tensors and values; of the sources, it has only the names.

        The digest covers all bytes; the descriptions of the tensors are not parsed.

        Raises:
            CorruptCheckpoint, UnsupportedFormat: see `from_bytes`.
        """
        raw = unsealed_head(data)
        if raw is None:
            whole = cls.from_bytes(data)
            return replace(whole, sources=dict.fromkeys(whole.sources), tensors={})
        with _refusing_malformed():
            names = dict.fromkeys(raw["source_names"])
            return cls._from_json({**raw, "sources": names, "tensors": {}})

    @classmethod
    def _from_json(cls, raw: dict[str, Any]) -> Self:
        manifest = cls(
            position=_position(raw["epoch"], raw["step"], raw.get("stages", 0)),
            reasons=tuple(raw["reasons"]),
            sources=raw["sources"],
            tensors={
                source: {name: TensorRecord.from_json(t) for name, t in tensors.items()}
                for source, tensors in raw["tensors"].items()
            },
            files={name: FileRecord(**fields) for name, fields in raw["files"].items()},
            info=decode("info", raw["info"], {}),
            dropped=tuple(raw["dropped"]),
            world_size=raw["world_size"],
            created=raw["created"],
            versions=raw["versions"],
        )
        _check(manifest)
        return manifest


@contextmanager
def _refusing_malformed() -> Iterator[None]:
    try:
        yield
    except MALFORMED as error:
        # An unknown class in `info`, or an error of the machine: the manifest may be right.
        if isinstance(error, CheckpointError) or is_machine_error(error):
            raise
        raise CorruptCheckpoint(
            f"it does not have the fields of a manifest: {in_short(error)}"
        ) from error


def _check(manifest: Manifest) -> None:
    if not all(isinstance(one, dict) for one in (manifest.sources, manifest.info)):
        raise CorruptCheckpoint("it does not describe its sources by name")
    if not all(isinstance(one, str) for one in (*manifest.reasons, *manifest.dropped)):
        raise CorruptCheckpoint("its lists of names hold something else")
    for name, record in manifest.files.items():
        if not is_plain(name) or name == MANIFEST:
            raise CorruptCheckpoint(f"it refers to a file by the name {name!r}, which is not plain")
        sizes = (record.size, record.content_size)
        is_odd = any(type(size) is not int or size < 0 for size in sizes)
        if is_odd or record.source not in manifest.sources:
            raise CorruptCheckpoint(f"it describes the file {name!r} wrongly")
    if type(manifest.world_size) is not int or manifest.world_size < 1:
        raise CorruptCheckpoint(f"it cannot be that {manifest.world_size!r} ranks saved it")
    for source, tree in manifest.sources.items():
        if isinstance(tree, dict) and RANKS in tree and not tree[RANKS]:
            raise CorruptCheckpoint(f"source {source!r} is that of no rank")
    for source, tensors in manifest.tensors.items():
        files = {chunk.file for record in tensors.values() for chunk in record.chunks}
        listed = {name for name, one in manifest.files.items() if one.source == source}
        if files != listed - {index_file(source)}:
            raise CorruptCheckpoint(f"the tensors and the files of source {source!r} disagree")
        for name, tensor in tensors.items():
            tensor.check(name)
    _check_sizes(manifest)


def _check_sizes(manifest: Manifest) -> None:
    """Refuse files that are too short for their tensors, before memory is allocated."""
    needed = dict.fromkeys(manifest.files, 0)
    for tensors in manifest.tensors.values():
        for tensor in tensors.values():
            itemsize = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 0
            for chunk in tensor.chunks:
                needed[chunk.file] += math.prod(chunk.shape) * itemsize
    for name, size in needed.items():
        if size > manifest.files[name].plain_size:
            raise CorruptCheckpoint(f"its tensors in the file {name!r} are larger than that file")


def _position(epoch: Any, step: Any, stages: Any) -> Position:
    counts = [epoch, stages, *([] if step is None else [step])]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise CorruptCheckpoint(f"epoch {epoch!r}, step {step!r}, stages {stages!r} cannot be")
    return Position(epoch, step, stages)


def _numbers(metrics: Any) -> dict[str, dict[str, int | float]]:
    stages = metrics.items() if isinstance(metrics, Mapping) else ()
    return {
        str(stage): {k: v for k, v in values.items() if isinstance(v, int | float)}
        for stage, values in stages
        if isinstance(values, Mapping)
    }


def _plain(info: Mapping[str, Any]) -> Json:
    tree, tensors, _ = encode("info", dict(info))
    if tensors:
        raise UnsupportedState(f"metrics, config and lineage hold tensors: {', '.join(tensors)}")
    return tree
