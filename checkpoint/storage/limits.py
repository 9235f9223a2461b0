"""What the file system of a folder allows. The folder need not exist yet, see `LocalStorage`."""

import os
from pathlib import Path

# Bytes reserved for the name of a folder; the longest is the name of a checkpoint set aside.
_FOLDER = 64


def free_bytes(root: Path) -> int | None:
    """Bytes that the file system gives to a user who is not root; None if it does not say."""
    # The root need not exist yet: the nearest folder above it lies on the same file system, unless
    # a disk is mounted there later.
    for folder in (root, *root.parents):
        try:
            status = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return status.f_bavail * status.f_frsize
    return None


def longest_name(root: Path) -> int:
    """Most bytes that the name of a file in a folder of `root` may have, so that its path fits."""
    beside = len(os.fsencode(root)) + _FOLDER + len("//\0")
    return min(_limit(root, "PC_NAME_MAX", 255), _limit(root, "PC_PATH_MAX", 4096) - beside)


def _limit(root: Path, which: str, usual: int) -> int:
    for folder in (root, *root.parents):
        try:
            found = os.pathconf(folder, which)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            break
        return found if found > 0 else usual
    return usual


def ignores_case(root: Path) -> bool:
    """Whether names that differ in case alone are the same, as far as can be told."""
    for folder in (root, *root.parents):
        # A folder that is also found under its name in the other case lies where case is ignored.
        other = folder.with_name(folder.name.swapcase()) if folder.name else folder
        try:
            if other != folder and folder.exists():
                return other.exists() and other.samefile(folder)
        except OSError:
            break
    return False
