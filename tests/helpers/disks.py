"""A disk that keeps no more than POSIX promises: what a run did to it, and what power loss leaves.

What was written to a file and not synced may be there, missing, cut short or zeros. A name that
was made, changed or removed in a folder may be so or not, each for itself, until that folder is
synced.
"""

import fcntl
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults import OPTIONS, expected, fingerprint, listing, train

from checkpoint import Checkpointer
from checkpoint.testing import Call, SystemCalls, Tree, choices

CALLS = (
    *("open", "write", "pwrite", "fsync", "fdatasync", "mkdir", "rename", "replace", "link"),
    *("unlink", "rmdir"),
)


@dataclass(frozen=True)
class Event:
    """A call that succeeded, or `save` when a save has returned."""

    kind: str
    path: str = ""
    data: bytes = b""
    target: str = ""
    epoch: int = 0
    offset: int | None = None


class PowerCut(BaseException):
    """Stands for kill -9 where the process has to live on to be looked at."""


class Recorder:
    """Notes all that a run does to the disk, from any thread, and ends it at call number `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.events: list[Event] = []
        self._left = last
        # What is noted first was done first.
        self._one_at_a_time = threading.RLock()

    def __call__(self, call: Call, really: Callable[..., Any], *arguments: Any) -> Any:
        with self.turn():
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    self.end()
            result = really(*arguments)
            for event in _events(call, arguments, result):
                self.note(event)
        return result

    def turn(self) -> AbstractContextManager[Any]:
        """Let no other call happen meanwhile."""
        return self._one_at_a_time

    def note(self, event: Event) -> None:
        self.events.append(event)

    def end(self) -> None:
        raise PowerCut

    def acknowledge(self, epoch: int) -> None:
        with self.turn():
            self.note(Event("save", epoch=epoch))


class SharedRecorder(Recorder):
    """One of several processes that note into one file what they do, in the order of all calls."""

    def __init__(self, file: Path, last: int | None = None) -> None:
        super().__init__()
        self._last = last
        self._file = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with super().turn():
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def note(self, event: Event) -> None:
        line = asdict(event) | {"data": event.data.hex()}
        # The file is read by its lines, and its size is no event.
        _write(self._file, json.dumps(line).encode() + b"\n")
        if self._last is not None and _lines(self._file) > self._last:
            os.killpg(0, signal.SIGKILL)


_write = os.write  # the one that is not interposed


def _lines(handle: int) -> int:
    return os.pread(handle, os.fstat(handle).st_size, 0).count(b"\n")


def noted(file: Path) -> list[Event]:
    """Return what all processes noted into a file."""
    lines = (json.loads(line) for line in file.read_text().splitlines())
    return [Event(**line | {"data": bytes.fromhex(line["data"])}) for line in lines]


def _events(call: Call, arguments: tuple[Any, ...], result: Any) -> Iterator[Event]:
    if call.kind in ("write", "pwrite"):
        data, offset = bytes(arguments[1][:result]), (*arguments, None)[2]
        yield Event("write", call.path, data, offset=offset)
    elif call.kind in ("rename", "replace", "link"):
        kind = call.kind.replace("replace", "rename")
        # Relative to the opened folder that both are in.
        target = os.path.join(os.path.dirname(call.path), arguments[1])
        yield Event(kind, call.path, target=target)
    elif call.kind != "open":
        yield Event(call.kind.replace("fdatasync", "fsync"), call.path)
    elif isinstance(arguments[1], int) and arguments[1] & os.O_CREAT:
        yield Event("create", call.path)


def recorded(folder: Path, epochs: int, last: int | None = None) -> list[Event]:
    """Run in a new folder, or go on in it; return what that did to the disk."""
    recorder = Recorder(last)
    try:
        with SystemCalls(recorder, only=CALLS):
            if not folder.exists():
                # Dora makes it, and does not sync it.
                os.mkdir(folder)
            newest = Checkpointer(folder, **OPTIONS).load_newest(quarantine=True)
            done = 0 if newest is None else newest.manifest.position.epoch
            train(folder, done + 1, epochs, recorder.acknowledge)
    except PowerCut:
        pass
    return recorder.events


# --- a disk that loses what it may


@dataclass
class Node:
    """A file or folder: what is durable of it, and what has happened to it since."""

    is_folder: bool
    data: bytearray = field(default_factory=bytearray)
    durable_data: bytes = b""
    names: dict[str, int] = field(default_factory=dict)
    durable_names: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A change of the names in a folder that is not synced; a rename is one change."""

    folder: int
    removed: str | None = None
    added: str | None = None
    node: int = -1


class Disk:
    """What a disk holds below `top`, event by event."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.nodes = [Node(is_folder=True)]
        self.pending: list[Change] = []
        self.acknowledged = 0

    def apply(self, event: Event) -> None:
        if event.kind == "save":
            self.acknowledged = event.epoch
        elif Path(event.path).is_relative_to(self.top):
            getattr(self, f"_{event.kind}")(event)

    def trees(self, *, worst: bool = False) -> Iterator[Tree]:
        """Yield all that may be found after a power failure now; the `worst`: nothing unsynced."""
        unsynced = [
            number
            for number, node in enumerate(self.nodes)
            if not node.is_folder and bytes(node.data) != node.durable_data
        ]
        for chosen in [()] if worst else choices(self.pending):
            for contents in [()] if worst else _contents([self.nodes[n] for n in unsynced]):
                yield self._tree(chosen, dict(zip(unsynced, contents, strict=False)))

    def _tree(self, changes: Iterable[Change], contents: dict[int, bytes]) -> Tree:
        names = {n: dict(node.durable_names) for n, node in enumerate(self.nodes)}
        for change in changes:
            if change.removed is not None:
                names[change.folder].pop(change.removed, None)
            if change.added is not None:
                names[change.folder][change.added] = change.node
        found: list[tuple[str, bytes | None]] = []
        waiting = [("", 0)]
        while waiting:
            path, number = waiting.pop()
            node = self.nodes[number]
            if not node.is_folder:
                found.append((path, contents.get(number, node.durable_data)))
                continue
            if path:
                found.append((path, None))
            waiting += [(f"{path}/{name}".lstrip("/"), n) for name, n in names[number].items()]
        return frozenset(found)

    def _at(self, path: str) -> tuple[int, str]:
        folder = 0
        *parents, name = Path(path).relative_to(self.top).parts
        for part in parents:
            folder = self.nodes[folder].names[part]
        return folder, name

    def _node(self, path: str) -> int:
        if Path(path) == self.top:
            return 0
        folder, name = self._at(path)
        return self.nodes[folder].names[name]

    def _add(self, path: str, node: Node) -> None:
        folder, name = self._at(path)
        self.nodes.append(node)
        self.nodes[folder].names[name] = len(self.nodes) - 1
        self.pending.append(Change(folder, added=name, node=len(self.nodes) - 1))

    def _create(self, event: Event) -> None:
        folder, name = self._at(event.path)
        # Opening the lock's file again makes none.
        if name not in self.nodes[folder].names:
            self._add(event.path, Node(is_folder=False))

    def _mkdir(self, event: Event) -> None:
        self._write_back()
        self._add(event.path, Node(is_folder=True))

    def _write_back(self) -> None:
        """Write back what the save before left unsynced, as the system does within seconds.

        That is the copy of the manifest, and that the mark is gone. The loss of these is tried
        until then; to try it with all that comes after would multiply the trees.
        """
        listed = {number for node in self.nodes for number in node.names.values()}
        for number in listed:
            node = self.nodes[number]
            if not any(self.nodes[one].is_folder for one in node.names.values()):
                node.durable_data, node.durable_names = bytes(node.data), dict(node.names)
                self.pending = [change for change in self.pending if change.folder != number]

    def _write(self, event: Event) -> None:
        data = self.nodes[self._node(event.path)].data
        start = len(data) if event.offset is None else event.offset
        data[start : start + len(event.data)] = event.data

    def _fsync(self, event: Event) -> None:
        number = self._node(event.path)
        node = self.nodes[number]
        node.durable_data, node.durable_names = bytes(node.data), dict(node.names)
        self.pending = [change for change in self.pending if change.folder != number]

    def _rename(self, event: Event) -> None:
        folder, old = self._at(event.path)
        same, new = self._at(event.target)
        assert folder == same, "a rename from one folder to another is not modelled"
        node = self.nodes[folder].names.pop(old)
        self.nodes[folder].names[new] = node
        self.pending.append(Change(folder, removed=old, added=new, node=node))

    def _link(self, event: Event) -> None:
        node = self._node(event.path)
        folder, name = self._at(event.target)
        self.nodes[folder].names[name] = node
        self.pending.append(Change(folder, added=name, node=node))

    def _unlink(self, event: Event) -> None:
        folder, name = self._at(event.path)
        del self.nodes[folder].names[name]
        self.pending.append(Change(folder, removed=name))

    _rmdir = _unlink


def _contents(nodes: list[Node]) -> Iterable[tuple[bytes, ...]]:
    """Yield what the files may hold: all combinations for few, the same kind of loss for many."""
    variants = list(map(_variants, nodes))
    return itertools.product(*variants) if len(nodes) <= 2 else zip(*variants, strict=True)


def _variants(node: Node) -> list[bytes]:
    whole = bytes(node.data)
    half = whole[: (len(whole) + len(node.durable_data)) // 2]
    return [node.durable_data, whole, half, bytes(len(whole))]


class Restorer:
    """Builds trees in a folder and restores from them, from each one only once.

    Args:
        work: the folder.
        caplog: must stay empty.
        every: of so many runs, one goes on after it restored.
        listed: what has to be the same then as after a run that nothing interrupted.
    """

    def __init__(
        self,
        work: Path,
        caplog: pytest.LogCaptureFixture,
        every: int,
        listed: Callable[[Path], list[str]] = listing,
    ) -> None:
        self.work, self.caplog, self.every, self.listed = work, caplog, every, listed
        self.epochs: dict[Tree, int] = {}

    def epoch(self, tree: Tree) -> int:
        """Restore from a tree; return the epoch that loads, 0 for none; go on from some."""
        if tree not in self.epochs:
            folder = self.work / f"tree-{len(self.epochs)}"
            _build(folder, tree)
            self.epochs[tree] = self._restore(folder / "xp")
            if len(self.epochs) % self.every == 0:
                self._go_on(folder / "xp", self.epochs[tree])
            _remove(folder)
        return self.epochs[tree]

    def _restore(self, folder: Path) -> int:
        self.caplog.clear()
        loaded = Checkpointer(folder, **OPTIONS).load_newest(quarantine=True)
        # No tree holds anything that looks committed and is not good.
        fine = (" was interrupted", " is made anew")
        texts = self.caplog.messages
        assert not [text for text in texts if not any(one in text for one in fine)]
        if loaded is None:
            return 0
        epoch = loaded.manifest.position.epoch
        assert fingerprint(loaded.state) == expected(epoch)
        return epoch

    def _go_on(self, folder: Path, epoch: int) -> None:
        train(folder, epoch + 1, epoch + 2)
        whole = self.work / f"whole-{epoch + 2}"
        if not whole.exists():
            train(whole, 1, epoch + 2)
        assert self.listed(folder) == self.listed(whole)


def _build(folder: Path, tree: Tree) -> None:
    folder.mkdir()
    for path, data in sorted(tree, key=lambda one: one[0]):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()
