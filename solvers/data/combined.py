"""Several loaders that a stage reads together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RULES = ("shortest", "longest", "in_turn")
"""When a pass over several loaders is over, see `Combined`."""


class Combined:
    """Several loaders as one: each batch has one of every loader, or they take turns.

    ==========  ====================================================================================
    shortest    a pass is over with the first loader; the others begin again with it
    longest     a pass is over when each loader was gone through; shorter ones begin again meanwhile
    in_turn     each batch is of one loader, round and round; one that is over is left out
    ==========  ====================================================================================

    A batch is a dict or a tuple, as the loaders are given; with `in_turn` it is that of the loader.

    Args:
        loaders: a mapping or a sequence.
        rule: one of the above.

    Raises:
        ValueError: there is no such rule, or no loader.
    """

    def __init__(self, loaders: Mapping[Any, Any] | Sequence[Any], rule: str = "longest") -> None:
        if rule not in RULES:
            raise ValueError(f"the rule {rule!r} is none of {', '.join(RULES)}")
        if not loaders:
            raise ValueError("give at least one loader to combine")
        self.loaders, self.rule = loaders, rule

    def items(self) -> list[tuple[Any, Any]]:
        """Return the loaders by key, or by place."""
        if isinstance(self.loaders, Mapping):
            return list(self.loaders.items())
        return list(enumerate(self.loaders))

    def pack(self, batches: Mapping[Any, Any]) -> Any:
        """Return a batch made of one of each loader."""
        one_of_each = {key: batches[key] for key, _ in self.items()}
        return one_of_each if isinstance(self.loaders, Mapping) else tuple(one_of_each.values())

    def __getitem__(self, key: Any) -> Any:
        return self.loaders[key]

    def __len__(self) -> int:
        lengths = [len(loader) for _, loader in self.items()]
        if self.rule == "in_turn":
            return sum(lengths)
        return min(lengths) if self.rule == "shortest" else max(lengths)

    def __iter__(self) -> Iterator[Any]:
        return Turns(self).one_pass({key: _Again(loader) for key, loader in self.items()})


class Turns:
    """Which loader gives the next batch, and which ones are over, in a pass over several loaders.

    Attributes:
        combined: the loaders.
        over: keys of those that were gone through in this pass.
        turn: number of turns that were had.
        given: batches of this pass.
    """

    def __init__(self, combined: Combined) -> None:
        self.combined = combined
        self.over: list[Any] = []
        self.turn = self.given = 0

    def one_pass(self, sources: Mapping[Any, Any], last: tuple[Any, ...] = ()) -> Iterator[Any]:
        """Yield the batches of a pass, from where it is.

        Args:
            sources: have `one_pass`, which goes through a loader once, from where it is.
            last: keys of those that are asked after the others, since they lose a batch when a
                pass ends.
        """
        order = sorted(sources, key=lambda key: key in last)
        running = {key: sources[key].one_pass() for key in order}
        batches = self._in_turn(running) if self.combined.rule == "in_turn" else None
        for batch in batches or self._together(running, sources):
            self.given += 1
            yield batch
        self.over, self.turn, self.given = [], 0, 0

    def _in_turn(self, running: Mapping[Any, Iterator[Any]]) -> Iterator[Any]:
        keys = [key for key, _ in self.combined.items()]
        while len(self.over) < len(keys):
            key = keys[self.turn % len(keys)]
            self.turn += 1
            if key in self.over:
                continue
            for batch in running[key]:
                yield batch
                break
            else:
                self.over.append(key)

    def _together(
        self, running: dict[Any, Iterator[Any]], sources: Mapping[Any, Any]
    ) -> Iterator[Any]:
        nothing = object()
        while True:
            batches = {key: next(one, nothing) for key, one in running.items()}
            ended = [key for key, batch in batches.items() if batch is nothing]
            self.over += [key for key in ended if key not in self.over]
            if ended and (self.combined.rule == "shortest" or len(self.over) == len(running)):
                return
            for key in ended:
                running[key] = sources[key].one_pass()
                batches[key] = next(running[key])
            yield self.combined.pack(batches)


class _Again:
    def __init__(self, loader: Any) -> None:
        self.one_pass = loader.__iter__
