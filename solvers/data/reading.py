"""How far each loader has been read; kept for as long as the loader itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary


@dataclass(eq=False)
class Reading:
    """The pass over a loader that is in progress, or the last one.

    Attributes:
        number: of the pass, from 1; 0 before the first.
        begin: the state of generators and of the loader's parts when it began.
        given: batches that it has given; 0 when no pass is in progress.
        then: what becomes of it when the stage ends in the middle: the next epoch `goes on` with
            it or `begins` another, or it counts only as a `whole`.
        iterator: what gives the next batches; None if it has to be made first.
        fresh: states of the parts that a pass moves, before anything was loaded into them; None if
            that is not known yet.
        saved: those that were saved in the middle of this pass, to compare.
        world_size: ranks that read the loader together.
    """

    number: int = 0
    begin: dict[str, Any] = field(default_factory=dict)
    given: int = 0
    then: Literal["goes on", "begins", "whole"] = "begins"
    iterator: Iterator[Any] | None = None
    fresh: dict[str, Any] | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1

    def kept(self) -> dict[str, Any]:
        """Return what is kept of it at the end of an epoch."""
        kept: dict[str, Any] = {"number": self.number}
        if self.given and self.then == "goes on":
            kept |= {"begin": self.begin, "given": self.given, "world_size": self.world_size}
        return kept

    def take(self, kept: Mapping[str, Any]) -> bool:
        """Go back there; return whether that is in the middle of a pass."""
        self.iterator = None
        self.number = kept.get("number", 0)
        self.begin, self.given = kept.get("begin", {}), kept.get("given", 0)
        self.world_size = kept.get("world_size", self.world_size)
        if self.given:
            # Only of such a pass is this kept, and it may be saved again before a stage reads on.
            self.then = "goes on"
        return self.given > 0


# Of a loader: how far it is, by the name under which it is read.
_readings: "WeakKeyDictionary[Any, dict[str, Reading]]" = WeakKeyDictionary()


def reading_of(loader: Any, name: str) -> Reading:
    """Return how far a loader is; a new one each time for what cannot be told apart, as lists."""
    try:
        return _readings.setdefault(loader, {}).setdefault(name, Reading())
    except TypeError:
        return Reading()
