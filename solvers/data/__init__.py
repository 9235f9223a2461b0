"""Order of the data, and the state of data loaders."""

from .combined import Combined

__all__ = ["Combined"]
