"""Everything that hangs on a solver: a walk over attributes, containers, closures and modules."""

import functools
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .reach_types import GENERATORS, is_closed, is_plain, long, sort_of

_ENTERED = 1024
"""Items of a container that are entered; the rest of a longer one is not looked at."""
_BUDGET = 100_000
"""Objects that one walk enters at most."""
_REPEATED = frozenset({types.NoneType, int, float, str, bool})
"""Types of values that Python shares between places that have nothing to do with each other."""
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that each module has."""
_HOOKS = frozenset(name for name in _OF_TORCH if name.endswith("_hooks"))


class Reached(NamedTuple):
    """A value, and the place that holds the value.

    Attributes:
        path: the way from the root, as a user writes it after `self.`: `model.noise`,
            `dataloaders['train'].dataset.transform.rng`, `augment.keywords['rng']`. A variable of a
            closure and a default of a parameter have their own names after that of the function.
        value: what was there during the walk.
        holder: the `__dict__`, list, dict or deque that holds the value under `key`; the cell of a
            closure; the object with the slot; None where the place cannot be written to.
        key: the key in `holder`; the descriptor of a slot; None for a cell.
    """

    path: str
    value: Any
    holder: Any = None
    key: Any = None

    @property
    def is_settable(self) -> bool:
        """Whether `put` can write to the place."""
        return self.holder is not None

    def get(self) -> Any:
        """Return what is in the place now.

        Raises:
            LookupError: the place does not exist any more.
        """
        if self.holder is None:
            return self.value
        try:
            if isinstance(self.holder, types.CellType):
                return self.holder.cell_contents
            if isinstance(self.key, types.MemberDescriptorType):
                return self.key.__get__(self.holder)
            return self.holder[self.key]
        except (AttributeError, ValueError) as error:
            raise LookupError(f"{self.path} is not there any more") from error

    def put(self, value: Any) -> None:
        """Write another value to the place.

        Raises:
            TypeError: the place is an item of a tuple or a set, or belongs to a function.
        """
        if self.holder is None:
            raise TypeError(f"{self.path} cannot be set")
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = value
        elif isinstance(self.key, types.MemberDescriptorType):
            self.key.__set__(self.holder, value)
        else:
            self.holder[self.key] = value


def reachable(
    root: Any, *, without: Collection[str] = (), closed: Collection[int] = ()
) -> Iterator[Reached]:
    """Give all that can be reached from an object, the shortest ways first, without changing it.

    Objects, modules, tensors and generators come once; numbers and strings at each place. A
    container that holds nothing but plain data comes as a whole, and its items do not. Properties
    and other code of the user are not called. Classes, Python modules, loggers, configurations,
    threads and files are not entered, and do not come.

    Args:
        root: a solver, or any other object; the root itself does not come.
        without: attributes of the root that do not come.
        closed: `id` of objects that come and are not entered.
    """
    seen = {id(root)}
    first = (one._replace(path=one.path.removeprefix(".")) for one in _inside("", root))
    queue: deque[Reached] = deque(one for one in first if one.key not in without)
    entered = 0
    while queue and entered < _BUDGET:
        one = queue.popleft()
        value = one.value
        if type(value) in _REPEATED:
            yield one
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind: Any = type(value)
        sort = sort_of(kind)
        if sort != "closed":
            yield one
        if sort == "open" or (sort == "container" and not is_plain(value)):
            entered += 1
            if id(value) not in closed:
                queue.extend(_inside(one.path, value))


def _inside(path: str, value: Any) -> Iterable[Reached]:
    for kind, enter in _ENTER:
        if isinstance(value, kind):
            return enter(path, value)
    return _of_object(f"{path}.", value)


def _of_object(prefix: str, value: Any) -> Iterator[Reached]:
    """Give the attributes of an object: those of its `__dict__`, and its slots."""
    kind: Any = type(value)
    if kind.__dictoffset__:
        attributes = object.__getattribute__(value, "__dict__")
        # Another thread of the user may set one meanwhile.
        for name, one in list(attributes.items()):
            yield Reached(f"{prefix}{name}", one, attributes, name)
    for descriptor in _slots(kind):
        try:
            one = descriptor.__get__(value)
        except AttributeError:
            continue
        yield Reached(f"{prefix}{descriptor.__name__}", one, value, descriptor)
    for name, holder in _of_class(kind):
        if name in holder:
            yield Reached(f"{prefix}{name}", holder[name])


@functools.lru_cache(maxsize=4096)
def _slots(kind: Any) -> tuple[types.MemberDescriptorType, ...]:
    return tuple(
        descriptor
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for descriptor in vars(base).values()
        if isinstance(descriptor, types.MemberDescriptorType)
    )


@functools.lru_cache(maxsize=4096)
def _of_class(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Find the generators that all objects of a class share, and where each one is held.

    These are attributes of the class, and global variables that its methods name.
    """
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if is_closed(base) or base.__module__.partition(".")[0] in ("builtins", "torch", "solvers"):
            continue
        for name, value in vars(base).items():
            if isinstance(value, GENERATORS):
                found.setdefault(name, vars(base))
            elif isinstance(value, types.FunctionType):
                for used in _globals_in(value):
                    found.setdefault(used, value.__globals__)
    return tuple(found.items())


def _globals_in(function: types.FunctionType) -> Iterator[str]:
    """Name the global variables in a function that hold generators, also of functions inside."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        for name in code.co_names:
            if isinstance(function.__globals__.get(name), GENERATORS):
                yield name


def _of_module(path: str, module: nn.Module) -> Iterator[Reached]:
    """Give parameters, buffers, submodules and hooks by the names that the module gives them."""
    attributes = vars(module)
    for place in ("_parameters", "_buffers", "_modules"):
        held = attributes[place]
        for name, one in list(held.items()):
            yield Reached(f"{path}.{name}", one, held, name)
    for name, one in list(attributes.items()):
        if name not in _OF_TORCH:
            yield Reached(f"{path}.{name}", one, attributes, name)
        elif one and name in _HOOKS:
            for key, hook in one.items():
                yield Reached(f"{path}.{name}[{key}]", hook)
    kind: Any = type(module)
    for name, holder in _of_class(kind):
        if name in holder:
            yield Reached(f"{path}.{name}", holder[name])


def _of_dict(path: str, held: dict[Any, Any]) -> Iterator[Reached]:
    # That of an optimizer: its values are by parameter, and no one can write them in words.
    for key, one in [*dict.items(held)][:_ENTERED]:
        if not isinstance(key, torch.Tensor):
            yield Reached(f"{path}[{key!r}]", one, held, key)
    if type(held) is not dict:
        yield from _of_object(f"{path}.", held)


def _of_sequence(path: str, held: Any) -> Iterator[Reached]:
    place = held if isinstance(held, list | deque) else None
    for index in range(0 if long(held, _ENTERED) else len(held)):
        yield Reached(f"{path}[{index}]", held[index], place, index)
    if type(held) not in (list, tuple, deque):
        yield from _of_object(f"{path}.", held)


def _of_set(path: str, held: Any) -> Iterator[Reached]:
    for number, one in enumerate(held if len(held) <= _ENTERED else ()):
        yield Reached(f"{path}[#{number}]", one)


def _of_partial(path: str, held: functools.partial[Any]) -> Iterator[Reached]:
    yield Reached(f"{path}.func", held.func)
    for index, one in enumerate(held.args):
        yield Reached(f"{path}.args[{index}]", one)
    for name, one in held.keywords.items():
        yield Reached(f"{path}.keywords[{name!r}]", one, held.keywords, name)
    yield from _of_object(f"{path}.", held)


def _of_method(path: str, held: types.MethodType) -> Iterator[Reached]:
    yield Reached(f"{path}.__self__", held.__self__)
    yield Reached(f"{path}.__func__", held.__func__)


def _of_function(path: str, held: types.FunctionType) -> Iterator[Reached]:
    code = held.__code__
    for name, cell in zip(code.co_freevars, held.__closure__ or (), strict=True):
        try:
            yield Reached(f"{path}.{name}", cell.cell_contents, cell)
        except ValueError:
            continue
    defaults = held.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    for name, one in zip(names, defaults, strict=True):
        yield Reached(f"{path}.{name}", one)
    for name, one in (held.__kwdefaults__ or {}).items():
        yield Reached(f"{path}.{name}", one, held.__kwdefaults__, name)
    for name in _globals_in(held):
        yield Reached(f"{path}.{name}", held.__globals__[name])
    for name, one in vars(held).items():
        yield Reached(f"{path}.{name}", one, vars(held), name)


_ENTER: tuple[tuple[Any, Callable[[str, Any], Iterator[Reached]]], ...] = (
    (nn.Module, _of_module),
    (dict, _of_dict),
    ((list, tuple, deque), _of_sequence),
    ((set, frozenset), _of_set),
    (functools.partial, _of_partial),
    (types.MethodType, _of_method),
    (types.FunctionType, _of_function),
)
"""How objects of a kind are entered; all others by their attributes."""
