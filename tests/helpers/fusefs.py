"""A file system in user space over a folder, which refuses on command what file systems refuse.

It speaks the kernel's protocol (`linux/fuse.h`) itself, so it needs root and /dev/fuse, and nothing
installed. Two mounts of one folder are what two machines have of a network file system: each has
caches of its own, and locks only as far as the server passes them on.

Run as `python fusefs.py FOLDER MOUNT_POINT RULES`; RULES is a file of JSON, read at each request:
`errors` (errno by operation), `readonly`, `seconds` (for which the kernel may cache names and
attributes), `local_locks` (whether locks stay within this mount), `log` (a file that gets each
write and each fsync, in order, as `read_log` reads it).
"""

import ctypes
import errno
import fcntl
import json
import os
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = {
    1: "lookup",
    2: "forget",
    3: "getattr",
    4: "setattr",
    8: "mknod",
    9: "mkdir",
    10: "unlink",
    11: "rmdir",
    12: "rename",
    13: "link",
    14: "open",
    15: "read",
    16: "write",
    17: "statfs",
    18: "release",
    20: "fsync",
    25: "flush",
    26: "init",
    27: "opendir",
    28: "readdir",
    29: "releasedir",
    30: "fsyncdir",
    32: "flock",
    33: "flock",
    35: "create",
    36: "interrupt",
    38: "destroy",
    42: "batch_forget",
    45: "rename2",
}
"""Operations by the kernel's number; what has none is refused with ENOSYS."""
CHANGES = (
    *("setattr", "mknod", "mkdir", "unlink", "rmdir", "rename", "rename2", "link", "write"),
    "create",
)
_SILENT = ("forget", "batch_forget", "interrupt")
_FLOCK_LOCKS, _ATOMIC_TRUNCATE, _BIG_WRITES, _AUTO_INVALIDATE = 1 << 10, 1 << 3, 1 << 5, 1 << 12
_ROOT = 1
_WRITE = struct.Struct("<QI")  # offset and size; a size of 0 is an fsync


class Server:
    """Answers the kernel, one request after the other.

    Args:
        folder: what is shown.
        rules: the file of rules.
        device: /dev/fuse, opened for one mount.
    """

    def __init__(self, folder: str, rules: Path, device: int) -> None:
        self._rules_file, self._device = rules, device
        self._rules: dict[str, Any] = {}
        self._nodes = {_ROOT: os.open(folder, os.O_PATH)}
        self._numbers: dict[tuple[int, int], int] = {}
        self._looked_up: dict[int, int] = {}
        self._last = _ROOT

    def serve(self) -> None:
        """Answer until the mount is gone."""
        while True:
            try:
                request = os.read(self._device, 2**20 + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        name, code, data = NAMES.get(opcode, ""), 0, b""
        try:
            self._refuse(name)
            data = getattr(self, f"_{name}")(node, request[40:]) or b""
        except OSError as error:
            code = -(error.errno or errno.EIO)
        if name not in _SILENT:
            with suppress(FileNotFoundError):  # an interrupted request
                os.write(self._device, struct.pack("<IiQ", 16 + len(data), code, unique) + data)

    def _refuse(self, name: str) -> None:
        with suppress(ValueError):
            self._rules = json.loads(self._rules_file.read_text())
        code = self._rules.get("errors", {}).get(name)
        if not name:
            code = errno.ENOSYS
        elif self._rules.get("readonly") and name in CHANGES:
            code = errno.EROFS
        if code:
            raise OSError(code, os.strerror(code))

    # --- nodes

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self._nodes[node]}"

    def _entry(self, parent: int, name: bytes) -> bytes:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._nodes[parent])
        status = os.fstat(handle)
        key = (status.st_dev, status.st_ino)
        node = self._numbers.get(key, 0)
        if node:
            os.close(handle)
        else:
            self._last += 1
            node = self._numbers[key] = self._last
            self._nodes[node] = handle
        self._looked_up[node] = self._looked_up.get(node, 0) + 1
        seconds = self._rules.get("seconds", 0)
        return struct.pack("<QQQQII", node, 0, seconds, seconds, 0, 0) + _attributes(status)

    def _forgotten(self, node: int, count: int) -> None:
        self._looked_up[node] = self._looked_up.get(node, 0) - count
        if node != _ROOT and self._looked_up[node] <= 0:
            del self._looked_up[node]
            handle = self._nodes.pop(node)
            status = os.fstat(handle)
            self._numbers.pop((status.st_dev, status.st_ino), None)
            os.close(handle)

    def _forget(self, node: int, body: bytes) -> None:
        self._forgotten(node, struct.unpack_from("<Q", body)[0])

    def _batch_forget(self, _: int, body: bytes) -> None:
        (count,) = struct.unpack_from("<I", body)
        for index in range(count):
            self._forgotten(*struct.unpack_from("<QQ", body, 8 + 16 * index))

    # --- requests

    def _init(self, _: int, body: bytes) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<IIII", body)
        with suppress(ValueError, OSError):
            self._rules = json.loads(self._rules_file.read_text())
        wanted = _ATOMIC_TRUNCATE | _BIG_WRITES | _AUTO_INVALIDATE
        if not self._rules.get("local_locks"):
            wanted |= _FLOCK_LOCKS
        head = struct.pack("<IIIIHHI", 7, min(minor, 31), readahead, flags & wanted, 12, 9, 2**17)
        return head + struct.pack("<IHHI7I", 1, 0, 0, 0, *[0] * 7)

    def _destroy(self, _: int, body: bytes) -> None:
        pass

    def _interrupt(self, _: int, body: bytes) -> None:
        pass

    def _lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(node, _strings(body)[0])

    def _getattr(self, node: int, body: bytes) -> bytes:
        status = os.fstat(self._nodes[node])
        return struct.pack("<QII", self._rules.get("seconds", 0), 0, 0) + _attributes(status)

    def _setattr(self, node: int, body: bytes) -> bytes:
        (valid,) = struct.unpack_from("<I", body)
        path = self._path(node)
        if valid & 1:
            os.chmod(path, stat.S_IMODE(struct.unpack_from("<I", body, 68)[0]))
        if valid & 6:
            user, group = struct.unpack_from("<II", body, 76)
            os.chown(path, user if valid & 2 else -1, group if valid & 4 else -1)
        if valid & 8:
            os.truncate(path, struct.unpack_from("<Q", body, 16)[0])
        return self._getattr(node, body)

    def _mknod(self, node: int, body: bytes) -> bytes:
        name = _strings(body[16:])[0]
        os.mknod(name, struct.unpack_from("<I", body)[0], dir_fd=self._nodes[node])
        return self._entry(node, name)

    def _mkdir(self, node: int, body: bytes) -> bytes:
        name = _strings(body[8:])[0]
        os.mkdir(name, struct.unpack_from("<I", body)[0], dir_fd=self._nodes[node])
        return self._entry(node, name)

    def _unlink(self, node: int, body: bytes) -> None:
        os.unlink(_strings(body)[0], dir_fd=self._nodes[node])

    def _rmdir(self, node: int, body: bytes) -> None:
        os.rmdir(_strings(body)[0], dir_fd=self._nodes[node])

    def _rename(self, node: int, body: bytes, start: int = 8) -> None:
        old, new = _strings(body[start:])
        target = self._nodes[struct.unpack_from("<Q", body)[0]]
        os.rename(old, new, src_dir_fd=self._nodes[node], dst_dir_fd=target)

    def _rename2(self, node: int, body: bytes) -> None:
        if struct.unpack_from("<I", body, 8)[0]:
            raise OSError(errno.EINVAL, "no flags")
        self._refuse("rename")
        self._rename(node, body, 16)

    def _link(self, node: int, body: bytes) -> bytes:
        (old,), name = struct.unpack_from("<Q", body), _strings(body[8:])[0]
        os.link(self._path(old), name, dst_dir_fd=self._nodes[node], follow_symlinks=True)
        return self._entry(node, name)

    def _open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        if self._rules.get("readonly") and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "read-only")
        # The kernel appends by itself, and reads pages before it writes a part of one.
        flags = os.O_RDWR if flags & os.O_WRONLY else flags & ~(os.O_APPEND | os.O_NOFOLLOW)
        flags &= ~os.O_DIRECT
        return struct.pack("<QIi", os.open(self._path(node), flags), 0, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        name = _strings(body[16:])[0]
        flags = (flags & ~(os.O_APPEND | os.O_WRONLY | os.O_DIRECT)) | os.O_RDWR | os.O_NOFOLLOW
        handle = os.open(name, flags | os.O_CREAT, stat.S_IMODE(mode), dir_fd=self._nodes[node])
        return self._entry(node, name) + struct.pack("<QIi", handle, 0, 0)

    def _read(self, _: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(handle, size, offset)

    def _write(self, _: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        self._note(_WRITE.pack(offset, size) + body[40 : 40 + size])
        return struct.pack("<II", os.pwrite(handle, body[40 : 40 + size], offset), 0)

    def _statfs(self, _: int, body: bytes) -> bytes:
        found = os.fstatvfs(self._nodes[_ROOT])
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q10I", *counts, found.f_bsize, 255, found.f_frsize, *[0] * 7)

    def _flush(self, _: int, body: bytes) -> None:
        pass

    def _fsync(self, _: int, body: bytes) -> None:
        self._note(_WRITE.pack(0, 0))
        os.fsync(struct.unpack_from("<Q", body)[0])

    def _note(self, what: bytes) -> None:
        if "log" in self._rules:
            with open(self._rules["log"], "ab") as log:
                log.write(what)

    def _release(self, _: int, body: bytes) -> None:
        os.close(struct.unpack_from("<Q", body)[0])

    def _opendir(self, node: int, body: bytes) -> bytes:
        handle = os.open(self._path(node), os.O_RDONLY | os.O_DIRECTORY)
        return struct.pack("<QIi", handle, 0, 0)

    _releasedir = _release
    _fsyncdir = _fsync

    def _readdir(self, _: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        found = b""
        with os.scandir(handle) as entries:
            for index, entry in enumerate(sorted(entries, key=lambda one: one.name)):
                name = os.fsencode(entry.name)
                kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
                one = struct.pack("<QQII", entry.inode(), index + 1, len(name), kind) + name
                one += bytes(-len(one) % 8)
                if index >= offset and len(found) + len(one) <= size:
                    found += one
        return found

    def _flock(self, _: int, body: bytes) -> None:
        handle, _owner, _start, _end, kind = struct.unpack_from("<QQQQI", body)
        modes = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX}
        fcntl.flock(handle, modes.get(kind, fcntl.LOCK_UN) | fcntl.LOCK_NB)


def read_log(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield where in a log each write ends, the offset, and the bytes; an fsync has none."""
    at = 0
    while at < len(data):
        offset, size = _WRITE.unpack_from(data, at)
        start, at = at + _WRITE.size, at + _WRITE.size + size
        yield at, offset, data[start:at]


def _strings(body: bytes) -> list[bytes]:
    return body.split(b"\0")[:-1]


def _attributes(status: os.stat_result) -> bytes:
    times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
    return struct.pack(
        "<6Q10I",
        *(status.st_ino, status.st_size, status.st_blocks),
        *(time // 10**9 for time in times),
        *(time % 10**9 for time in times),
        *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev),
        *(4096, 0),
    )


def main(folder: str, point: str, rules: str) -> None:
    """Mount and serve until it is unmounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    kind = b"fuse"
    if libc.mount(b"solver-test", point.encode(), kind, 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), point)
    Server(folder, Path(rules), device).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
