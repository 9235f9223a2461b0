"""Training mode of modules, and which of their parameters are trained: as state, and per stage."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..distributed.wrappers import unwrapped


class _Flag(NamedTuple):
    """A flag of a module or a parameter: `training`, or `requires_grad`."""

    name: str
    owner: Any
    attribute: str

    @property
    def value(self) -> bool:
        return bool(getattr(self.owner, self.attribute))


class ModuleModes:
    """`requires_grad` of parameters and `training` of submodules, as a state source.

    The state holds what differs from the choice that `build_model` made, so that it is small, and
    another choice there counts also when a run goes on.

    Args:
        modules: gives the registered modules by name.
    """

    def __init__(self, modules: Callable[[], Mapping[str, nn.Module]]) -> None:
        self._modules = modules
        self._flags: list[_Flag] = []
        self._built: dict[tuple[str, str], bool] | None = None
        # Of each flag what `build_model` chose, beside the flags for speed.
        self._first: list[bool] = []

    def look(self) -> None:
        """List the modules and parameters there are; the first time, take their flags as built."""
        self._flags = list(_flags(self._modules()))
        if self._built is None:
            self._built = {(one.attribute, one.name): one.value for one in self._flags}
        built = self._built
        self._first = [built.get((one.attribute, one.name), True) for one in self._flags]

    def state_dict(self) -> dict[str, dict[str, bool]]:
        """Return the flags that changed since `build_model`, by attribute and full name."""
        changed: dict[str, dict[str, bool]] = {}
        for one, first in zip(self._flags, self._first, strict=True):
            # Asked here, since a method call for each takes twice as long.
            if getattr(one.owner, one.attribute) is not first:
                changed.setdefault(one.attribute, {})[one.name] = not first
        return changed

    def load_state_dict(self, state: Mapping[str, Mapping[str, bool]]) -> None:
        """Set the flags that a state names; what is not here any more is left out."""
        self.look()
        for one in self._flags:
            value = state.get(one.attribute, {}).get(one.name)
            if value is not None and value != one.value:
                setattr(one.owner, one.attribute, value)
        for wrapper in self._modules().values():
            wrapper.training = unwrapped(wrapper).training


def _flags(modules: Mapping[str, nn.Module]) -> Iterator[_Flag]:
    for source, module in modules.items():
        inside = unwrapped(module)
        for name, one in inside.named_modules(prefix=source):
            yield _Flag(name, one, "training")
        for name, parameter in inside.named_parameters(prefix=source):
            yield _Flag(name, parameter, "requires_grad")


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a block with modules in evaluation mode; then each submodule is in its mode again."""
    with ExitStack() as undo:
        for module in modules:
            undo.callback(_put_back, [(one, one.training) for one in module.modules()])
            module.eval()
        yield


def _put_back(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    # By `train`, which a class may override to do more than to set a flag; outermost first.
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)


def set_to_train(
    modules: Mapping[str, nn.Module], trained: Collection[int], always: str = "model"
) -> None:
    """Put modules into training mode, each as a whole, where they were left in evaluation mode.

    A module that is in training mode stays as it is: its submodules in evaluation mode, such as
    frozen batch norm, are a choice of the user. A module that no optimizer trains stays, too.

    Args:
        modules: by name.
        trained: `id` of the parameters that optimizers have.
        always: the module that is put there even if no optimizer trains it.
    """
    for name, module in modules.items():
        if module.training:
            continue
        if name == always or any(id(one) in trained for one in module.parameters()):
            module.train()


def kept_in_evaluation(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Name the largest submodules that stay in evaluation mode though their layers are trained.

    A single layer without submodules is the usual choice for batch norm and dropout.
    """
    for source, module in modules.items():
        chosen: list[str] = []
        submodules = unwrapped(module).named_modules(prefix=source) if module.training else ()
        for name, one in submodules:
            if one.training or any(name.startswith(f"{other}.") for other in chosen):
                continue
            chosen.append(name)
            if next(one.children(), None) is not None and any(
                parameter.requires_grad for parameter in one.parameters()
            ):
                yield name
