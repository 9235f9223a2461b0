"""Read one committed checkpoint: the manifest, then files, each byte checked before it is used."""

import difflib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BadReference, CorruptCheckpoint, MissingCheckpoint, UnsupportedFormat
from ..format.manifest import MAX_BYTES, Manifest
from ..layout import COPY, MANIFEST, UNFINISHED, Position
from ..machine_errors import reading
from ..ranks import ALONE, Ranks
from ..run_folder.file_trust import Trust
from ..storage import LocalStorage, Storage
from .destinations import Live
from .source_reader import Source, layouts_of

Choice = Collection[str] | Callable[[Manifest], Collection[str]] | None
"""Names of sources, or what chooses them when it sees the manifest; None for all."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        state: the state of each source by name; tensors lie on the CPU, those that were read into
            live ones in the memory of these.
        manifest: what the checkpoint says of itself.
        where: full path of its folder.
    """

    state: dict[str, Any]
    manifest: Manifest
    where: str


def read_manifest(storage: Storage, name: str, *, uncached: bool = False) -> Manifest:
    """Read the commit record of the checkpoint in folder `name`, with `uncached` from the medium.

    Raises:
        MissingCheckpoint: there is none, so no checkpoint either.
        CorruptCheckpoint: it is damaged.
        UnsupportedFormat: it is of a version from the future.
        UnreadableCheckpoint: the storage refused.
    """
    return _read(storage, f"{name}/{MANIFEST}", Manifest.from_bytes, uncached)


def read_head(storage: Storage, name: str) -> Manifest:
    """Read a commit record without its tensors, see `Manifest.head`, in a fraction of the time.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return _read(storage, f"{name}/{MANIFEST}", Manifest.head)


def read_copy(storage: Storage, name: str, *, uncached: bool = False) -> Manifest:
    """Read the second commit record of the checkpoint in folder `name`, whatever the first one is.

    Raises:
        CheckpointError: see `read_manifest`.
    """
    return _read(storage, f"{name}/{COPY}", Manifest.from_bytes, uncached)


def good_copy(storage: Storage, name: str) -> Manifest | None:
    """Read the second commit record of a checkpoint; None where there is no good one.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    try:
        copy = read_copy(storage, name)
    except (MissingCheckpoint, CorruptCheckpoint, UnsupportedFormat):
        return None
    return copy if Position.parse(name) in (None, copy.position) else None


def stand_in(storage: Storage, name: str) -> Manifest | None:
    """Read the second commit record of what was committed once, and is not being deleted.

    Raises:
        UnreadableCheckpoint: the storage refused.
    """
    is_there = storage.stamp(f"{name}/{MANIFEST}") is not None
    if not is_there and storage.stamp(f"{name}/{UNFINISHED}") is not None:
        return None
    return good_copy(storage, name)


def read_either(storage: Storage, name: str) -> Manifest:
    """Read the commit record, or its copy where the record itself is missing or damaged.

    Raises:
        CheckpointError: of the first record, see `read_manifest`.
    """
    try:
        return read_manifest(storage, name)
    except (MissingCheckpoint, CorruptCheckpoint) as error:
        copy = stand_in(storage, name)
        if copy is None:
            raise
        logger.warning(
            "%s. Its copy %s is good, and is read instead: `checkpoint repair` puts it back",
            *(error, storage.describe(f"{name}/{COPY}")),
        )
        return copy


def _read(
    storage: Storage, file: str, take: Callable[[bytes], Manifest], uncached: bool = False
) -> Manifest:
    name, _, record = file.rpartition("/")
    stamp = storage.stamp(file)
    if stamp is None:
        raise MissingCheckpoint(
            f"{storage.describe(name)} holds no committed checkpoint: it has no {record}"
        )
    if stamp[0] > MAX_BYTES:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: it has {stamp[0]} bytes")
    try:
        with reading(storage.describe(file)):
            with storage.open(file, uncached=uncached) as opened:
                data = opened.readall()
            return take(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{storage.describe(file)} is damaged: {error}") from error
    except ValueError as error:
        raise type(error)(f"{storage.describe(file)} cannot be read: {error}") from error


def load(
    storage: Storage,
    name: str,
    sources: Choice = None,
    without: Collection[str] = (),
    *,
    ranks: Ranks = ALONE,
    like: Mapping[str, Any] | None = None,
    live: Live | None = None,
    lazy: bool = False,
    trust: Trust | None = None,
    or_copy: bool = True,
) -> Loaded:
    """Read a checkpoint, or only some of its sources, and verify what is read.

    Args:
        storage: where it lies.
        name: its folder.
        sources: names of the sources to read, or what chooses them by the manifest; None for all.
            What a function chooses and the checkpoint lacks is skipped.
        without: names of sources that are not read; the checkpoint may lack them.
        ranks: who loads it together; all of them call this.
        like: by source, a state whose DTensors say how tensors of the same name and shape, and
            those right below that name, are to be laid out: each rank reads its part. Others are
            read whole by every rank.
        live: tensors to read into where they fit; when this raises, these are no state at all.
        lazy: see `load_checkpoint`; of local files, by one process alone.
        trust: is told which files were found whole, or damaged.
        or_copy: read the copy of a manifest that is missing or damaged; a warning says so.

    Raises:
        BadReference: a name of `sources` is no source of the checkpoint.
        MissingCheckpoint: there is no committed checkpoint.
        CorruptCheckpoint: a file is missing or damaged; the message names it.
        UnsupportedFormat: it holds tensors of a dtype that this code does not know.
        UnreadableCheckpoint: the storage refused, or memory is short.
    """
    read = read_either if or_copy else read_manifest
    manifest = ranks.run_on_rank0(lambda: read(storage, name))
    chosen = sources(manifest) if callable(sources) else _listed(sources)
    if not callable(sources):
        refuse_unknown(chosen or (), manifest, storage.describe(name))
    wanted = [s for s in manifest.sources if (chosen is None or s in chosen) and s not in without]
    state = {}
    for source in wanted:
        part = Source(storage, name, manifest, source, ranks, trust)
        layouts = layouts_of(source, (like or {}).get(source))
        if layouts:
            tensors = part.read_laid_out(layouts)
        else:
            tensors = ranks.run_everywhere(part.map if lazy else partial(part.read, live))
        state[source] = ranks.run_everywhere(partial(part.decode, tensors))
    return Loaded(state, manifest, storage.describe(name))


def _listed(sources: Collection[str] | None) -> Collection[str] | None:
    # A text is a collection of its parts, and one name was meant.
    return [sources] if isinstance(sources, str) else sources


def refuse_unknown(names: Collection[str], manifest: Manifest, where: str) -> None:
    """Refuse names that are no sources of a checkpoint.

    Args:
        names: what was asked for.
        manifest: of the checkpoint.
        where: path of its folder.

    Raises:
        BadReference: the message gives the nearest name, or those that there are.
    """
    for name in names:
        if name in manifest.sources:
            continue
        if name in manifest.dropped:
            raise BadReference(
                f"{where} has no source {name!r} any more: keep_every_states or demote removed it"
            )
        close = difflib.get_close_matches(name, manifest.sources, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(manifest.sources)}"
        raise BadReference(f"{where} has no source {name!r}: {hint}")


def load_checkpoint(path: str | Path, sources: Choice = None, *, lazy: bool = False) -> Loaded:
    """Read the checkpoint in a folder of the file system; see `load`.

    Args:
        path: the folder.
        sources: names of those that are read, or what chooses them; None for all.
        lazy: map the files into memory instead: a tensor is read when it is looked at, page by
            page, and takes no memory that the system could not take back. Sizes and headers are
            checked; the values cannot be, for who reads them is not asked (`checkpoint.verify`
            is). What is written to such a tensor stays in this process. The files must not be
            changed while it is there; they may be deleted.

    Raises:
        BadReference: the checkpoint has no source of a name that `sources` lists.
        UnsupportedFormat: with `lazy`, a file is compressed; else see `load`.
        CheckpointError: see `load`.
    """
    path = Path(path)
    return load(LocalStorage(path.parent), path.name, sources, lazy=lazy)
