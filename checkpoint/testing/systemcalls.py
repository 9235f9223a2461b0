"""Calls to the operating system that fail on command, whichever thread makes them."""

import builtins
import errno
import fcntl
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .calls import Calls, Really, Replacement

_OF_PATHS = (
    *("mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove", "truncate"),
    *("stat", "lstat", "scandir", "listdir", "statvfs", "utime", "readlink"),
)
_OF_HANDLES = (
    *("read", "pread", "preadv", "write", "pwrite", "fsync", "fdatasync", "ftruncate"),
    *("fstat", "posix_fadvise"),
)
_LOCKING = ("flock", "lockf", "fcntl")


class SystemCalls(Calls):
    """Stands between Python and the operating system while the `with` block runs; see `Calls`.

    Without a fault it counts, so that a test can then try a fault at each call:

        with SystemCalls(under=folder) as counted:
            train(folder)
        for call in counted.calls:
            with SystemCalls(failing(call.number, errno.ENOSPC), under=folder):
                train(folder)

    Counted are calls of the functions of `os` about files and folders, `open`, reads of an
    `io.FileIO`, locks of `fcntl`, `mmap.mmap`, and `threading.Thread.start`, whose kind is `start`:
    it fails with MemoryError for ENOMEM, else with the RuntimeError of a system that is out of
    threads. What C code does without Python is not seen: reads of what the builtin `open` has
    opened, and torch.
    """

    CHANGES = frozenset(
        (
            *("open", "write", "pwrite", "fsync", "fdatasync", "close", "ftruncate", "truncate"),
            *("mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir"),
        )
    )
    """Calls that saving and deleting are made of."""
    QUESTIONS = frozenset(
        (
            *("open", "stat", "lstat", "fstat", "statvfs", "scandir", "listdir", "readlink"),
            *("read", "pread", "preadv"),
        )
    )
    """Calls that loading is made of."""

    def _replacements(self) -> Iterator[Replacement]:
        self._paths: dict[int, str] = {}
        for name in (*_OF_PATHS, *_OF_HANDLES):
            if hasattr(os, name):
                yield os, name, self._wrapped(name, getattr(os, name))
        yield os, "open", self._opening(os.open)
        yield os, "close", self._closing(os.close)
        for name in _LOCKING:
            yield fcntl, name, self._wrapped(name, getattr(fcntl, name))
        yield io, "FileIO", self._raw(io.FileIO)
        for module in (builtins, io):
            yield module, "open", self._opening_whole(io.open)
        yield mmap, "mmap", self._mapping(mmap.mmap)
        yield threading.Thread, "start", self._starting(threading.Thread.start)

    def _wrapped(self, kind: str, really: Really) -> Really:
        def call(*arguments: Any, **options: Any) -> Any:
            path = self._path(arguments[0] if arguments else ".", options)
            return self._do(kind, path, partial(_error, path), really, *arguments, **options)

        return call

    def _opening(self, really: Really) -> Really:
        def call(*arguments: Any, **options: Any) -> Any:
            path = self._path(arguments[0], options)
            handle = self._do("open", path, partial(_error, path), really, *arguments, **options)
            self._paths[handle] = path
            return handle

        return call

    def _closing(self, really: Really) -> Really:
        def call(handle: int) -> None:
            path = self._path(handle)
            try:
                self._do("close", path, partial(_error, path), really, handle)
            finally:
                self._paths.pop(handle, None)

        return call

    def _opening_whole(self, really: Really) -> Really:
        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int):
                return really(file, *arguments, **options)
            path = self._path(file)
            return self._do(
                "open", path, partial(_error, path), really, file, *arguments, **options
            )

        return call

    def _raw(self, really: type[io.FileIO]) -> type[io.FileIO]:
        do, path_of, paths = self._do, self._path, self._paths

        class Raw(really):  # type: ignore[misc, valid-type]
            def __init__(self, file: Any, *arguments: Any, **options: Any) -> None:
                begin = partial(super().__init__, file)
                if isinstance(file, int):
                    begin(*arguments, **options)
                    return
                path = path_of(file)
                do("open", path, partial(_error, path), begin, *arguments, **options)
                paths[self.fileno()] = path

            def _about(self, kind: str, act: Callable[..., Any], *arguments: Any) -> Any:
                path = path_of(self.fileno())
                return do(kind, path, partial(_error, path), act, *arguments)

            def readinto(self, buffer: Any) -> Any:
                return self._about("read", super().readinto, buffer)

            def read(self, size: int = -1) -> Any:
                return self._about("read", super().read, size)

            def readall(self) -> Any:
                return self._about("read", super().readall)

            def close(self) -> None:
                if self.closed:
                    return
                handle = self.fileno()
                try:
                    self._about("close", super().close)
                finally:
                    paths.pop(handle, None)

        return Raw

    def _mapping(self, really: type[mmap.mmap]) -> type[mmap.mmap]:
        do, path_of = self._do, self._path

        class CountedMap(really):  # type: ignore[misc, valid-type]
            def __new__(cls, handle: int, *arguments: Any, **options: Any) -> Any:
                path = "" if handle == -1 else path_of(handle)
                new = super().__new__
                return do(
                    "mmap", path, partial(_error, path), new, cls, handle, *arguments, **options
                )

        return CountedMap

    def _starting(self, really: Really) -> Really:
        def call(thread: threading.Thread) -> None:
            self._do("start", "", _cannot_start, really, thread)

        return call

    def _path(self, about: Any, options: dict[str, Any] | None = None) -> str:
        if hasattr(about, "fileno"):
            about = about.fileno()
        if isinstance(about, int):
            return self._paths.get(about, f"descriptor {about}")
        given = options or {}
        folder = self._paths.get(given.get("dir_fd") or given.get("src_dir_fd") or -1, "")
        return os.path.abspath(os.path.join(folder, os.fsdecode(about)))


def _error(path: str, code: int) -> OSError:
    return OSError(code, os.strerror(code), path)


def _cannot_start(code: int) -> BaseException:
    return MemoryError() if code == errno.ENOMEM else RuntimeError("can't start new thread")
