"""One update of an optimizer: which batches make it, and what is done with their losses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from checkpoint.integration import is_sharded

from ..state.dtensor import local


class Window:
    """The batches of one update. The last window of an epoch may have fewer.

    Args:
        length: batches in a full window.

    Attributes:
        length: the same.
        size: batches in the present window.
        index: number of the present batch in its stage.
        is_due: whether the present batch is the last of its window.
    """

    __slots__ = ("_batches", "index", "is_due", "length", "size")

    def __init__(self, length: int) -> None:
        self.length = length
        self._batches = 0
        self.close()

    def begin(self, batches: int) -> None:
        """Begin a train stage of so many batches."""
        self._batches = batches
        self.close()

    def enter(self, index: int) -> None:
        """Begin a batch, by its number in the stage."""
        first = index - index % self.length
        self.index, self.size = index, min(self.length, self._batches - first)
        self.is_due = index + 1 == first + self.size

    def close(self) -> None:
        """Leave the train stage: what is not in a window is an update by itself."""
        self.index, self.size, self.is_due = -1, 1, True


class Update:
    """What an optimizer needs for its updates, looked up once for all of them.

    Args:
        optimizer: makes a step from the gradients, without a closure.
        others: optimizers whose gradients a backward pass for this one must leave as they are.
        schedules: of the learning rates of the optimizer, by name.
        max_norm: largest norm of all gradients together; None for no limit.

    Raises:
        ValueError: the optimizer needs a closure.
    """

    def __init__(
        self,
        optimizer: Any,
        others: Sequence[Any],
        schedules: dict[str, LRScheduler],
        max_norm: float | None,
    ) -> None:
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise ValueError(
                f"{type(optimizer).__name__} computes the loss several times in a step, through a "
                "closure: call its step in run_step by hand"
            )
        self.optimizer, self.schedules, self._max_norm = optimizer, schedules, max_norm
        self._others = [one for one in others if one is not optimizer]
        self._foreign: list[Tensor] = []
        self._groups: list[int] = []
        # Number of the batch of the last call, see `Window.index`.
        self.batch = -1

    def backward(self, loss: Tensor, size: int, scaler: torch.amp.GradScaler | None) -> None:
        """Add the gradients of a loss to those of the batches before it.

        Args:
            loss: mean of one batch.
            size: batches over which the gradients are averaged.
            scaler: multiplies the loss.
        """
        if size > 1:
            loss = loss / size
        if scaler is not None:
            loss = scaler.scale(loss)
        if not self._others:
            loss.backward()
            return
        with _left_alone(self._parameters_of_others()):
            loss.backward()

    def step(self, scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """Use the gradients, then take them away; return their norm if it is limited."""
        norm = None
        if self._max_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            norm = clip_gradients(list(_parameters(self.optimizer)), self._max_norm)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        self.optimizer.zero_grad()
        return norm

    def _parameters_of_others(self) -> list[Tensor]:
        # Groups may be added at any time.
        groups = [len(one.param_groups) for one in (self.optimizer, *self._others)]
        if groups != self._groups:
            own = {id(p) for p in _parameters(self.optimizer)}
            theirs = {id(p): p for one in self._others for p in _parameters(one)}
            self._foreign = [p for key, p in theirs.items() if key not in own]
            self._groups = groups
        return self._foreign


def schedules_of(optimizer: Any, attributes: dict[str, Any]) -> dict[str, LRScheduler]:
    """Return the schedules of an optimizer that are stepped after each update, by attribute.

    Not those inside another schedule, which steps them, nor those that wait for a metric.
    """
    found = {
        name: one
        for name, one in attributes.items()
        if isinstance(one, LRScheduler)
        and not isinstance(one, ReduceLROnPlateau)
        and getattr(one, "optimizer", None) is optimizer
    }
    inside = {id(part) for one in found.values() for part in getattr(one, "_schedulers", ())}
    once = {id(one): name for name, one in reversed(found.items()) if id(one) not in inside}
    return {name: attributes[name] for name in reversed(once.values())}


def clip_gradients(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that the norm of all together is at most `max_norm`; return the norm.

    As `torch.nn.utils.clip_grad_norm_`, also for whole and sharded gradients together. The norm is
    a whole tensor with one element, the same on all ranks.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_sharded, grads)):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [nn.utils.get_total_norm(part) for part in by_mesh.values()]
    whole = [one.full_tensor() if is_sharded(one) else one for one in norms]  # type: ignore[attr-defined]
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([one.to(whole[0].device) for one in whole])
    )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for part in by_mesh.values():
        for grad in map(local, part):
            grad.mul_(factor.to(grad.device))
    return total


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


@contextmanager
def _left_alone(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put the gradients of some parameters back after a backward pass.

    Not `backward(inputs=...)`: DDP waits for all of its parameters, FSDP2 trains tensors that are
    in no graph, and reentrant checkpointing refuses it.
    """
    kept = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
