"""Reads one committed checkpoint: the manifest, then the files; every byte is checked."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import BadReference
from ..format.manifest import Manifest
from ..ranks import ALONE, Ranks
from ..run_folder.file_trust import FileTrust
from ..run_folder.manifest_file import read_either, read_manifest
from ..storage import Storage
from .destinations import LiveTensors
from .source_reader import SourceReader, layouts_of

SourceFilter = Collection[str] | Callable[[Manifest], Collection[str]] | None
"""Names of sources, or a function that returns them for a manifest; None for all."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        state: the state of each source by name. Tensors are on the CPU; a tensor that was read in
            place shares the memory of the live tensor.
        manifest: manifest of the checkpoint.
        where: full path of its folder.
    """

    state: dict[str, Any]
    manifest: Manifest
    where: str


def load(
    storage: Storage,
    name: str,
    sources: SourceFilter = None,
    without: Collection[str] = (),
    *,
    ranks: Ranks = ALONE,
    like: Mapping[str, Any] | None = None,
    live: LiveTensors | None = None,
    lazy: bool = False,
    trust: FileTrust | None = None,
    or_copy: bool = True,
) -> Loaded:
    """Read a checkpoint or some of its sources, and verify every byte that is read.

    Args:
        storage: storage of the checkpoint.
        name: name of its folder.
        sources: names of the sources to read, or a function that returns them for the manifest;
            None for all. A name from a function that the checkpoint lacks is skipped.
        without: names of sources that are not read; the checkpoint may lack them.
        ranks: processes that load together; all of them call this.
        like: by source, a state with DTensors. A saved tensor with the name and shape of a DTensor,
            or one level below that name, gets its layout: each rank reads only its part. Every rank
            reads all other tensors as a whole.
        live: tensors to read in place if they fit. If this raises, they hold no usable state.
        lazy: see `by_reference.load_checkpoint`; of local files, by one process alone.
        trust: learns which files are whole and which are damaged.
        or_copy: if the manifest is missing or damaged, read its copy, with a warning.

    Raises:
        BadReference: a name of `sources` is no source of the checkpoint.
        MissingCheckpoint: there is no committed checkpoint.
        CorruptCheckpoint: a file is missing or damaged; the message names it.
        UnsupportedFormat: it holds tensors of a dtype that this code does not know.
        UnreadableCheckpoint: the storage refused, or memory is short.
    """
    read = read_either if or_copy else read_manifest
    manifest = ranks.run_on_rank0(lambda: read(storage, name))
    chosen = sources(manifest) if callable(sources) else listed(sources)
    if not callable(sources):
        refuse_unknown(chosen or (), manifest, storage.describe(name))
    wanted = [s for s in manifest.sources if (chosen is None or s in chosen) and s not in without]
    state = {}
    for source in wanted:
        part = SourceReader(storage, name, manifest, source, ranks, trust)
        layouts = layouts_of(source, (like or {}).get(source))
        if layouts:
            tensors = part.read_laid_out(layouts)
        else:
            tensors = ranks.run_everywhere(part.map if lazy else partial(part.read, live))
        state[source] = ranks.run_everywhere(partial(part.decode, tensors))
    return Loaded(state, manifest, storage.describe(name))


def listed(sources: Collection[str] | None) -> Collection[str] | None:
    """Return names as a collection; a single name counts as one name, not as its letters."""
    return [sources] if isinstance(sources, str) else sources


def refuse_unknown(names: Collection[str], manifest: Manifest, where: str) -> None:
    """Refuse names of sources that a checkpoint lacks.

    Args:
        names: names of sources.
        manifest: manifest of the checkpoint.
        where: full path of its folder.

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
