"""Tensors of a subclass that is made of other tensors, such as quantised ones, as JSON trees.

torch has a protocol for these: `__tensor_flatten__` gives the names of the inner tensors and a
context, and `__tensor_unflatten__` builds the same tensor of both; `torch.compile` calls it.

A checkpoint is untrusted. `classes.find` looks a name up among the classes that are imported
already. The one function of the class that is called is `__tensor_unflatten__`, with plain values
and plain tensors. The tensor that comes back has to be made of just these.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CorruptCheckpoint, StateMismatch
from ..machine_errors import is_machine_error
from .classes import find, name_of
from .values import Decode, Encode, Refused

TAG = "$subclass"


def is_made_of_others(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that says of which tensors it is made."""
    return type(tensor) is not torch.Tensor and _follows_protocol(type(tensor))


def encode_subclass(tensor: torch.Tensor, encode: Encode) -> dict[str, Any]:
    """Return the tree of such a tensor.

    Args:
        tensor: one for which `is_made_of_others` is true.
        encode: for what it holds.

    Raises:
        Refused: its class cannot be found again.
    """
    kind = type(tensor)
    name = name_of(kind)
    if name is None:
        raise Refused(
            f"is a tensor of class {kind.__module__}.{kind.__qualname__}, which is not found by "
            "that name: define the class at the top level of a module"
        )
    inner, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {
        TAG: {one: encode(getattr(tensor, one), one) for one in inner},
        "class": name,
        "context": encode(context, "context"),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "parameter": isinstance(tensor, torch.nn.Parameter),
        "requires_grad": tensor.requires_grad,
    }


def decode_subclass(tree: dict[str, Any], decode: Decode) -> torch.Tensor:
    """Build the tensor again.

    Raises:
        StateMismatch: the process has not imported its class, or the class has changed and refuses
            these parts; the message says which.
        CorruptCheckpoint: it is no such tensor.
    """
    kind = find(tree["class"])
    if not issubclass(kind, torch.Tensor) or not _follows_protocol(kind):
        raise CorruptCheckpoint(f"{tree['class']!r} is no tensor that is made of others")
    inner = {name: decode(one) for name, one in tree[TAG].items()}
    if not all(isinstance(one, torch.Tensor) for one in inner.values()):
        raise CorruptCheckpoint(f"a part of a tensor of class {tree['class']!r} is no tensor")
    shape, stride = torch.Size(tree["shape"]), tuple(tree["stride"])
    result = _built(kind, inner, decode(tree["context"]), shape, stride)
    if type(result) is not kind or result.shape != shape or not _is_made_of(result, inner):
        raise CorruptCheckpoint(f"a tensor of class {tree['class']!r} is described wrongly")
    if tree["parameter"]:
        return torch.nn.Parameter(result, requires_grad=bool(tree["requires_grad"]))
    built: torch.Tensor = result
    return built


def _built(kind: Any, *parts: Any) -> Any:
    build: Callable[..., Any] = kind.__tensor_unflatten__
    try:
        return build(*parts)
    except Exception as error:
        if is_machine_error(error):
            raise
        # The code of the program refuses, which it may do after a change, with any error.
        line = str(error).partition("\n")[0][:200]
        raise StateMismatch(
            f"class {kind.__qualname__} refuses to build it ({type(error).__name__}: {line}): use "
            "the version of the class that it was saved with, or load without this source"
        ) from error


def _follows_protocol(kind: type) -> bool:
    names = {name for base in kind.__mro__ for name in vars(base)}
    return {"__tensor_flatten__", "__tensor_unflatten__"} <= names


def _is_made_of(tensor: Any, inner: dict[str, torch.Tensor]) -> bool:
    names, _ = tensor.__tensor_flatten__()
    return {*names} == inner.keys() and all(getattr(tensor, one) is inner[one] for one in names)
