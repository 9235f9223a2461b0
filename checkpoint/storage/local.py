"""Checkpoints in a folder of a file system, written so that a power cut loses nothing acknowledged.

What is written is synced before it is named, and the folder is synced before that is believed. A
failed fsync condemns the file: the kernel may have dropped the pages and call the next fsync a
success (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

import errno
import io
import logging
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..machine_errors import unreadable_checkpoint
from .folders import (
    is_folder,
    opened_folder,
    refuse_link,
    scan,
    sync,
    sync_folder,
    sync_upwards,
    unlink_all,
)
from .limits import free_bytes, ignores_case, longest_name
from .lock import LOCK, FolderLock
from .log_once import LogOnce
from .new_file import NEW, create, put, temporary, write_new
from .os_errors import saving
from .regular_file import open_regular

# Too many links to this one file, or the file is gone by now.
_OF_ONE_FILE = {errno.EMLINK, errno.ENOENT}

logger = logging.getLogger(__name__)


class LocalStorage:
    """Folders of files under `root`, which need not exist yet; see `Storage`."""

    def __init__(self, root: Path) -> None:
        # Wherever the process may go.
        self.root = root.absolute()
        self._once = LogOnce(logger)
        self._lock: weakref.ref[FolderLock] | None = None

    def describe(self, name: str = "") -> str:
        """Full path of a name."""
        return str(self.root / name)

    def folders(self) -> list[str]:
        """Names of the folders under the root."""
        entries = scan(self.root)
        try:
            return [entry.name for entry in entries if is_folder(entry)]
        except OSError as error:
            raise unreadable_checkpoint(str(self.root), error) from error

    def files(self, folder: str) -> list[str]:
        """Names of all that lies in a folder."""
        return [entry.name for entry in scan(self.root / folder)]

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size in bytes and time of change in nanoseconds of a file."""
        try:
            status = self._status(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable_checkpoint(str(self.root / name), error) from error
        return status.st_size, status.st_mtime_ns

    def _status(self, name: str) -> os.stat_result:
        # A path object costs several times as much as the call, which each save makes often.
        return os.stat(f"{self.root}/{name}", follow_symlinks=False)

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        """Open a regular file for reading; `uncached` drops what memory has of it before."""
        return open_regular(self.root / name, uncached=uncached)

    def free(self) -> int | None:
        """Bytes that the file system gives to a user who is not root."""
        return free_bytes(self.root)

    def longest_name(self) -> int:
        """Most bytes that the name of a file in a folder may have, so that its path fits too."""
        return longest_name(self.root)

    def ignores_case(self) -> bool:
        """Whether names that differ in case alone are the same, as far as can be told."""
        return ignores_case(self.root)

    def lock(self) -> FolderLock:
        """Make the root durable, and take the lock on it; see `FolderLock`."""
        with saving(self.root):
            # Also when it is there: the process that made it may have been killed before the sync.
            self.root.mkdir(parents=True, exist_ok=True)
            sync_upwards(self.root)
        with saving(self.root / LOCK):
            lock = FolderLock(self.root)
        self._lock = weakref.ref(lock)
        return lock

    def new_folder(self, folder: str) -> None:
        """Make a folder that must not exist yet."""
        path = self.root / folder
        with saving(path):
            path.mkdir()
            try:
                sync_folder(self.root)
            except BaseException:
                with suppress(OSError):
                    path.rmdir()
                raise

    def new_marked_folder(self, folder: str, mark: str) -> None:
        """Make a folder, and sync the mark in it; what is committed there makes both durable."""
        path = self.root / folder
        with saving(path):
            path.mkdir()
            try:
                # The cause is looked up before the folder goes and gives its inode back.
                with saving(path):
                    create(path / mark)
                sync_folder(path)
            except BaseException:
                with suppress(OSError):
                    (path / mark).unlink(missing_ok=True)
                    path.rmdir()
                raise

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a new file and sync it."""
        path = self.root / name
        with saving(path):
            refuse_link(path.parent)
            write_new(path, parts)

    def write_unsynced(self, name: str, data: bytes) -> None:
        """Write a new file; the system writes it to the disk when it likes."""
        path = self.root / name
        with saving(path):
            refuse_link(path.parent)
            write_new(path, [data], is_synced=False)

    def identity(self, name: str) -> tuple[int, int] | None:
        """Device and number of a regular file."""
        try:
            status = self._status(name)
        except OSError:
            return None
        return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None

    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        """Make a hard link; durable at once with `replace`, else when `commit` syncs the folder."""
        path = self.root / new
        made = temporary(path) if replace else path
        with saving(path):
            refuse_link(path.parent)
            identity = self.identity(name)
            if identity is None:
                return False
            if replace and identity == self.identity(new):
                return True
            try:
                os.link(self.root / name, made, follow_symlinks=False)
                if replace:
                    put(made, path)
            except OSError as error:
                if isinstance(error, FileExistsError) and self.stamp(new) is not None:
                    # Maybe a server made the link, and its answer was lost.
                    if self.identity(new) == identity:
                        return True
                    raise
                self._cannot_link(self.root / name, error)
                return False
        return True

    def _cannot_link(self, path: Path, error: OSError) -> None:
        text = f"Could not link {path}: {error.strerror or error}"
        if error.errno in _OF_ONE_FILE:
            logger.debug("%s", text)
        else:
            # The next file may be linked: nothing but time and space is lost by trying.
            self._once.warning(
                f"{text}. Files that did not change are written again in full, which takes time "
                "and space: if this goes on, check the file system",
                f"link {error.errno}",
            )

    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write the file under another name, then rename it and sync the folder."""
        path = self.root / name
        made = temporary(path)
        with saving(path):
            refuse_link(path.parent)
            write_new(made, parts)
            put(made, path)

    def commit(self, name: str, data: bytes) -> None:
        """Sync the folder, then put the file in place by a rename and sync the folder again."""
        self.commit_while(name, data, lambda: None)

    def commit_while(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """Commit a file; `check` is called right before the rename."""
        # If another process has replaced the folder since, that folder lacks the file to rename.
        path = self.root / name
        made = temporary(path)
        with saving(path):
            refuse_link(path.parent)
            write_new(made, [data])
            try:
                sync_folder(path.parent)
                check()
            except BaseException:
                with suppress(OSError):
                    made.unlink()
                raise
            put(made, path)
            sync_folder(self.root)

    def rename_folder(self, folder: str, new: str) -> None:
        """Give a folder a new name."""
        path = self.root / folder
        with saving(path):
            # rename() would silently replace an empty folder.
            if (self.root / new).exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
            path.rename(self.root / new)
            sync_folder(self.root)

    def delete(self, name: str) -> None:
        """Delete one file and sync its folder."""
        self.delete_unsynced(name)
        folder = (self.root / name).parent
        with saving(folder, "delete"):
            if folder.is_dir():
                sync_folder(folder)

    def delete_unsynced(self, name: str) -> None:
        """Delete one file."""
        path = self.root / name
        with saving(path, "delete"):
            refuse_link(path.parent)
            path.unlink(missing_ok=True)

    def turn_into_mark(self, folder: str, file: str, mark: str) -> None:
        """Rename the file, or make the mark where there is no such file; sync the folder."""
        path = self.root / folder
        with saving(path / file, "delete"):
            refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                try:
                    os.rename(file, mark, src_dir_fd=handle, dst_dir_fd=handle)
                except FileNotFoundError:
                    with suppress(FileExistsError):
                        os.close(os.open(mark, NEW, 0o666, dir_fd=handle))
                sync(handle, path)

    def delete_folder(self, folder: str) -> None:
        """Delete a folder and the files in it; a folder inside it is not ours and stops this."""
        path = self.root / folder
        with saving(path, "delete"):
            refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                unlink_all(os.listdir(handle), handle)
                path.rmdir()
                sync_folder(self.root)

    def delete_marked_folder(self, folder: str, mark: str) -> None:
        """Delete the files, sync that, then delete the mark and the folder.

        The last step is not synced: after a loss of power the mark may be there still.
        """
        path = self.root / folder
        with saving(path, "delete"):
            refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                unlink_all((name for name in os.listdir(handle) if name != mark), handle)
                sync(handle, path)
                unlink_all([mark], handle)
                path.rmdir()

    @contextmanager
    def _ours(self, path: Path) -> Iterator[int]:
        """Open a folder, then make sure that the lock that this process took is held still.

        A process may be stopped for minutes at any call. What it deletes by the opened folder is
        never in a folder that another run has put there since.
        """
        with opened_folder(path, os.O_NOFOLLOW) as handle:
            lock = None if self._lock is None else self._lock()
            if lock is not None and lock.is_held:
                lock.check()
            yield handle
