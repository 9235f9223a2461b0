"""The mode of optimizers that keep two versions of the weights: to train, and to evaluate."""

from collections.abc import Mapping

from ..state.optimizers import declare_mode, set_mode, with_modes
from ..state.registry import StateRegistry


class OptimizerModes:
    """Calls `train()` and `eval()` of optimizers that have both, such as schedule-free ones.

    Such an optimizer is in training mode in the train stage alone. It stays in evaluation mode
    between two train stages, since each change of the mode rounds the weights.

    Args:
        registry: knows the optimizers of the solver.

    Attributes:
        modes: name of an optimizer -> whether it is in training mode; of those that were told.
    """

    def __init__(self, registry: StateRegistry) -> None:
        self.modes: dict[str, bool] = {}
        self._registry = registry

    def set(self, *, training: bool) -> None:
        """Let each optimizer that has modes change the weights to those of one mode."""
        for name, optimizer in self._registry.optimizers().items():
            if with_modes(optimizer) is not None:
                set_mode(optimizer, training)
                self.modes[name] = training

    def declare(self, modes: Mapping[str, bool]) -> None:
        """Tell optimizers the mode of the weights and the optimizer state that were loaded.

        Args:
            modes: name -> whether it is the training mode. Some optimizers do not save the mode.
        """
        for name, optimizer in self._registry.optimizers().items():
            if name in modes:
                declare_mode(optimizer, modes[name])
                self.modes[name] = modes[name]
