"""Several loaders gone through together, again and again, and one that is read beside them."""

from collections.abc import Iterator, Mapping
from typing import Any

from .combined import Combined, Turns
from .loader_parts import loaders_in
from .loader_state import LoaderState
from .resumable_passes import ResumablePasses


def combined(loader: Any, rule: str) -> Any:
    """Return several loaders as one by a rule; anything else, such as a list of batches, as it is.

    Args:
        loader: a loader, or a mapping or sequence of loaders.
        rule: see `Combined`.
    """
    if isinstance(loader, Mapping) or (isinstance(loader, list | tuple) and loaders_in(loader)):
        return Combined(loader, rule)
    return loader


def passes_over(loader: Any, split: str, world_size: int = 1, **options: Any) -> Any:
    """Return the `ResumablePasses` over a loader, or those over several together.

    Args:
        loader: an iterable of batches, or `Combined`.
        split: its name.
        world_size: number of ranks.
        options: those of `ResumablePasses`.
    """
    if isinstance(loader, Combined):
        return CombinedPasses(loader, split, world_size, **options)
    return ResumablePasses(loader, split, world_size, **options)


class CombinedPasses:
    """All batches of several loaders, without end; as a state source, how far each of them is.

    Args:
        loader: the loaders.
        split: their name.
        world_size: number of ranks.
        options: those of `ResumablePasses`.
    """

    first_sample = 0

    def __init__(self, loader: Combined, split: str, world_size: int = 1, **options: Any) -> None:
        rule = loader.rule
        self._turns = Turns(loader)
        self._passes = {
            key: passes_over(combined(one, rule), f"{split}[{key!r}]", world_size, **options)
            for key, one in loader.items()
        }

    @property
    def given(self) -> int:
        """Batches of the present pass that were given so far."""
        return self._turns.given

    @property
    def goes_on(self) -> bool:
        """Whether all of them go on where they are when a stage ends."""
        return all(one.goes_on for one in self._passes.values())

    def one_pass(self) -> Iterator[Any]:
        """Go through the loaders once by their rule, from where they are."""
        last = tuple(key for key, one in self._passes.items() if one.goes_on)
        yield from self._turns.one_pass(self._passes, last)
        self.leave()

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.one_pass()

    def leave(self) -> None:
        """Let loaders that are in the middle begin again."""
        for one in self._passes.values():
            one.leave()

    def finish(self) -> None:
        """Note that the stage has all its batches."""
        for one in self._passes.values():
            one.finish()

    def state_dict(self) -> dict[str, Any]:
        """Capture how far each is, and whose turn it is."""
        turns = self._turns
        parts = {key: one.state_dict() for key, one in self._passes.items()}
        return {"parts": parts, "over": turns.over, "turn": turns.turn, "given": turns.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next `iter`."""
        for key, one in self._passes.items():
            if key in state["parts"]:
                one.load_state_dict(state["parts"][key])
        turns = self._turns
        turns.over, turns.turn, turns.given = list(state["over"]), state["turn"], state["given"]

    def upcoming(self) -> list[int] | None:
        """Return None: the indices of several batches are not told."""
        return None

    def copy(self) -> "CombinedPasses":
        """Return one that stays where this one is, to be asked for its state later."""
        other = object.__new__(CombinedPasses)
        other._passes = {key: one.copy() for key, one in self._passes.items()}
        other._turns = Turns(self._turns.combined)
        other._turns.__dict__.update(self._turns.__dict__, over=list(self._turns.over))
        return other


class Endless:
    """The batches of a loader, one after another, without end; a state source by itself.

    Args:
        loader: an iterable of batches.
        name: of the source.
        world_size: number of ranks.
    """

    def __init__(self, loader: Any, name: str, world_size: int = 1) -> None:
        self.loader = loader
        self._loader_state = LoaderState(lambda: {name: loader})
        self._passes = passes_over(loader, name, world_size)
        self._batches = iter(self._passes)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Capture how far the loader is."""
        return {"passes": self._passes.state_dict(), "loader": self._loader_state.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with the next batch."""
        self._loader_state.load_state_dict(state["loader"])
        self._passes.load_state_dict(state["passes"])
        self._batches = iter(self._passes)
