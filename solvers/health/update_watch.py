"""Hooks around the updates of all optimizers: they check each update, and count it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..distributed.parallelism import Parallelism
from ..optim.update import Window
from ..run_context import RunContext
from ..settings.errors import ConfigError
from ..state.optimizers import Optimizer, watch
from ..state.pending_gradients import GradientUse, PendingGradients
from ..state.registry import StateRegistry, inner_optimizers
from ..state.sources import named_parameters
from .monitor import HealthMonitor


class UpdateWatch:
    """Puts hooks around the updates of all optimizers of a solver.

    Args:
        context: of the run.
        registry: knows the optimizers.
        monitor: counts the updates, and looks at their gradients.
        parallelism: may hold gradients of sharded models back.
        window: the batches of one update.

    Attributes:
        gradients: those that no update used yet.
        made: whether an update was made since this was last set to False.
        begins: is called before each update; None for nothing.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        monitor: HealthMonitor,
        parallelism: Parallelism,
        window: Window,
    ) -> None:
        self.gradients = PendingGradients(lambda: named_parameters(registry.sources))
        self.made = False
        self.begins: Callable[[], None] | None = None
        self._context, self._registry, self._monitor = context, registry, monitor
        self._parallelism, self._window = parallelism, window
        # By name of an optimizer, the `id` of the object that has the hooks.
        self._watched: dict[str, int] = {}
        self._watched_inside: dict[str, int] = {}

    def watches(self, name: str) -> bool:
        """Whether the optimizer of this name tells of its updates."""
        return name in self._watched

    @property
    def holds_back(self) -> bool:
        """Whether FSDP2 holds gradients of `no_sync` that no update used: no save has these."""
        return self._parallelism.holds_gradients

    def look(self) -> None:
        """Put hooks around optimizers that have none yet; at the start of each train stage."""
        self.gradients.look()
        mine = self._registry.optimizers()
        for name, value in mine.items():
            if self._watched.get(name) == id(value):
                continue
            if name in self._watched:
                # Another optimizer than before: what it says of its own updates is believed.
                self._monitor.counts.forget(name)
            use = self.gradients.watch(name, value)
            watch(value, partial(self._before, name, use), partial(self._after, name, use))
            self._watched[name] = id(value)
        for name, value in inner_optimizers(self._registry.attributes()).items():
            is_known = self._watched_inside.get(name) == id(value)
            if not is_known and not any(value is one for one in mine.values()):
                use = self.gradients.watch(name, value)
                before, after = use.before_update, use.after_update
                watch(value, _without_arguments(before), _without_arguments(after))
                self._watched_inside[name] = id(value)

    def _before(self, name: str, use: GradientUse, optimizer: Optimizer, *_: Any) -> None:
        if not self._window.is_due:
            raise ConfigError(
                f"optim.accumulation={self._window.length}, but {name!r} makes a step in each "
                "batch: give the loss to self.optimize, which gathers gradients, or make the step "
                "`if self.is_update_due`, or set optim.accumulation=1"
            )
        use.before_update()
        if self._context.stage() == "train":
            self._monitor.guard.before_update(name, optimizer)
        if self.begins is not None:
            self.begins()

    def _after(self, name: str, use: GradientUse, optimizer: Optimizer, *_: Any) -> None:
        use.after_update()
        self._monitor.note_update(name, optimizer)
        self.made, self._parallelism.holds_gradients = True, False

    def is_boundary(self) -> bool:
        """Whether the batch that just ended made an update; without optimizers, each batch does."""
        return self.made or not self._watched


def _without_arguments(action: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: action()
