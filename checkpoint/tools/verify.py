"""Say of checkpoints whether each byte is what it was when it was saved."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import (
    CheckpointError,
    MissingCheckpoint,
    UnreadableCheckpoint,
    UnsupportedFormat,
)
from ..format.json_text import parse
from ..format.manifest import Manifest
from ..format.tensor_index import FileRecord
from ..layout import COPY, MANIFEST, Position, index_file, is_quarantined
from ..machine_errors import reading
from ..run_folder import folder_contents as remains
from ..run_folder.catalog import Catalog, storage_of
from ..run_folder.file_trust import FileTrust
from ..run_folder.manifest_file import is_committed, read_copy, read_manifest, stand_in
from ..storage import Storage
from .scan import Progress, Scan, Scanner

Kind = Literal["damaged", "missing", "unreadable", "unsupported"]


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file of a checkpoint.

    Attributes:
        checkpoint: folder of the checkpoint.
        file: name of the file in it.
        kind: `damaged`: other bytes than were saved; `missing`; `unreadable`: the storage refused,
            so its state is unknown; `unsupported`: another version of this code reads its
            manifest.
        path: full path of the file.
        what: the rest of the sentence.
    """

    checkpoint: str
    file: str
    kind: Kind
    path: str
    what: str


@dataclass(frozen=True)
class Verified:
    """What was found out about one checkpoint.

    Attributes:
        name: its folder.
        path: full path of that.
        files: how many it has, with the manifest.
        size: bytes in them, as far as the manifest could be read.
        damages: what is wrong; empty when it is good.
        nonfinite: `source/tensor` of those that hold NaN or infinity, if they were looked into:
            no damage, they were saved so.
    """

    name: str
    path: str
    files: int
    size: int
    damages: tuple[Damage, ...]
    nonfinite: tuple[str, ...] = ()

    @property
    def is_damaged(self) -> bool:
        """Whether bytes are wrong or missing; a file that could not be read may be good."""
        return any(one.kind in ("damaged", "missing") for one in self.damages)


def verify(
    folder: str | Path | Storage,
    names: Collection[str] | None = None,
    *,
    deep: bool = False,
    progress: Progress | None = None,
) -> list[Verified]:
    """Read checkpoints from the medium, to the last byte and whatever is found on the way.

    Args:
        folder: the experiment's folder, or a storage in whose root the checkpoints lie.
        names: folders of those to verify; None for all that were committed, also where the
            manifest was lost since.
        deep: look into every tensor too: its own digest, its dtype and shape, whether it is finite,
            and whether index files say where it lies.
        progress: is told what was read.

    Raises:
        MissingCheckpoint: one of `names` is no committed checkpoint.
        UnreadableCheckpoint: the folder cannot be listed.
    """
    storage = storage_of(folder)
    scanner = Scanner(deep=deep, progress=progress)
    if names is not None:
        return [verify_one(storage, name, scanner) for name in names]
    found = (verify_one(storage, name, scanner) for name in committed(storage))
    # A run may save and flush meanwhile: what it deleted, or goes on to save, is not damaged.
    return [one for one in found if not one.damages or _was_committed(storage, one.name)]


def committed(storage: Storage) -> list[str]:
    """Folders that were committed, oldest first; then those with names of their own.

    The manifest of one may have been lost since, see `folder_contents`.
    """
    names = [
        name
        for name in storage.folders()
        if not is_quarantined(name) and _was_committed(storage, name)
    ]
    return sorted(names, key=_age)


def _was_committed(storage: Storage, name: str) -> bool:
    if is_committed(storage, name):
        return True
    is_lost = Position.parse(name) is not None
    return is_lost and not remains.examine(storage, name).may_be_deleted


def total_size(storage: Storage, names: Collection[str]) -> int:
    """Bytes in the files of these folders, those under several names once."""
    sizes = {}
    for name in names:
        for file in storage.files(name):
            path = f"{name}/{file}"
            sizes[storage.identity(path) or path] = (storage.stamp(path) or (0, 0))[0]
    return sum(sizes.values())


def verify_one(storage: Storage, name: str, scanner: Scanner) -> Verified:
    """Verify one checkpoint with a scanner that may have read some of its files already.

    Raises:
        MissingCheckpoint: it is no committed one.
    """
    where = storage.describe(name)
    try:
        manifest = _manifest(storage, name)
    except CheckpointError as error:
        if isinstance(error, MissingCheckpoint) and not _was_committed(storage, name):
            raise
        return Verified(name, where, 1, 0, (_damage_of_manifest(storage, name, error),))
    damages, nonfinite = list(_damage_of_copy(storage, name)), []
    for file, record in sorted(manifest.files.items()):
        try:
            scan = scanner.scan(storage, f"{name}/{file}", record)
            with reading(storage.describe(f"{name}/{file}")):
                what = _what(storage, name, file, manifest, scan)
        except (MissingCheckpoint, UnreadableCheckpoint) as error:
            damages.append(_damage(storage, name, file, error))
            continue
        if what:
            # A run in this process must not link it again.
            FileTrust(storage).condemn(f"{name}/{file}")
            path = storage.describe(f"{name}/{file}")
            damages.append(Damage(name, file, "damaged", path, what))
        nonfinite += [
            f"{record.source}/{key}" for key, t in scan.tensors.items() if not t.is_finite
        ]
    size = sum(record.size for record in manifest.files.values())
    return Verified(name, where, len(manifest.files) + 1, size, tuple(damages), tuple(nonfinite))


def _age(name: str) -> tuple[bool, tuple[float, ...], str]:
    position = Position.parse(name)
    return position is None, position.order if position else (), name


def _manifest(storage: Storage, name: str) -> Manifest:
    manifest = read_manifest(storage, name, uncached=True)
    position = Position.parse(name)
    if position is not None:
        Catalog(storage).check(manifest, position)
    return manifest


def _damage_of_manifest(storage: Storage, name: str, error: CheckpointError) -> Damage:
    found = _damage(storage, name, MANIFEST, error)
    if not is_committed(storage, name):
        found = replace(found, what="it is not there, and no save or deletion was interrupted")
    if stand_in(storage, name) is None:
        return found
    return replace(found, what=f"{found.what}; its copy {COPY} is good")


def _damage_of_copy(storage: Storage, name: str) -> Iterator[Damage]:
    """Say what is wrong with the second commit record, where the first one is good.

    It may lack: an older version saved this, or a full disk did not take it. It may be older than
    the first one, which an older version has rewritten.
    """
    try:
        read_copy(storage, name, uncached=True)
    except UnsupportedFormat:
        return
    except CheckpointError as error:
        if storage.stamp(f"{name}/{COPY}") is not None:
            yield _damage(storage, name, COPY, error)


def _damage(storage: Storage, name: str, file: str, error: CheckpointError) -> Damage:
    path = storage.describe(f"{name}/{file}")
    kinds: dict[type[CheckpointError], Kind] = {
        MissingCheckpoint: "missing",
        UnreadableCheckpoint: "unreadable",
        UnsupportedFormat: "unsupported",
    }
    what = str(error).removeprefix(f"{path} ").removeprefix("is damaged: ")
    return Damage(name, file, kinds.get(type(error), "damaged"), path, what)


def _what(storage: Storage, name: str, file: str, manifest: Manifest, scan: Scan) -> str:
    """Say what is wrong with a file; empty when nothing is."""
    record = manifest.files[file]
    if scan.size != record.size:
        return f"it has {scan.size} bytes instead of {record.size}"
    odd = list(_odd_tensors(file, record, manifest, scan))
    if scan.digest != record.digest:
        where = f"; the damage is in {_few(odd)}" if odd else ""
        return f"its digest is {scan.digest} instead of {record.digest}{where}"
    if scan.problem:
        return scan.problem
    if odd:
        return f"it does not hold {_few(odd)} as {MANIFEST} lists it"
    if file == index_file(record.source) and not _agrees(storage, name, file, manifest):
        return f"it does not say where the tensors of source {record.source!r} lie"
    return ""


def _few(names: list[str]) -> str:
    named = ", ".join(map(repr, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {named}{more}"


def _odd_tensors(file: str, record: FileRecord, manifest: Manifest, scan: Scan) -> Iterator[str]:
    """Name the tensors that are not what the manifest lists, of a file that was looked into."""
    listed = {
        key: (tensor.dtype, chunk.shape, chunk.digest)
        for key, tensor in manifest.tensors.get(record.source, {}).items()
        for chunk in tensor.chunks
        if chunk.file == file
    }
    found = {key: (t.dtype, t.shape, t.digest) for key, t in scan.tensors.items()}
    if found:
        yield from (key for key in sorted({*listed, *found}) if listed.get(key) != found.get(key))


def _agrees(storage: Storage, name: str, file: str, manifest: Manifest) -> bool:
    """Whether an index file says of each tensor in which file it lies."""
    tensors = manifest.tensors[manifest.files[file].source]
    try:
        with storage.open(f"{name}/{file}", uncached=True) as opened:
            index = parse(opened.readall())["weight_map"]
        return all(index[key] in {c.file for c in one.chunks} for key, one in tensors.items())
    except (ValueError, LookupError, TypeError):
        return False
