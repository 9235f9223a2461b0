"""Gradients that no optimizer has used yet: state of a run, from one batch to the next."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch

from checkpoint import StateMismatch
from checkpoint.integration import is_sharded

from .dtensor import local
from .optimizers import Optimizer, parameters_of

GRADIENTS = "gradients"
"""Name of the source in a checkpoint. A checkpoint without pending gradients does not have it."""


class GradientUse:
    """Watches whether a training loop drops the gradients of an optimizer after their use.

    A loop that calls `zero_grad` before `backward` leaves used gradients in place until the next
    batch. A checkpoint must not hold these: it would be as large again as the model. A loop that
    never calls `zero_grad` adds to used gradients, and a checkpoint must hold these.

    At each update, one parameter is compared: is its gradient the tensor that the update before
    used? At the first update, and at the first one after each save, all parameters are compared.

    Args:
        optimizer: whose gradients are watched.

    Attributes:
        drops: whether the loop drops used gradients. None until that is known, at the second
            update. False stays.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.drops: bool | None = None
        self._optimizer = optimizer
        self._parameter: torch.Tensor | None = None
        self._used: ref[torch.Tensor] | None = None
        self._all_used: list[tuple[torch.Tensor, ref[torch.Tensor]]] = []
        self._compares_all = True

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yield the parameters of the optimizer."""
        yield from parameters_of(self._optimizer)

    def before_update(self) -> None:
        """Compare the gradients that an update is about to use with those used before."""
        parameter, used = self._parameter, self._used
        if parameter is None or used is None:
            return
        # Written out, since each update comes here.
        grad = parameter.grad
        keeps = grad is not None and used() is grad
        if self._all_used:
            keeps = keeps or any(_holds(*pair) for pair in self._all_used)
            self._all_used = []
            if self.drops is None:
                self.drops = True
        if keeps:
            self.drops = False

    def after_update(self) -> None:
        """Note which gradients an update used."""
        grad = None if self._parameter is None else self._parameter.grad
        if self._compares_all or grad is None:
            self._look_at_all()
        else:
            self._used = ref(grad)

    def compare_all(self) -> None:
        """Compare all parameters at the next update, after a save."""
        self._compares_all = self.drops is not False

    def _look_at_all(self) -> None:
        pairs = [(p, ref(g)) for p in self.parameters() if (g := p.grad) is not None]
        self._parameter, self._used = pairs[0] if pairs else (None, None)
        if self._compares_all and pairs:
            self._all_used, self._compares_all = pairs, False

    def is_spent(self) -> bool:
        """Whether the present gradients were used, and the loop drops used ones."""
        return (
            self.drops is True
            and self._parameter is not None
            and self._used is not None
            and _holds(self._parameter, self._used)
        )


def _holds(parameter: torch.Tensor, gradient: ref[torch.Tensor]) -> bool:
    grad = parameter.grad
    return grad is not None and gradient() is grad


class PendingGradients:
    """The gradients that a later update needs, as a state source.

    These are all gradients of the parameters of registered modules, but for those of an optimizer
    that used them in a loop that drops used gradients, see `GradientUse`.

    The state holds `sharded`, whether this rank has parts of the tensors only, and `gradients`:
    name of the parameter -> gradient. Each rank has its own.

    Args:
        parameters: gives the name of each parameter, by parameter.
    """

    def __init__(self, parameters: Callable[[], Mapping[torch.Tensor, str]]) -> None:
        self._named = parameters
        self._parameters: list[torch.Tensor] = []
        self._uses: dict[str, GradientUse] = {}
        # Parameters whose gradients were in the checkpoint; None without one.
        self._restored: set[int] | None = None

    def watch(self, name: str, optimizer: Optimizer) -> GradientUse:
        """Return what has to be told of each update of an optimizer."""
        use = self._uses[name] = GradientUse(optimizer)
        # The checkpoint would have its used gradients if the loop had not dropped these.
        if self._restored is not None and not self._restored & {id(p) for p in use.parameters()}:
            use.drops = True
        return use

    def look(self) -> None:
        """Find the parameters there are; at the start of each train stage."""
        self._parameters = list(self._named())

    def note_save(self) -> None:
        """Compare all gradients at the next update of each optimizer."""
        for use in self._uses.values():
            use.compare_all()

    def pending(self) -> list[torch.Tensor]:
        """Return the parameters whose gradients a later update needs."""
        uses = self._uses.values()
        spent = {id(p) for use in uses if use.is_spent() for p in use.parameters()}
        if not self._parameters:
            self.look()
        return [p for p in self._parameters if p.grad is not None and id(p) not in spent]

    def keep_only(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the gradients of all other parameters away."""
        kept = {id(one) for one in parameters}
        for one in self._parameters:
            if id(one) not in kept:
                one.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the pending gradients, which are not copied."""
        pending = self.pending()
        names = self._named() if pending else {}
        grads = {names[p]: p.grad for p in pending if p in names and p.grad is not None}
        return {
            "sharded": any(map(is_sharded, grads.values())),
            "gradients": {name: _plain(local(grad.detach())) for name, grad in grads.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give parameters their pending gradients, and take away all others.

        Raises:
            StateMismatch: a parameter is missing, or has another shape or layout.
        """
        parameters = {name: parameter for parameter, name in self._named().items()}
        given = state.get("gradients", {})
        if missing := given.keys() - parameters.keys():
            raise StateMismatch(
                f"it holds gradients of {', '.join(sorted(missing))}, which are no parameters here"
            )
        # All first: a state that does not fit changes nothing.
        grads = {name: _gradient(name, value, parameters[name]) for name, value in given.items()}
        for name, parameter in parameters.items():
            parameter.grad = grads.get(name)
        self._restored = {id(parameters[name]) for name in grads}
        for use in self._uses.values():
            use.compare_all()


def mean_gradients(states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the pending gradients of one rank, made of those of another number of ranks.

    Gradients are averaged over ranks before they are used, so each rank gets the mean. A rank that
    has no gradient of a parameter counts as zero. None for the parts of sharded gradients.
    """
    if any(state["sharded"] for state in states):
        return None
    totals: dict[str, torch.Tensor] = {}
    for state in states:
        for name, value in state["gradients"].items():
            grad = _dense(value)
            totals[name] = totals[name] + grad if name in totals else grad
    return {
        "sharded": False,
        "gradients": {name: _plain(total / len(states)) for name, total in totals.items()},
    }


def marked(parameters: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, ref[torch.Tensor], int]]:
    """Note the gradients of parameters, to ask `is_unchanged` later."""
    return [(p, ref(g), g._version) for p in parameters if (g := p.grad) is not None]


def is_unchanged(parameter: torch.Tensor, gradient: ref[torch.Tensor], version: int) -> bool:
    """Whether nothing was added to a gradient, or put in its place, since `marked`."""
    grad = parameter.grad
    return grad is not None and gradient() is grad and grad._version == version


def _plain(grad: torch.Tensor) -> Any:
    """Return a gradient as a checkpoint can hold it: a sparse one as its parts."""
    if grad.layout != torch.sparse_coo:
        return grad
    return {
        "indices": grad._indices(),
        "values": grad._values(),
        "size": list(grad.shape),
        "coalesced": grad.is_coalesced(),
    }


def _dense(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.sparse_coo_tensor(
        value["indices"],
        value["values"],
        value["size"],
        is_coalesced=value["coalesced"],
        check_invariants=True,
    )


def _gradient(name: str, value: Any, parameter: torch.Tensor) -> torch.Tensor:
    part = local(parameter)
    grad = _dense(value).to(part.device, copy=True)
    if grad.shape != part.shape:
        raise StateMismatch(
            f"the gradient of {name} has shape {tuple(grad.shape)}, and the parameter "
            f"{tuple(part.shape)} here"
        )
    if not is_sharded(parameter):
        return grad
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        grad,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
