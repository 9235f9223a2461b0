"""State of the data loaders: generators, samplers, streams, and the pass in progress."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from ..discovery.generators import generators_in, live, set_generator_state, states_of
from ..discovery.reach import Reached, reachable
from .announce import announce
from .loader_parts import capture, generators_of, loaders_in, moved_by_a_pass, parts_of, restore
from .reading import Reading, reading_of

HANGING = "hanging"
"""Stands among the names of the parts of a loader for all that hangs on it deeper."""


class LoaderState:
    """Generators, samplers and streams of the data loaders, as a state source.

    Looks the loaders up at each use, since a solver may replace them. A split may also be a list,
    tuple or dict of loaders. Loaders, samplers and data sets with `state_dict` and
    `load_state_dict` are asked for their state. The generators of torch, NumPy and Python are kept,
    those that are attributes of such a part, and those that hang anywhere on a loader, such as on a
    transform or on `collate_fn`.

    What a pass in progress has moved is kept as `Reading.then` says.

    Args:
        loaders: returns the loaders by split.
        with_passes: keep how far each loader is, too.
    """

    def __init__(
        self, loaders: Callable[[], Mapping[str, Any]], *, with_passes: bool = True
    ) -> None:
        self._loaders, self._with_passes = loaders, with_passes
        # By split: a list or dict, how long it was, and that it has no loader in it.
        self._plain: dict[str, tuple[Any, int]] = {}
        # By name: a loader, and where generators hang on it.
        self._places: dict[str, tuple[Any, list[Reached]]] = {}

    def is_empty(self) -> bool:
        """Whether it is known that nothing in here moves; not while something is looked at anew."""
        return all(self._is_plain(split, loader) for split, loader in self._loaders().items())

    def state_dict(self) -> dict[str, Any]:
        """Capture what moves from epoch to epoch, per split."""
        return {split: self._captured(split, loader) for split, loader in self._loaders().items()}

    def generators(self) -> dict[str, Any]:
        """Give the states of all generators in here, by a name for people."""
        return {
            _shown(split, name, attribute): state
            for split, captured in self.state_dict().items()
            for name, part in captured.items()
            for attribute, state in part.get("generators", {}).items()
        }

    def look(self) -> None:
        """Walk over the loaders again when it is asked next what hangs on them."""
        self._places = {}

    def kept(self) -> set[int]:
        """Return the `id` of all generators in here."""
        kept = set()
        for name, loader in self._each():
            for part in parts_of(loader).values():
                kept |= {id(one) for one in generators_of(part).values()}
            kept |= {id(one) for _, one in live(self._hanging(name, loader))}
        return kept

    def lacking(self, state: Mapping[str, Any]) -> list[str]:
        """Name what hangs on the loaders that are here, and that a state lacks."""
        known = {
            path
            for captured in state.values()
            for name, part in captured.items()
            if name.endswith(HANGING)
            for path in part["generators"]
        }
        return [
            f"{path} of the loader of {name!r}"
            for name, loader in self._each()
            for path, _ in live(self._hanging(name, loader))
            if path not in known
        ]

    def _each(self) -> Iterator[tuple[str, Any]]:
        """Give every single loader by its name, also those in lists and dicts."""
        todo = list(self._loaders().items())
        while todo:
            name, loader = todo.pop(0)
            several = self._several(name, loader)
            todo += [(f"{name}[{key!r}]", one) for key, one in several.items()]
            if not several and not self._is_plain(name, loader):
                yield name, loader

    def _hanging(self, name: str, loader: Any) -> list[Reached]:
        """Return where generators hang on a loader, beside those that its parts hold."""
        walked, places = self._places.get(name, (None, []))
        if walked is not loader:
            parts = parts_of(loader).values()
            held = {id(one) for part in parts for one in generators_of(part).values()}
            places = generators_in(reachable(loader), held)
            self._places[name] = loader, places
        return places

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back to the loaders that are there; under execute_only some are not."""
        for split, loader in self._loaders().items():
            self._restore(split, loader, state.get(split, {}))

    def _captured(self, name: str, loader: Any) -> dict[str, Any]:
        captured = {"loader": capture(loader)}
        several = self._several(name, loader)
        for key, one in several.items():
            inside = self._captured(f"{name}[{key!r}]", one)
            captured |= {f"{key}.{part}": value for part, value in inside.items()}
        if several or self._is_plain(name, loader):
            return captured
        reading = reading_of(loader, name) if self._with_passes else Reading()
        begun = reading.begin.get("loader_state", {}).get(name, {})
        if reading.given and reading.then == "whole":
            return {**begun, "pass": {"number": reading.number - 1}}
        parts = parts_of(loader)
        captured |= {part: capture(one) for part, one in parts.items() if part != "loader"}
        if reading.given and reading.then == "begins":
            for part, fresh in (reading.fresh or {}).items():
                if isinstance(parts[part], IterableDataset):
                    # It begins again where the run found it.
                    captured[part]["state"] = fresh["state"]
        if reading.given and reading.then == "goes on" and reading.iterator is None:
            # They are not there yet, since no stage has gone on with the pass.
            captured |= reading.saved
        if hanging := states_of(self._hanging(name, loader)):
            captured[HANGING] = {"generators": hanging}
        return {**captured, "pass": reading.kept()} if reading.number else captured

    def _restore(self, name: str, loader: Any, captured: Mapping[str, Any]) -> None:
        several = self._several(name, loader)
        for key, one in several.items():
            start = f"{key}."
            inside = {k.removeprefix(start): v for k, v in captured.items() if k.startswith(start)}
            self._restore(f"{name}[{key!r}]", one, inside)
        parts = {"loader": loader} if several else parts_of(loader)
        moved = moved_by_a_pass(parts)
        is_open = False
        if self._with_passes and not several:
            reading = reading_of(loader, name)
            if reading.fresh is None:
                reading.fresh = {part: capture(one) for part, one in moved.items()}
            is_open = reading.take(captured.get("pass", {}))
            reading.saved = {part: captured[part] for part in moved if part in captured}
        for part, one in parts.items():
            # What a pass has moved is where it was once the pass has come so far, see `Passes`.
            with_state = not (is_open and part in moved)
            restore(one, captured.get(part, {}), with_state=with_state)
        if not several and not self._is_plain(name, loader):
            self.restore_hanging(name, loader, captured)
        if self._with_passes and not several and reading.number:
            # What depends on the pass, such as the length of a data set, is what it was.
            announce(loader, reading.number)

    def restore_hanging(self, name: str, loader: Any, captured: Mapping[str, Any]) -> None:
        """Put the generators that hang on a loader where they were.

        Args:
            name: of the loader.
            loader: the loader.
            captured: what `state_dict` said of the loader.
        """
        kept = captured.get(HANGING, {}).get("generators", {})
        for path, one in live(self._hanging(name, loader)) if kept else ():
            if path in kept:
                set_generator_state(one, kept[path], f"{path} of the loader of {name!r}")

    def _several(self, name: str, loader: Any) -> dict[Any, Any]:
        """Return the loaders in a list or dict; a list of batches may be long: look only once."""
        if self._is_plain(name, loader):
            return {}
        found = loaders_in(loader)
        if not found and isinstance(loader, list | tuple | Mapping):
            self._plain[name] = loader, len(loader)
        return found

    def _is_plain(self, name: str, loader: Any) -> bool:
        plain, length = self._plain.get(name, (None, 0))
        return loader is plain and plain is not None and len(loader) == length


def _shown(split: str, part: str, attribute: str) -> str:
    if part.endswith(HANGING):
        dot = "" if attribute.startswith("[") else "."
        return f"self.dataloaders[{split!r}]{dot}{attribute}"
    return f"{attribute!r} of the {part.replace('_', ' ')} of {split!r}"
