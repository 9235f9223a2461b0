"""State that the framework finds by itself: loaders, generators, and modes of modules."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..data.contents import Contents
from ..data.loader_state import LoaderState
from ..discovery.generators import GeneratorState
from ..discovery.reach import Reached
from ..state.module_modes import ModuleModes

logger = logging.getLogger(__name__)


class FoundState:
    """The sources that need no registration, because a walk over the solver finds what they hold.

    Args:
        loaders: returns the loaders of the solver by split.
        walk: walks over all that hangs on the solver.
        modules: returns the registered modules by name.

    Attributes:
        loaders: generators, samplers and streams of the loaders.
        generators: all other generators that hang on the solver.
        modes: `requires_grad` and `training` that differ from what `build_model` chose.
        contents: what the data sets are.
        goes_on_in_epoch: whether the restored checkpoint is in the middle of an epoch; until a
            stage begins.
    """

    def __init__(
        self,
        loaders: Callable[[], Mapping[str, Any]],
        walk: Callable[[], Iterable[Reached]],
        modules: Callable[[], Mapping[str, nn.Module]],
    ) -> None:
        self.loaders = LoaderState(loaders)
        self.generators = GeneratorState(walk, self.loaders.kept)
        self.modes = ModuleModes(modules)
        self.contents = Contents(loaders)
        self.goes_on_in_epoch = False

    def look(self, everywhere: bool = True) -> None:
        """Find the generators and the submodules that there are now.

        Args:
            everywhere: on all that hangs on the solver, which takes milliseconds; or only on its
                loaders, where data sets make generators late.
        """
        self.loaders.look()
        if everywhere:
            self.generators.look()
            self.modes.look()

    def shown(self) -> dict[str, Any]:
        """Return the states of all generators, with names for people."""
        return self.loaders.generators() | self.generators.shown()

    def settle_generators(self) -> None:
        """Restore generators that the beginning of the epoch made anew; before each stage.

        Only the first call after a restore does something. The log names the generators of the
        checkpoint that are not here.
        """
        for path in self.generators.settle(self.goes_on_in_epoch):
            logger.warning(
                "The checkpoint holds a state of the generator self.%s, which is not here: make it "
                "in build_model",
                path,
            )
        self.goes_on_in_epoch = False

    def warn_of_new_generators(self, state: Mapping[str, Any]) -> None:
        """Name the generators that start afresh, though the run goes on.

        Args:
            state: the restored state, by source.
        """
        lacking = [f"self.{path}" for path in self.generators.lacking()]
        for name in [*lacking, *self.loaders.lacking(state.get("loader_state") or {})]:
            logger.warning(
                "The checkpoint holds no state of the generator %s: it starts afresh", name
            )
