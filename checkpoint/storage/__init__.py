"""Named bytes: the seam between checkpoints and the place where they lie."""

from .commit_guard import guarded
from .local import LocalStorage
from .protocol import Lock, Storage, locked, with_defaults

__all__ = ["LocalStorage", "Lock", "Storage", "guarded", "locked", "with_defaults"]
