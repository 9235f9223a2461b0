"""Checkpoints in a folder of a file system, written so that a power cut loses nothing acknowledged.

What is written is synced before it is named, and the folder is synced before that is believed. A
failed fsync condemns the file: the kernel may have dropped the pages and call the next fsync a
success (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

import errno
import io
import logging
import os
import secrets
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CannotSave, MissingCheckpoint, UnreadableCheckpoint
from ..layout import TEMPORARY
from ..machine import cause_and_cure, unreadable
from ..once import Once
from .direct import write_parts
from .lock import LOCK, FolderLock
from .readahead import ReadAhead

# Too many links to this one file, or the file is gone by now.
_OF_ONE_FILE = {errno.EMLINK, errno.ENOENT}
# Bytes of the longest name of a folder: that of a checkpoint that was set aside.
_FOLDER = 64
# The file system does not sync folders.
_UNKNOWN_CALL = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

# A folder that may not be opened, or is read-only, was there before.
_NOT_MADE_HERE = {errno.EACCES, errno.EPERM, errno.EROFS}

logger = logging.getLogger(__name__)


class LocalStorage:
    """Folders of files under `root`, which need not exist yet; see `Storage`."""

    def __init__(self, root: Path) -> None:
        # Wherever the process may go.
        self.root = root.absolute()
        self._once = Once(logger)
        self._lock: weakref.ref[FolderLock] | None = None

    def describe(self, name: str = "") -> str:
        """Full path of a name."""
        return str(self.root / name)

    def folders(self) -> list[str]:
        """Names of the folders under the root."""
        entries = self._scan(self.root)
        try:
            return [entry.name for entry in entries if _is_folder(entry)]
        except OSError as error:
            raise _unreadable(self.root, error) from error

    def files(self, folder: str) -> list[str]:
        """Names of all that lies in a folder."""
        return [entry.name for entry in self._scan(self.root / folder)]

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size in bytes and time of change in nanoseconds of a file."""
        try:
            status = self._status(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(self.root / name, error) from error
        return status.st_size, status.st_mtime_ns

    def _status(self, name: str) -> os.stat_result:
        # A path object costs several times as much as the call, which each save makes often.
        return os.stat(f"{self.root}/{name}", follow_symlinks=False)

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        """Open a regular file for reading; `uncached` drops what memory has of it before."""
        path = self.root / name
        try:
            # Without O_NONBLOCK the open of a planted pipe would wait for ever.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise MissingCheckpoint(f"{path} does not exist") from error
            # The system says the same of a disk that is gone, or of a loop above the file.
            if error.errno == errno.ELOOP and _is_odd(path):
                raise MissingCheckpoint(f"{path} is a link, which is not followed") from error
            if error.errno == errno.ENXIO and _is_odd(path):
                raise MissingCheckpoint(f"{path} is not a regular file") from error
            raise _unreadable(path, error) from error
        try:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
        except OSError as error:
            _close(handle, path)
            raise _unreadable(path, error) from error
        if not regular:
            _close(handle, path)
            raise MissingCheckpoint(f"{path} is not a regular file")
        if uncached and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return _File(handle, path)

    def free(self) -> int | None:
        """Bytes that the file system gives to a user who is not root."""
        for folder in (self.root, *self.root.parents):
            try:
                status = os.statvfs(folder)
            except FileNotFoundError:
                continue
            except OSError:
                return None
            return status.f_bavail * status.f_frsize
        return None

    def longest_name(self) -> int:
        """Most bytes that the name of a file in a folder may have, so that its path fits too."""
        beside = len(os.fsencode(self.root)) + _FOLDER + len("//\0")
        return min(self._limit("PC_NAME_MAX", 255), self._limit("PC_PATH_MAX", 4096) - beside)

    def _limit(self, which: str, usual: int) -> int:
        for folder in (self.root, *self.root.parents):
            try:
                found = os.pathconf(folder, which)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                break
            return found if found > 0 else usual
        return usual

    def ignores_case(self) -> bool:
        """Whether names that differ in case alone are the same, as far as can be told."""
        for folder in (self.root, *self.root.parents):
            other = folder.with_name(folder.name.swapcase()) if folder.name else folder
            try:
                if other != folder and folder.exists():
                    return other.exists() and other.samefile(folder)
            except OSError:
                break
        return False

    def lock(self) -> FolderLock:
        """Make the root durable, and take the lock on it; see `FolderLock`."""
        with _saving(self.root):
            # Also when it is there: the process that made it may have been killed before the sync.
            self.root.mkdir(parents=True, exist_ok=True)
            _sync_upwards(self.root)
        with _saving(self.root / LOCK):
            lock = FolderLock(self.root)
        self._lock = weakref.ref(lock)
        return lock

    def new_folder(self, folder: str) -> None:
        """Make a folder that must not exist yet."""
        path = self.root / folder
        with _saving(path):
            path.mkdir()
            try:
                _sync_folder(self.root)
            except BaseException:
                with suppress(OSError):
                    path.rmdir()
                raise

    def new_marked_folder(self, folder: str, mark: str) -> None:
        """Make a folder, and sync the mark in it; what is committed there makes both durable."""
        path = self.root / folder
        with _saving(path):
            path.mkdir()
            try:
                _create(path / mark)
                _sync_folder(path)
            except BaseException:
                with suppress(OSError):
                    (path / mark).unlink(missing_ok=True)
                    path.rmdir()
                raise

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a new file and sync it."""
        path = self.root / name
        with _saving(path):
            _refuse_link(path.parent)
            _write_new(path, parts)

    def write_unsynced(self, name: str, data: bytes) -> None:
        """Write a new file; the system writes it to the disk when it likes."""
        path = self.root / name
        with _saving(path):
            _refuse_link(path.parent)
            _write_new(path, [data], is_synced=False)

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
        made = _temporary(path) if replace else path
        with _saving(path):
            _refuse_link(path.parent)
            identity = self.identity(name)
            if identity is None:
                return False
            if replace and identity == self.identity(new):
                return True
            try:
                os.link(self.root / name, made, follow_symlinks=False)
                if replace:
                    _put(made, path)
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
        temporary = _temporary(path)
        with _saving(path):
            _refuse_link(path.parent)
            _write_new(temporary, parts)
            _put(temporary, path)

    def commit(self, name: str, data: bytes) -> None:
        """Sync the folder, then put the file in place by a rename and sync the folder again."""
        self.commit_while(name, data, lambda: None)

    def commit_while(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """Commit, see `fencing`: `check` is called right before the rename.

        A folder that another process put in the place of this one since does not hold the file
        that is renamed.
        """
        path = self.root / name
        temporary = _temporary(path)
        with _saving(path):
            _refuse_link(path.parent)
            _write_new(temporary, [data])
            try:
                _sync_folder(path.parent)
                check()
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            _put(temporary, path)
            _sync_folder(self.root)

    def rename_folder(self, folder: str, new: str) -> None:
        """Give a folder a new name."""
        path = self.root / folder
        with _saving(path):
            # rename() would silently replace an empty folder.
            if (self.root / new).exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
            path.rename(self.root / new)
            _sync_folder(self.root)

    def delete(self, name: str) -> None:
        """Delete one file and sync its folder."""
        path = self.root / name
        with _saving(path, "delete"):
            _refuse_link(path.parent)
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)

    def delete_unsynced(self, name: str) -> None:
        """Delete one file."""
        path = self.root / name
        with _saving(path, "delete"):
            _refuse_link(path.parent)
            path.unlink(missing_ok=True)

    def turn_into_mark(self, folder: str, file: str, mark: str) -> None:
        """Rename the file, or make the mark where there is no such file; sync the folder."""
        path = self.root / folder
        with _saving(path / file, "delete"):
            _refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                try:
                    os.rename(file, mark, src_dir_fd=handle, dst_dir_fd=handle)
                except FileNotFoundError:
                    with suppress(FileExistsError):
                        os.close(os.open(mark, _NEW, 0o666, dir_fd=handle))
                _sync(handle, path)

    def delete_folder(self, folder: str) -> None:
        """Delete a folder and the files in it; a folder inside it is not ours and stops this."""
        path = self.root / folder
        with _saving(path, "delete"):
            _refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                _unlink_all(os.listdir(handle), handle)
                path.rmdir()
                _sync_folder(self.root)

    def delete_marked_folder(self, folder: str, mark: str) -> None:
        """Delete the files, sync that, then delete the mark and the folder.

        The last step is not synced: after a loss of power the mark may be there still.
        """
        path = self.root / folder
        with _saving(path, "delete"):
            _refuse_link(path)
            with suppress(FileNotFoundError, NotADirectoryError), self._ours(path) as handle:
                _unlink_all((name for name in os.listdir(handle) if name != mark), handle)
                _sync(handle, path)
                _unlink_all([mark], handle)
                path.rmdir()

    @contextmanager
    def _ours(self, path: Path) -> Iterator[int]:
        """Open a folder, then make sure that the lock that this process took is held still.

        A process may be stopped for minutes at any call. What it deletes by the opened folder is
        never in a folder that another run has put there since.
        """
        with _opened_folder(path, os.O_NOFOLLOW) as handle:
            lock = None if self._lock is None else self._lock()
            if lock is not None and lock.is_held:
                lock.check()
            yield handle

    def _scan(self, path: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError) as error:
            # A link to a disk that is not mounted does not mean that nothing was saved. A folder
            # that is there all the same does not either.
            if path.is_symlink() or path.is_dir():
                raise _unreadable(path, error) from error
            return []
        except OSError as error:
            raise _unreadable(path, error) from error


def _is_odd(path: Path) -> bool:
    """Whether it is there and no regular file; False if the system does not say."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


class _File(io.RawIOBase):
    """A file whose read errors name it, and of which the system reads ahead of large reads."""

    def __init__(self, handle: int, path: Path) -> None:
        self._raw = io.FileIO(handle, "r")
        self._path = path
        self._ahead = ReadAhead(handle)

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        try:
            self._ahead.reading(len(buffer))
            count = self._raw.readinto(buffer)
            if count is None:
                # No bytes now, which is no end of the file.
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        if not self.closed:
            super().close()
            try:
                self._raw.close()
            except OSError as error:
                # The bytes that were read are checked by their digests.
                logger.debug("Closing %s failed, after it was read: %s", self._path, error)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # A link in a circle leads nowhere.
        if error.errno == errno.ELOOP:
            return False
        raise


def _unlink_all(names: Iterable[str], folder: int) -> None:
    """Delete as many files of an opened folder as can be deleted, then raise the first error."""
    failure: OSError | None = None
    for name in names:
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _close(handle: int, path: Path) -> None:
    """Close what was not written to, or was a folder: nothing depends on how that ends."""
    try:
        os.close(handle)
    except OSError as error:
        logger.debug("Closing %s failed: %s", path, error)


def _refuse_link(folder: Path) -> None:
    # What lies behind it is not ours to change; reading through it does no harm.
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a link, which is not followed", str(folder))


def _temporary(path: Path) -> Path:
    return path.with_name(TEMPORARY + secrets.token_hex(8))


def _put(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _create(path: Path) -> None:
    _close(os.open(path, _NEW, 0o666), path)


def _write_new(path: Path, parts: Iterable[bytes | memoryview], *, is_synced: bool = True) -> None:
    handle = os.open(path, _NEW, 0o666)
    try:
        try:
            write_parts(handle, parts)
            if is_synced:
                os.fsync(handle)
        except BaseException:
            _close(handle, path)
            raise
        _close_written(handle)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _close_written(handle: int) -> None:
    try:
        os.close(handle)
    except OSError as error:
        # File systems that upload a file when it is closed say only here that they could not, so
        # this file does not count.
        text = f"{error.strerror or error} (said when the file was closed)"
        raise OSError(error.errno, text) from error


@contextmanager
def _opened_folder(path: Path, flags: int = 0) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield handle
    finally:
        _close(handle, path)


def _sync_folder(path: Path) -> None:
    with _opened_folder(path) as handle:
        _sync(handle, path)


def _sync(handle: int, path: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        # File systems without a call for this keep names safe in another way, or not at all.
        if error.errno not in _UNKNOWN_CALL:
            raise
        logger.debug("Syncing %s failed: %s", path, error)


def _sync_upwards(path: Path) -> None:
    # A folder that its parent has not been synced for is gone after a power cut, with all in it.
    for ancestor in (path, *Path(os.path.realpath(path)).parents):
        try:
            _sync_folder(ancestor)
        except OSError as error:
            if error.errno not in _NOT_MADE_HERE:
                raise


@contextmanager
def _saving(path: Path, verb: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, CannotSave | UnreadableCheckpoint):
            raise
        hint = _hint(path, error)
        cause = error.strerror or repr(error)
        raise CannotSave(f"cannot {verb} {path}: {cause}; {hint}") from error


def _hint(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC and _has_no_inodes(path):
        return (
            "the file system has free bytes but no free inodes: delete files, however small, or "
            "lower what `checkpoint.*` keeps"
        )
    return cause_and_cure(error, "check the file system")[1]


def _has_no_inodes(path: Path) -> bool:
    """Whether a file system that counts inodes has none left, though it has bytes."""
    for folder in path.parents:
        try:
            status = os.statvfs(folder)
        except OSError:
            continue
        return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0
    return False


def _unreadable(path: Path, error: OSError) -> UnreadableCheckpoint:
    return unreadable(str(path), error)
