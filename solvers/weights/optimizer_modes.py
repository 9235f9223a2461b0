"""The optimizers of a solver, and in which mode each has the weights: to train, or to evaluate."""

from collections.abc import Mapping

from ..discovery.attributes import Attributes
from ..state.optimizers import Optimizer, declare_mode, is_optimizer, set_mode, with_modes
from ..state.registry import unwrap_source


class OptimizerModes(Attributes):
    """Calls `train()` and `eval()` of optimizers that have both, such as schedule-free ones.

    An optimizer is in training mode in the train stage alone. It stays in evaluation mode between
    that and the next one: to go there and back would round the weights each time.
    """

    def __init__(self) -> None:
        # By name, whether an optimizer is in training mode; of those that were told.
        self._optimizer_modes: dict[str, bool] = {}
        super().__init__()

    def _optimizers(self) -> dict[str, Optimizer]:
        found = {name: one for name, one in vars(self).items() if is_optimizer(one)}
        known = {id(one) for one in found.values()}
        # Those that a solver holds elsewhere, and registers by a dotted name.
        registered = {name: unwrap_source(one) for name, one in self.stateful.sources.items()}
        others = {name: one for name, one in registered.items() if is_optimizer(one)}
        return found | {name: one for name, one in others.items() if id(one) not in known}

    def set_optimizer_modes(self, *, training: bool) -> None:
        """Let each optimizer that has modes change the weights to those of one of them."""
        for name, optimizer in self._optimizers().items():
            if with_modes(optimizer) is not None:
                set_mode(optimizer, training)
                self._optimizer_modes[name] = training

    def declare_optimizer_modes(self, modes: Mapping[str, bool]) -> None:
        """Tell optimizers in which mode the weights are that were loaded, and their state.

        Args:
            modes: by name, whether it is the training mode. Some optimizers do not save that.
        """
        for name, optimizer in self._optimizers().items():
            if name in modes:
                declare_mode(optimizer, modes[name])
                self._optimizer_modes[name] = modes[name]
