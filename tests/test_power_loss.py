"""Power fails at any moment: every tree that a disk may hold then is built, and restored from.

The rules are those of POSIX and nothing kinder. What was written to a file and not synced may be
there, missing, cut short or zeros. A name that was made, changed or removed in a folder may be so
or not, each for itself, until that folder is synced.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import OPTIONS, Call, expected, fingerprint, interposed, listing, state, train

from checkpoint import Checkpointer
from checkpoint.storage import LocalStorage
from checkpoint.testing import Tree, choices

CALLS = (
    *("open", "write", "fsync", "fdatasync", "mkdir", "rename", "replace", "link"),
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


class PowerCut(BaseException):
    """Stands for kill -9 where the process has to live on to be looked at."""


class Recorder:
    """Notes all that a run does to the disk, and ends it at call number `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.events: list[Event] = []
        self._left = last

    def __call__(self, call: Call, really: Callable[..., Any]) -> Any:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise PowerCut
        result = really(*call.arguments, **call.options)
        if call.name == "write":
            self.events.append(Event("write", call.path, bytes(call.arguments[1][:result])))
        elif call.name in ("rename", "replace", "link"):
            kind = call.name.replace("replace", "rename")
            self.events.append(Event(kind, call.path, target=os.fspath(call.arguments[1])))
        elif call.name != "open":
            self.events.append(Event(call.name.replace("fdatasync", "fsync"), call.path))
        elif call.changes:
            self.events.append(Event("create", call.path))
        return result

    def acknowledge(self, epoch: int) -> None:
        self.events.append(Event("save", epoch=epoch))


def recorded(folder: Path, epochs: int, last: int | None = None) -> list[Event]:
    """Run in a new folder, or go on in it; return what that did to the disk."""
    recorder = Recorder(last)
    try:
        with interposed(recorder, CALLS):
            if not folder.exists():
                # Dora makes it, and does not sync it.
                os.mkdir(folder)
            newest = Checkpointer(folder, **OPTIONS).load_newest(set_aside=True)
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
        self._add(event.path, Node(is_folder=False))

    def _mkdir(self, event: Event) -> None:
        self._add(event.path, Node(is_folder=True))

    def _write(self, event: Event) -> None:
        self.nodes[self._node(event.path)].data += event.data

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


# --- the tests


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


class Restorer:
    """Builds trees in a folder and restores from them, from each one only once."""

    def __init__(self, work: Path, caplog: pytest.LogCaptureFixture, every: int) -> None:
        self.work, self.caplog, self.every = work, caplog, every
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
        loaded = Checkpointer(folder, **OPTIONS).load_newest(set_aside=True)
        # No tree holds anything that looks committed and is not good.
        assert not self.caplog.text
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
        assert listing(folder) == listing(whole)


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


def test_whatever_the_disk_kept_the_last_acknowledged_epoch_or_a_newer_one_loads(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    top = work / "run"
    top.mkdir()
    events = recorded(top / "xp", 6)
    restorer = Restorer(work, caplog, 1)
    disk = Disk(top)
    cases = 0
    for event in events:
        disk.apply(event)
        for tree in set(disk.trees()):
            cases += 1
            epoch = restorer.epoch(tree)
            assert disk.acknowledged <= epoch <= disk.acknowledged + 1, f"after {event}"
    assert disk.acknowledged == 6
    print(f"{cases} trees, {len(restorer.epochs)} of them different")
    assert cases > 500


def test_power_may_fail_in_a_run_that_goes_on_after_a_kill(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill leaves what no disk has promised: the next process must not build on it unsynced."""
    caplog.set_level(logging.WARNING)
    restorer = Restorer(work, caplog, 1000)
    calls = len(recorded(_new(work, "count") / "xp", 3))
    for last in range(calls):
        top = _new(work, f"killed-{last}")
        disk = Disk(top)
        for event in recorded(top / "xp", 3, last):
            disk.apply(event)
        for event in recorded(top / "xp", 4):
            disk.apply(event)
            for tree in disk.trees(worst=True):
                assert restorer.epoch(tree) >= disk.acknowledged, f"killed at {last}, {event}"
        assert disk.acknowledged == 4


def _new(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def test_every_commit_syncs_files_and_folders_in_the_order_that_makes_it_durable(
    work: Path,
) -> None:
    top = _new(work, "order")
    events = recorded(top / "xp", 6)
    root = top / "xp" / "checkpoints"
    commits = [
        (index, Path(event.target))
        for index, event in enumerate(events)
        if event.kind == "rename" and event.target.endswith("manifest.json")
    ]
    # Six saves, and two checkpoints thinned.
    assert len(commits) == 8
    for index, manifest in commits:
        before, after = events[:index], events[index + 1 :]
        folder = str(manifest.parent)
        for path in {e.path for e in before if e.kind == "create" and e.path.startswith(folder)}:
            written = _last(before, "write", path)
            assert written < _last(before, "fsync", path), f"{path} is named before it is synced"
        data = [e.path for e in before if e.kind == "create" and e.path.endswith("tensors")]
        created = max(_last(before, "create", p) for p in data if p.startswith(folder))
        assert created < _last(before, "fsync", folder)
        assert _last(before, "mkdir", folder) < _last(before, "fsync", str(root))
        following = [e.path for e in after[:2] if e.kind == "fsync"]
        assert following == [folder, str(root)]
    for ancestor in (root, top / "xp", top):
        assert _last(events[: commits[0][0]], "fsync", str(ancestor)) > 0


def test_a_deleted_checkpoint_is_none_before_its_data_goes(work: Path) -> None:
    top = _new(work, "deleting")
    events = recorded(top / "xp", 6)
    deleted = [
        index
        for index, event in enumerate(events)
        if event.kind == "unlink" and event.path.endswith("manifest.json")
    ]
    assert len(deleted) == 3
    for index in deleted:
        folder = str(Path(events[index].path).parent)
        assert events[index + 1] == Event("fsync", folder)
        gone = [e for e in events[:index] if e.kind == "unlink" and e.path.startswith(folder)]
        # What thinning took before is gone, and nothing else.
        assert len(gone) in (0, 2)


def _last(events: list[Event], kind: str, path: str) -> int:
    """Number of the last event of a kind about a path; -1 when there is none."""
    numbers = (n for n, e in enumerate(events) if (e.kind, e.path) == (kind, path))
    return max(numbers, default=-1)


def test_the_model_loses_what_is_not_synced(work: Path) -> None:
    """The tests above are worth what their disk is: it must lose a commit without fsync."""
    top = _new(work, "model")
    events = [event for event in recorded(top / "xp", 2) if event.kind != "fsync"]
    disk = Disk(top)
    for event in events:
        disk.apply(event)
    trees = set(disk.trees())
    assert frozenset() in trees
    # The file that is locked is there, and no listing has it.
    assert max(map(len, trees)) == len(listing(top)) + 1
    assert state(1).keys() == state(2).keys()


def test_a_link_is_lost_with_its_folder_and_never_half(work: Path) -> None:
    top = _new(work, "linked")
    storage = LocalStorage(top)
    recorder = Recorder()
    with interposed(recorder, CALLS):
        for folder in ("one", "two"):
            storage.new_folder(folder)
        storage.write("one/file", [b"bytes"])
        storage.commit("one/manifest.json", b"{}")
        assert storage.link("one/file", "two/file")
        recorder.acknowledge(1)
        storage.commit("two/manifest.json", b"{}")
        storage.delete_folder("one")
    disk = Disk(top)
    linked = ("two/file", b"bytes")
    for event in recorder.events:
        disk.apply(event)
        if event.kind == "save":
            assert {linked in tree for tree in disk.trees()} == {False, True}
        for tree in disk.trees():
            assert dict(tree).get("two/file", b"bytes") == b"bytes"
            assert ("two/manifest.json", b"{}") not in tree or linked in tree
    assert {linked in tree for tree in disk.trees()} == {True}
