"""A list that grows at its end, such as the history of a run: a save encodes what is new in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from ..errors import UnsupportedState
from ..format.codec import Blocks, encode
from ..format.json_text import dump
from ..ranks import ALONE, Ranks
from .encode import Stable

UNIT = 256
"""Entries that are encoded together, once."""
FRESH = 32
"""Number of newest entries that are never packed, because callers may still modify them."""
_FANOUT = 16


@dataclass(frozen=True)
class _Unit:
    entries: list[Any]
    text: bytes


class AppendOnlyList:
    """Remembers the text of the older entries of a list from one save to the next.

    These are saved as blocks of text in tensors, which stand still and are linked from save to
    save. An entry that is replaced or removed is noticed at the next save. One that is changed in
    place is noticed at once among the newest `FRESH`; of the older ones, each save looks at `UNIT`
    in turn.

    Args:
        source: whose list it is.
        ranks: the processes that save together; the list of rank 0 counts.
    """

    def __init__(self, source: str, ranks: Ranks = ALONE) -> None:
        self._source, self._ranks = source, ranks
        self._units: list[_Unit] = []
        self._blocks: dict[range, torch.Tensor] = {}
        self._turn = 0
        self._version = 0
        self._is_text = True

    def to_save(self, values: list[Any]) -> Stable | list[Any]:
        """Return what to save of the list as it is now; every rank calls it.

        A short one is saved as it is, and so is one with tensors, arrays or what cannot be saved.
        """
        found = self._ranks.broadcast(self._news(values) if self._ranks.is_first else None)
        if found is None:
            return values
        count, news = found
        self._take(values, count, news)
        if not self._blocks:
            return values
        texts = {
            f"entries.{span.start * UNIT}-{span.stop * UNIT - 1}": text
            for span, text in self._blocks.items()
        }
        return Stable(Blocks(texts, values[count * UNIT :], count * UNIT), self._version)

    def _news(self, values: Sequence[Any]) -> tuple[int, dict[int, bytes]] | None:
        """Give the number of units, and the texts of those that are not what they were."""
        count = max(len(values) - FRESH, 0) // UNIT
        self._turn = (self._turn + 1) % max(count, 1)
        news: dict[int, bytes] = {}
        for index in range(count if self._is_text else 0):
            entries = values[index * UNIT : (index + 1) * UNIT]
            if self._is_same(index, entries) and index != self._turn:
                continue
            text = self._text(entries)
            if text is None:
                self._is_text = False
                break
            if index >= len(self._units) or text != self._units[index].text:
                news[index] = text
            else:
                self._units[index] = _Unit(list(entries), text)
        return (count, news) if self._is_text else None

    def _is_same(self, index: int, entries: Sequence[Any]) -> bool:
        return index < len(self._units) and all(map(is_, self._units[index].entries, entries))

    def _text(self, entries: Sequence[Any]) -> bytes | None:
        try:
            tree, tensors, _ = encode(self._source, list(entries))
        except UnsupportedState:
            # Said when the whole list is encoded, with the right number of the entry.
            return None
        return None if tensors else dump(tree)[1:-1].encode()

    def _take(self, values: Sequence[Any], count: int, news: dict[int, bytes]) -> None:
        kept = self._units[:count]
        self._units = [*kept, *(_Unit([], b"") for _ in range(count - len(kept)))]
        for index, text in news.items():
            self._units[index] = _Unit(list(values[index * UNIT : (index + 1) * UNIT]), text)
        before, self._blocks = self._blocks, {}
        for span in spans(count):
            block = before.get(span)
            if block is None or any(index in news for index in span):
                block = _block(self._units[span.start : span.stop])
            self._blocks[span] = block
        if news or before.keys() != self._blocks.keys():
            self._version += 1


def spans(count: int) -> list[range]:
    """Cut so many units into blocks of 1, 16, 256 and so on, the largest first.

    A longer list has the same blocks, but for those that became one larger one, and each unit comes
    into few blocks over time.
    """
    size, start, found = 1, 0, []
    while size * _FANOUT <= count:
        size *= _FANOUT
    while start < count:
        while start + size > count:
            size //= _FANOUT
        found.append(range(start, start + size))
        start += size
    return found


def _block(units: Sequence[_Unit]) -> torch.Tensor:
    text = b"[" + b",".join(unit.text for unit in units) + b"]"
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
