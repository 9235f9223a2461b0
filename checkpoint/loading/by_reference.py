"""Loads what a user named: a checkpoint, a run, or a file that another program wrote."""

from pathlib import Path
from typing import Any

from ..errors import MissingCheckpoint
from ..foreign import read_foreign
from ..format.manifest import Manifest
from ..layout import MANIFEST, Position
from ..ranks import ALONE
from ..run_folder.catalog import Catalog
from ..run_folder.file_trust import FileTrust
from ..run_folder.locate import XPS, locate
from ..storage import Storage
from .destinations import LiveTensors
from .newest import LoadRequest, NewestLoader
from .reader import Loaded, SourceFilter, listed, load, refuse_unknown


def load_checkpoint(
    reference: str | Path,
    sources: SourceFilter = None,
    *,
    lazy: bool = False,
    xps: str | Path = XPS,
) -> Loaded:
    """Load a checkpoint by any name that the command `checkpoint` takes, or a file.

    Args:
        reference: one of: the path of a checkpoint; the path of an experiment, or its signature
            (`SIG` or `//sig/SIG`), for its newest good checkpoint; one of these with `/NAME` or
            `/EPOCH` after it; the path of a `.safetensors` file, or of a file of `torch.save`.
        sources: names of the sources to load, or a function that returns them for a manifest; None
            for all.
        lazy: map the files into memory instead of reading them. The system then reads the pages of
            a tensor when they are used, and may drop them again. Sizes and headers are checked;
            values are not, so run `checkpoint.verify` first if that matters. A write to such a
            tensor stays in this process. The files may be deleted meanwhile, and must not change.
        xps: folder of all experiments, for signatures.

    Returns:
        The state by source. Of a `.safetensors` file, the only source is the stem of its name. The
        manifest of a file lists the sources and has no values of its own.

    Raises:
        BadReference: the reference is malformed, or the checkpoint has no source of a given name.
        MissingCheckpoint: nothing lies there; the message names what is nearby.
        UnsupportedFormat: with `lazy`, a file is compressed or is not of this package.
        CheckpointError: see `loading.reader.load`.
    """
    path = Path(reference).expanduser()
    if path.is_file() and path.name != MANIFEST:
        return _from_file(path, sources)
    found = locate(str(reference), Path(xps))
    if found.name is None:
        return _newest(found.storage, sources, lazy)
    return load(found.storage, found.name, sources, lazy=lazy)


def _newest(storage: Storage, sources: SourceFilter, lazy: bool) -> Loaded:
    loader = NewestLoader(Catalog(storage), ALONE, FileTrust(storage))
    request = LoadRequest(sources, (), None, LiveTensors({}), lazy)
    loaded = loader.newest(request, change=None)
    if loaded is None:
        raise MissingCheckpoint(f"{storage.describe()} holds no committed checkpoint")
    return loaded


def _from_file(path: Path, sources: SourceFilter) -> Loaded:
    read = read_foreign(path)
    state = {path.stem: read} if path.suffix == ".safetensors" else read
    manifest = Manifest(_position(state), (), dict.fromkeys(state), {}, {}, created="", versions={})
    chosen = sources(manifest) if callable(sources) else listed(sources)
    if chosen is not None:
        if not callable(sources):
            refuse_unknown(chosen, manifest, str(path))
        state = {name: part for name, part in state.items() if name in chosen}
    return Loaded(state, manifest, str(path))


def _position(state: dict[str, Any]) -> Position:
    # Audiocraft and flashy append one entry per epoch to the history, and save after that.
    history = state.get("history")
    return Position(len(history) if isinstance(history, list) else 0)
