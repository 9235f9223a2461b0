"""Checks that the files of each source can have names, also of split and compressed sources."""

import re
from collections.abc import Collection, Iterable

from ..errors import UnsupportedState
from ..format.compression import SUFFIX
from ..layout import MAX_FILES, file_stem, index_file, shard_file
from ..storage import Storage

_LONGEST = 255  # bytes of a name, on almost all file systems
_OF_SHARD = re.compile(r"(.+)-\d{5,}-of-\d{5,}(\.\d+)?")
_SHOWN = 60  # characters of a name in a message


def check_names(
    sources: Iterable[str], storage: Storage, *, writers: int = 1, compress: Collection[str] = ()
) -> None:
    """Refuse a source whose files could get no name, or the name of a file of another source.

    Args:
        sources: the names.
        storage: where the files will lie.
        writers: how many processes may write a part of a source.
        compress: sources whose files are compressed.

    Raises:
        UnsupportedState: the message names the source, and says how long the name may be.
    """
    names, limit = list(sources), longest_name(storage)
    for source in names:
        stem, longest = file_stem(source), _longest_file(source, writers, source in compress)
        if len(longest) > limit:
            more = len(longest) - len(stem)
            raise UnsupportedState(
                f"the name of source {_short(source)!r} is too long for its files: it takes "
                f"{len(stem)} bytes there, and may take {max(limit - more, 0)}. File names in "
                f"{storage.describe()} may have {limit} bytes, of which the numbers of parts and "
                f"the suffix take up to {more}. Use a shorter name; each byte of a character "
                "other than ASCII letters, digits and `_.-~` takes three"
            )
        part = _OF_SHARD.fullmatch(source)
        if part is not None and part[1] in names:
            raise UnsupportedState(
                f"source {_short(source)!r} has the name of a part of source {_short(part[1])!r}: "
                "give it another name"
            )
    _refuse_same_without_case(names, storage)


def longest_name(storage: Storage) -> int:
    """Return how many bytes the name of a file in a checkpoint may have."""
    return min(storage.longest_name(), _LONGEST)


def _longest_file(source: str, writers: int, is_compressed: bool) -> str:
    # The most files of a process have numbers of one digit, as the first of them.
    count, piece = (writers, MAX_FILES) if writers > 1 else (MAX_FILES, None)
    shard = shard_file(source, count, count, piece) + (SUFFIX if is_compressed else "")
    return max(shard, index_file(source), key=len)


def _refuse_same_without_case(names: Collection[str], storage: Storage) -> None:
    seen: dict[str, str] = {}
    for source in names:
        other = seen.setdefault(source.lower(), source)
        if other != source and storage.ignores_case():
            raise UnsupportedState(
                f"sources {_short(other)!r} and {_short(source)!r} differ in case alone, which "
                f"the file system of {storage.describe()} ignores: give one another name"
            )


def _short(name: str) -> str:
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
