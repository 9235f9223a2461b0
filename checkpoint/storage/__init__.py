"""Named bytes: the seam between checkpoints and where they lie."""

from . import marking
from .base import Lock, Storage, locked
from .fencing import commit_while
from .guard import guarded
from .local import LocalStorage

__all__ = ["LocalStorage", "Lock", "Storage", "commit_while", "guarded", "locked", "marking"]
