"""Averages and best weights for frameworks that have no such thing: tensors, as a state source."""

from typing import Any

import torch


class Kept:
    """A dict of tensors with the methods that a framework asks for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy others into them."""
        for name, value in self.tensors.items():
            value.copy_(state[name])
