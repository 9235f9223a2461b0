"""Plain values of Python's library, and of classes that a program defines, as JSON trees.

These are deques, paths, dates and times, members of enums, named tuples and dataclasses. A tree
names the class of the last three, and `classes.find` looks that up among what is imported already.

A checkpoint is untrusted, so that no value runs code of the class that it names: a member of an
enum is looked up, a named tuple is made as a tuple, and a dataclass without `__init__`,
`__post_init__` and `__setattr__`. A class with `__del__` is refused: it would run later. A file can
still choose among the classes of a program, as it can choose among numbers: the code that uses a
loaded value must check its class.
"""

import dataclasses
import datetime
import functools
import operator
from collections import deque
from collections.abc import Callable
from enum import Enum, Flag
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import CorruptCheckpoint, StateMismatch
from .classes import find, name_of

Encode = Callable[[Any, Any], Any]
"""Encodes a part of a value, given the key that it has in it."""

Decode = Callable[[Any], Any]

_PATHS = {"Path": Path, "PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}
_MISSING = dataclasses.MISSING


class Refused(Exception):
    """A value cannot be saved; the text says why, beginning with a verb."""


def encode_value(value: Any, encode: Encode) -> dict[str, Any] | None:
    """Return the tree of a value; None if it is of no kind that is known here.

    Args:
        value: any object.
        encode: for what it holds.

    Raises:
        Refused: it is of a known kind, and not all that it holds would come back.
    """
    kind = type(value)
    if kind is deque:
        return {"$deque": [encode(one, i) for i, one in enumerate(value)], "maxlen": value.maxlen}
    if isinstance(value, PurePath):
        name = "Path" if kind is type(Path()) else kind.__name__
        return {"$path": str(value), "kind": name} if name in _PATHS else None
    if kind in _TIMES:
        return _TIMES[kind](value)
    if isinstance(value, Enum):
        return {"$enum": _members(value), "class": _named(kind)}
    if _is_named_tuple(kind):
        return {"$namedtuple": _items(value, encode), "class": _named(kind)}
    if dataclasses.is_dataclass(kind):
        return {"$dataclass": _fields(value, encode), "class": _named(kind)}
    return None


def _named(kind: type) -> str:
    if _has_destructor(kind):
        raise Refused(f"is of class {kind.__qualname__}, which has a method __del__")
    name = name_of(kind)
    if name is None:
        raise Refused(
            f"is of class {kind.__module__}.{kind.__qualname__}, which is not found by that name: "
            "define the class at the top level of a module"
        )
    return name


def _members(value: Enum) -> str | list[str]:
    if not isinstance(value, Flag):
        return value._name_
    names = [str(one._name_) for one in value]
    if _flag(type(value), names) is not value:
        raise Refused(f"is {value!r}, which has bits that are no members")
    return names


def _flag(kind: type[Flag], names: list[str]) -> Flag:
    members = map(kind.__members__.__getitem__, names)
    return functools.reduce(operator.or_, members, kind(0))


def _is_named_tuple(kind: type) -> bool:
    fields = getattr(kind, "_fields", None) if issubclass(kind, tuple) else None
    return type(fields) is tuple and all(type(name) is str for name in fields)


def _items(value: Any, encode: Encode) -> list[Any]:
    if getattr(value, "__dict__", None):
        raise Refused(f"has attributes beside its fields: {', '.join(vars(value))}")
    return [encode(one, name) for name, one in zip(value._fields, value, strict=True)]


def _fields(value: Any, encode: Encode) -> dict[str, Any]:
    kind = type(value)
    names = [field.name for field in dataclasses.fields(value)]
    if not _is_plain_dataclass(kind):
        raise Refused(f"is of class {kind.__qualname__}, which is more than a dataclass")
    if beside := getattr(value, "__dict__", {}).keys() - {*names}:
        raise Refused(f"has attributes beside its fields: {', '.join(sorted(beside))}")
    if unset := [name for name in names if not hasattr(value, name)]:
        raise Refused(f"has fields without a value: {', '.join(unset)}")
    return {name: encode(getattr(value, name), name) for name in names}


def _datetime(value: datetime.datetime) -> dict[str, Any]:
    plain = value.replace(tzinfo=None, fold=0)
    return {"$datetime": plain.isoformat(), "fold": value.fold, "zone": _zone(value.tzinfo)}


def _time(value: datetime.time) -> dict[str, Any]:
    plain = value.replace(tzinfo=None, fold=0)
    return {"$time": plain.isoformat(), "fold": value.fold, "zone": _zone(value.tzinfo)}


def _timedelta(value: datetime.timedelta) -> dict[str, Any]:
    return {"$timedelta": [value.days, value.seconds, value.microseconds]}


def _zone(zone: datetime.tzinfo | None) -> list[Any] | None:
    if zone is None:
        return None
    if type(zone) is not datetime.timezone:
        raise Refused(
            f"has a time zone of type {type(zone).__qualname__}: give it one of datetime.timezone"
        )
    offset = zone.utcoffset(None)
    name = zone.tzname(None)
    is_own = name != datetime.timezone(offset).tzname(None)
    return [*_timedelta(offset)["$timedelta"], *([name] if is_own else [])]


_TIMES: dict[type, Callable[[Any], dict[str, Any]]] = {
    datetime.datetime: _datetime,
    datetime.date: lambda value: {"$date": value.isoformat()},
    datetime.time: _time,
    datetime.timedelta: _timedelta,
}


def _decoded_zone(zone: list[Any] | None) -> datetime.timezone | None:
    if zone is None:
        return None
    days, seconds, microseconds, *name = zone
    return datetime.timezone(datetime.timedelta(days, seconds, microseconds), *name)


def _decoded_enum(names: Any, tree: dict[str, Any], _: Decode) -> Enum:
    kind = find(tree["class"])
    if not issubclass(kind, Enum):
        raise CorruptCheckpoint(f"{tree['class']!r} is no enum")
    missing = {names} if isinstance(names, str) else {*names}
    if missing := missing - kind.__members__.keys():
        raise StateMismatch(
            f"it is {', '.join(sorted(missing))} of enum {kind.__qualname__}, which has no such "
            "member any more: add it, or load without this source"
        )
    if isinstance(names, str):
        return kind.__members__[names]
    if not issubclass(kind, Flag):
        raise CorruptCheckpoint(f"{tree['class']!r} is no flag")
    return _flag(kind, names)


def _decoded_named_tuple(items: Any, tree: dict[str, Any], decode: Decode) -> Any:
    kind = find(tree["class"])
    if not _is_named_tuple(kind) or _has_destructor(kind):
        raise CorruptCheckpoint(f"{tree['class']!r} is no named tuple")
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    if len(items) != len(fields):
        raise StateMismatch(
            f"it has {len(items)} fields, and named tuple {kind.__qualname__} has "
            f"{', '.join(fields)} now: give it the fields that it had, or load without this source"
        )
    return tuple.__new__(kind, map(decode, items))


def _decoded_dataclass(values: Any, tree: dict[str, Any], decode: Decode) -> Any:
    kind: Any = find(tree["class"])
    if not _is_plain_dataclass(kind) or _has_destructor(kind):
        raise CorruptCheckpoint(f"{tree['class']!r} is no dataclass")
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    # A field that is new here has its default.
    needed = {name for name, default in fields.items() if default is _MISSING}
    if odd := (values.keys() - fields.keys()) | (needed - values.keys()):
        raise StateMismatch(
            f"it is of dataclass {kind.__qualname__}, and only there or only here it has the field "
            f"{', '.join(sorted(odd))}: give it the fields that it had, or load without this source"
        )
    result: Any = object.__new__(kind)
    for name, default in fields.items():
        value = decode(values[name]) if name in values else default
        # Not the class's own `__setattr__`, which a frozen one refuses, too.
        object.__setattr__(result, name, value)
    return result


def _is_plain_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__new__ is object.__new__


def _has_destructor(kind: type) -> bool:
    return any("__del__" in vars(base) for base in kind.__mro__)


def _decoded_deque(items: Any, tree: dict[str, Any], decode: Decode) -> deque[Any]:
    return deque(map(decode, items), tree["maxlen"])


def _decoded_datetime(text: Any, tree: dict[str, Any], _: Decode) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(text)
    return value.replace(tzinfo=_decoded_zone(tree["zone"]), fold=tree["fold"])


def _decoded_time(text: Any, tree: dict[str, Any], _: Decode) -> datetime.time:
    value = datetime.time.fromisoformat(text)
    return value.replace(tzinfo=_decoded_zone(tree["zone"]), fold=tree["fold"])


DECODERS: dict[str, Callable[[Any, dict[str, Any], Decode], Any]] = {
    "$deque": _decoded_deque,
    "$path": lambda text, tree, _: _PATHS[tree["kind"]](text),
    "$datetime": _decoded_datetime,
    "$date": lambda text, *_: datetime.date.fromisoformat(text),
    "$time": _decoded_time,
    "$timedelta": lambda parts, *_: datetime.timedelta(*parts),
    "$enum": _decoded_enum,
    "$namedtuple": _decoded_named_tuple,
    "$dataclass": _decoded_dataclass,
}
"""By tag of a tree: what builds its value of what stands under the tag, and of the whole tree."""
