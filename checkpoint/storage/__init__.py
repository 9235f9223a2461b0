"""Named bytes: the seam between checkpoints and where they lie."""

from .base import Lock, Storage, locked
from .local import LocalStorage

__all__ = ["LocalStorage", "Lock", "Storage", "locked"]
