"""Named bytes: the seam between checkpoints and where they lie."""

from . import marking
from .commit_guard import guarded
from .fencing import commit_while
from .local import LocalStorage
from .protocol import Lock, Storage, locked

__all__ = ["LocalStorage", "Lock", "Storage", "commit_while", "guarded", "locked", "marking"]
