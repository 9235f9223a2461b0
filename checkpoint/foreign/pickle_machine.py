"""A pickle interpreter that can build data and do nothing else.

It knows the instructions that protocols 2 to 5 use for data, and a closed list of names, each of
which leads to a builder in `builders`. No name is ever imported and nothing from the file is ever
called: a name that is not on the list is only a `Mention`, and using one is an error.
"""

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CorruptCheckpoint
from .memory_budget import MemoryBudget
from .pickle_builders import Builders, refusal
from .pickle_objects import Array, Builder, Node, NumpyType

_MAX_STACK = 1_000_000
_MAX_MARKS = 1_000
_MAX_LINE = 1_000
_MAX_LONG = 1_000
_CHUNK = 2**16
_BELOW_LATIN_EXTENDED = bytes(range(0xC4))


class _Machine:
    """The interpreter: a stack, marks in it, and a memo of what was built."""

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, builders: Builders, ledger: MemoryBudget
    ) -> None:
        self.read, self.size = read, size
        self.builders, self.ledger = builders, ledger
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        # The part of the file at hand: where it begins, its bytes, and how many of them are used.
        self.start, self.window, self.used = 0, b"", 0

    def run(self) -> Any:
        for _ in range(self.ledger.instructions):
            code = self.byte()
            if code == _STOP:
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise CorruptCheckpoint(
                    f"byte {self.start + self.used - 1} of its pickle, {code:#04x}, is not an "
                    "instruction that data needs"
                )
            instruction(self)
        raise CorruptCheckpoint(
            f"its pickle has more than the {self.ledger.instructions:,} instructions that a file "
            "of its size may have"
        )

    def refill(self, count: int) -> None:
        self.start, self.used = self.start + self.used, 0
        if count > self.size - self.start:
            raise CorruptCheckpoint("its pickle ends in the middle of an instruction")
        if len(self.stack) > _MAX_STACK:
            raise CorruptCheckpoint(f"its pickle keeps more than {_MAX_STACK:,} values waiting")
        self.window = self.read(self.start, min(max(count, _CHUNK), self.size - self.start))

    def byte(self) -> int:
        if self.used == len(self.window):
            self.refill(1)
        self.used += 1
        return self.window[self.used - 1]

    def take(self, count: int) -> bytes:
        if self.used + count > len(self.window):
            self.refill(count)
        data = self.window[self.used : self.used + count]
        self.used += count
        return data

    def counted(self, width: int) -> bytes:
        """Take bytes that are preceded by their number."""
        return self.take(int.from_bytes(self.take(width), "little"))

    def line(self) -> str:
        end = self.window.find(b"\n", self.used)
        if end < 0:
            self.refill(1)
            end = self.window.find(b"\n")
        if end < 0 or end - self.used > _MAX_LINE:
            raise CorruptCheckpoint("its pickle has a name without an end")
        return self.take(end + 1 - self.used)[:-1].decode()

    def push(self, size: int, value: Any) -> None:
        self.ledger.spend(size)
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self) -> None:
        if len(self.marks) >= _MAX_MARKS:
            raise CorruptCheckpoint("its pickle is nested too deeply")
        self.marks.append(len(self.stack))

    def text(self, width: int) -> None:
        data = self.counted(width)
        wide = not data.isascii() and data.translate(None, _BELOW_LATIN_EXTENDED)
        # Decoding wide text takes several times its size for a while.
        self.push(60 + len(data) * (6 if wide else 1), data.decode())

    def long(self, width: int) -> None:
        data = self.counted(width)
        if len(data) > _MAX_LONG:
            raise CorruptCheckpoint(f"its pickle has a number of {len(data)} bytes")
        self.push(40 + len(data), int.from_bytes(data, "little", signed=True))

    def raw(self, width: int, kind: Callable[[bytes], Any]) -> None:
        data = self.counted(width)
        self.push(60 + len(data), kind(data))

    def tuple(self, items: list[Any]) -> None:
        self.push(64 + 8 * len(items), tuple(items))

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise CorruptCheckpoint("its pickle takes more values than there are")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CorruptCheckpoint("its pickle appends to something that is not a list")
        self.ledger.spend(16 * len(items))
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise CorruptCheckpoint("its pickle sets items of something that is not a dict")
        self.ledger.spend((35 if type(target) is dict else 130) * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.builders.check_key(key)
            target[key] = value

    def add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise CorruptCheckpoint("its pickle adds items to something that is not a set")
        self.stack[-1].update(self.builders.elements(items))

    def frozen_set(self) -> None:
        self.stack.append(frozenset(self.builders.elements(self.pop_mark())))

    def put(self, index: int) -> None:
        if index > len(self.memo):
            raise CorruptCheckpoint("its pickle numbers its values out of order")
        self.ledger.spend(12)
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def name(self) -> None:
        module, name = self.last(2)
        if type(module) is not str or type(name) is not str:
            raise CorruptCheckpoint("its pickle has a name that is not text")
        self.stack.append(self.builders.find(module, name))

    def reduce(self) -> None:
        function, arguments = self.last(2)
        self.stack.append(self.builders.call(function, arguments))

    def new_object(self) -> None:
        kind, arguments = self.last(2)
        if type(kind) is Builder:
            raise CorruptCheckpoint(f"it makes an object of {kind.name}, which is not a class")
        self.stack.append(self.builders.call(kind, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Node | Array | NumpyType):
            target.build(state)
        elif type(target) is OrderedDict and type(state) is dict:
            # `nn.Module.state_dict` keeps the versions of modules in this attribute.
            if "_metadata" in state:
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise refusal(target, "set attributes of")

    def persistent(self) -> None:
        self.stack.append(self.builders.persistent(self.stack.pop()))


def _number(code: str) -> Callable[[_Machine], None]:
    layout = struct.Struct(code)
    return lambda m: m.push(32, layout.unpack(m.take(layout.size))[0])


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # the protocol
    0x95: lambda m: m.take(8),  # the length of a frame
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.byte()),
    ord("M"): _number("<H"),
    ord("J"): _number("<i"),
    ord("G"): _number(">d"),
    0x8A: lambda m: m.long(1),
    0x8B: lambda m: m.long(4),
    0x8C: lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    0x8D: lambda m: m.text(8),
    ord("C"): lambda m: m.raw(1, bytes),
    ord("B"): lambda m: m.raw(4, bytes),
    0x8E: lambda m: m.raw(8, bytes),
    0x96: lambda m: m.raw(8, bytearray),
    ord("("): _Machine.mark,
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.tuple(m.last(1)),
    0x86: lambda m: m.tuple(m.last(2)),
    0x87: lambda m: m.tuple(m.last(3)),
    ord("t"): lambda m: m.tuple(m.pop_mark()),
    ord("]"): lambda m: m.push(90, []),
    ord("a"): lambda m: m.append(m.last(1)),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push(180, {}),
    ord("s"): lambda m: m.set_items(m.last(2)),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push(260, set()),
    0x90: _Machine.add_items,
    0x91: _Machine.frozen_set,
    ord("q"): lambda m: m.put(m.byte()),
    ord("r"): lambda m: m.put(int.from_bytes(m.take(4), "little")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.byte()),
    ord("j"): lambda m: m.get(int.from_bytes(m.take(4), "little")),
    ord("c"): lambda m: m.stack.append(m.builders.find(m.line(), m.line())),
    0x93: _Machine.name,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}


def unpickle(
    read: Callable[[int, int], bytes],
    size: int,
    open_storage: Callable[[str, int], torch.UntypedStorage],
    ledger: MemoryBudget,
) -> Any:
    """Build what a pickle describes; configurations, arrays and mentions are left as they are.

    Args:
        read: gives `length` bytes of the pickle from an offset on.
        size: of the pickle in bytes.
        open_storage: gives the storage with this key, of this size in bytes.
        ledger: what the file may still claim.

    Raises:
        CorruptCheckpoint: it is damaged, or made to exhaust time or memory.
        UnsupportedFormat: it needs code to be run; none was. The messages do not name the file.
        IndexError, TypeError and the like: it makes no sense.
    """
    return _Machine(read, size, Builders(open_storage, ledger), ledger).run()
