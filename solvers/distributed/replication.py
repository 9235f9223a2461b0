"""Models that each rank has whole (DDP), and that code may use like the model inside."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint.integration import Ranks

from .wrappers import unwrapped


class Replicated(DistributedDataParallel):
    """A model that each rank has whole, and whose gradients are averaged in the backward pass.

    Its state and its attributes are those of the model inside, which also gets the attributes that
    code sets; where the model inside is a container, this is one, too, see `replicated`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; without gradients each rank for itself: some may have more batches."""
        learns = self.training or torch.is_grad_enabled()
        forward: Any = super().forward if learns else self.module
        return forward(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the model inside."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the state of the model inside."""
        return self.module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def _is_own(self, name: str) -> bool:
        """Whether an attribute is one of DDP, and not one of the model inside."""
        if not vars(self).get("_is_made", False):
            return True
        if name in vars(self) or name in self._modules or hasattr(type(self), name):
            return True
        # Those that DDP sets later have an underscore.
        return name.startswith("_") and not hasattr(self.module, name)


_CONTAINER = (
    "__len__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__iter__",
    "__contains__",
    "__reversed__",
)


@cache
def _replicated_class(names: tuple[str, ...]) -> type[Replicated]:
    """Make a class whose instances pass these special methods on to the model inside.

    Not all of them always: what has a length is false when that is 0, and what can be iterated is
    taken for a sequence.
    """

    def passed_on(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(unwrapped(self), name)(*args)

    return type("Replicated", (Replicated,), {name: passed_on(name) for name in names})


def replicated(model: nn.Module, device: str, **options: Any) -> nn.Module:
    """Wrap a model so that gradients are averaged over the ranks; alone, or frozen, it stays.

    Args:
        model: on its device. All ranks start with the weights of rank 0.
        device: where it is.
        options: of `torch.nn.parallel.DistributedDataParallel`.
    """
    if Ranks.here().size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    on_gpu = torch.device(device).type == "cuda"
    names = tuple(name for name in _CONTAINER if hasattr(type(unwrapped(model)), name))
    made = _replicated_class(names)(
        model, device_ids=[torch.cuda.current_device()] if on_gpu else None, **options
    )
    made._is_made = True
    return made
