"""What may be left of a storage when power fails: all that its protocol does not promise is lost.

Promised are the bytes of what was written, not its name: that is durable once something in its
folder was committed. So are commits and single deletes. New, renamed and deleted folders are not,
each for itself, until something in them is committed. A mark is there as soon as its new folder is,
and goes once all other files of a deleted folder are gone. What was written without a sync may be
cut short until something else is committed.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..storage import Storage
from .faulty_storage import Operation

FULLY_TRIED = 7
"""Of so many things that may be lost, every combination is tried."""

Tree = frozenset[tuple[str, bytes | None]]
"""Name and bytes of each file, name and None of each folder."""

_Folders = dict[str, dict[str, bytes]]
T = TypeVar("T")


@dataclass(frozen=True)
class _PendingStep:
    """A change that may be lost."""

    kind: str
    folder: str
    file: str = ""
    data: bytes = b""
    new: str = ""
    is_synced: bool = True


class PowerLoss:
    """A fault that harms nothing: it follows a storage, and says what power loss would leave of it.

    Args:
        look: is given all trees that there may be, in the middle of each write and after each
            change.
        start: what lies there already, and is durable.
    """

    def __init__(self, look: Callable[[set[Tree]], None], start: Tree = frozenset()) -> None:
        self._look = look
        self._durable = _folders(start)
        self._pending: list[_PendingStep] = []
        self._one_at_a_time = threading.Lock()

    def __call__(self, operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        """Do what is asked for, and look."""
        act = getattr(self, f"_{operation.kind}", None)
        if act is None:
            return really(*arguments)
        with self._one_at_a_time:
            result = act(really, *arguments)
            self._look(self.trees())
        return result

    def trees(self) -> set[Tree]:
        """Return all that may be left now."""
        return {_tree(self._after(steps)) for steps in choices(self._pending)}

    def _after(self, steps: Sequence[_PendingStep]) -> _Folders:
        folders = {name: dict(files) for name, files in self._durable.items()}
        for step in steps:
            _apply(folders, step)
        return folders

    def _new_folder(self, really: Callable[..., Any], folder: str) -> None:
        really(folder)
        self._pending.append(_PendingStep("new_folder", folder))

    def _new_marked_folder(self, really: Callable[..., Any], folder: str, mark: str) -> None:
        really(folder, mark)
        self._pending.append(_PendingStep("new_folder", folder, mark))

    def _write_unsynced(self, really: Callable[..., Any], name: str, data: bytes) -> None:
        really(name, data)
        folder, _, file = name.partition("/")
        step = _PendingStep("write", folder, file, data[: len(data) // 2])
        self._pending += [step, replace(step, data=data, is_synced=False)]

    def _write(self, really: Callable[..., Any], name: str, parts: Any) -> None:
        data = b"".join(map(bytes, parts))
        folder, _, file = name.partition("/")
        step = _PendingStep("write", folder, file, data)
        self._pending.append(replace(step, data=data[: len(data) // 2]))
        try:
            self._look(self.trees())
            really(name, [data])
        finally:
            self._pending.pop()
        self._pending.append(step)

    def _link(self, really: Callable[..., Any], name: str, new: str) -> bool:
        is_linked: bool = really(name, new)
        if is_linked:
            folder, _, file = name.partition("/")
            data = self._after(self._pending)[folder][file]
            folder, _, file = new.partition("/")
            self._pending.append(_PendingStep("write", folder, file, data))
        return is_linked

    def _relink(self, really: Callable[..., Any], name: str, new: str) -> bool:
        is_linked: bool = really(name, new)
        if is_linked:
            folder, _, file = name.partition("/")
            self._put(new, self._after(self._pending)[folder][file])
        return is_linked

    def _replace(self, really: Callable[..., Any], name: str, parts: Any) -> None:
        data = b"".join(map(bytes, parts))
        really(name, [data])
        self._put(name, data)

    def _put(self, name: str, data: bytes) -> None:
        """Put a file in place durably, in a folder that is or is not."""
        folder, _, file = name.partition("/")
        of_file = [step for step in self._pending if (step.folder, step.file) == (folder, file)]
        self._pending = [step for step in self._pending if step not in of_file]
        step = _PendingStep("write", folder, file, data)
        if folder in self._durable:
            self._durable = {**self._durable, folder: {**self._durable[folder], file: data}}
        else:
            self._pending.append(step)

    def _commit(self, really: Callable[..., Any], name: str, data: bytes) -> None:
        really(name, data)
        folder, _, file = name.partition("/")
        # By now the system has written back what lay unsynced in other folders.
        self._settle(
            [step for step in self._pending if not step.is_synced and step.folder != folder]
        )
        of_folder = [step for step in self._pending if folder in (step.folder, step.new)]
        self._settle([step for step in of_folder if step.is_synced])
        self._settle([_PendingStep("write", folder, file, data)])

    def _rename_folder(self, really: Callable[..., Any], folder: str, new: str) -> None:
        really(folder, new)
        self._pending.append(_PendingStep("rename_folder", folder, new=new))

    def _delete(self, really: Callable[..., Any], name: str) -> None:
        really(name)
        self._drop(*name.split("/"))

    def _drop(self, folder: str, file: str) -> None:
        self._durable.get(folder, {}).pop(file, None)
        self._pending = [
            step for step in self._pending if (step.folder, step.file) != (folder, file)
        ]

    def _delete_unsynced(self, really: Callable[..., Any], name: str) -> None:
        really(name)
        folder, _, file = name.partition("/")
        self._pending.append(_PendingStep("delete", folder, file))

    def _turn_into_mark(
        self, really: Callable[..., Any], folder: str, file: str, mark: str
    ) -> None:
        was_there = folder in self._after(self._pending)
        really(folder, file, mark)
        if was_there:
            # One sync makes durable what was done in the folder before.
            self._settle([step for step in self._pending if folder in (step.folder, step.new)])
            data = self._durable[folder].pop(file, self._durable[folder].get(mark, b""))
            self._durable[folder][mark] = data

    def _delete_folder(self, really: Callable[..., Any], folder: str) -> None:
        really(folder)
        # File by file, and any of them may be there still.
        for file in self._after(self._pending).get(folder, {}):
            self._pending.append(_PendingStep("delete", folder, file))
        self._pending.append(_PendingStep("delete_folder", folder))

    def _delete_marked_folder(self, really: Callable[..., Any], folder: str, mark: str) -> None:
        files = self._after(self._pending).get(folder, {})
        really(folder, mark)
        self._pending += [_PendingStep("delete", folder, file) for file in files if file != mark]
        self._look(self.trees())
        self._settle([step for step in self._pending if folder in (step.folder, step.new)])
        self._pending += [
            _PendingStep("delete", folder, mark),
            _PendingStep("delete_folder", folder),
        ]

    def _settle(self, steps: Sequence[_PendingStep]) -> None:
        """Let steps have happened durably."""
        self._durable = self._after(steps)
        self._pending = [step for step in self._pending if step not in steps]


def contents(storage: Storage) -> Tree:
    """Read all that lies in a storage, folders of folders left out."""
    found: list[tuple[str, bytes | None]] = []
    for folder in storage.folders():
        found.append((folder, None))
        for file in storage.files(folder):
            with storage.open(f"{folder}/{file}") as opened:
                found.append((f"{folder}/{file}", opened.readall()))
    return frozenset(found)


def fill(storage: Storage, tree: Tree) -> None:
    """Put a tree into an empty storage."""
    lock = storage.lock()
    for name, data in sorted(tree, key=lambda one: one[0]):
        if data is None:
            storage.new_folder(name)
        else:
            storage.write(name, [data])
    lock.release()


def choices(changes: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """Yield which changes may have happened: all combinations of few, the telling ones of many."""
    every = range(len(changes) + 1)
    if len(changes) <= FULLY_TRIED:
        for count in every:
            yield from itertools.combinations(changes, count)
        return
    for count in every:
        yield tuple(changes[:count])
    for index in range(len(changes)):
        yield (changes[index],)
        yield (*changes[:index], *changes[index + 1 :])


def _apply(folders: _Folders, step: _PendingStep) -> None:
    if step.kind == "new_folder":
        folders.setdefault(step.folder, {step.file: b""} if step.file else {})
    elif step.kind == "delete_folder":
        folders.pop(step.folder, None)
    elif step.kind == "rename_folder" and step.folder in folders:
        folders[step.new] = folders.pop(step.folder)
    elif step.kind == "write" and step.folder in folders:
        folders[step.folder][step.file] = step.data
    elif step.kind == "delete":
        folders.get(step.folder, {}).pop(step.file, None)


def _tree(folders: _Folders) -> Tree:
    found: list[tuple[str, bytes | None]] = []
    for folder, files in folders.items():
        found.append((folder, None))
        found += [(f"{folder}/{file}", data) for file, data in files.items()]
    return frozenset(found)


def _folders(tree: Tree) -> _Folders:
    folders: _Folders = {name: {} for name, data in tree if data is None}
    for name, data in tree:
        folder, _, file = name.partition("/")
        if data is not None:
            folders[folder][file] = data
    return folders
