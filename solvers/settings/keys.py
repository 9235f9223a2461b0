"""The keys of the settings one by one: default, choices, and in words what each may hold.

For code that speaks about keys: errors, `standard-solver help`, completion, comparisons of files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .base_types import UNSET, Described, Section, Unset, UsualNames, off_at_zero
from .errors import nearest
from .schema import Settings

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
_BOUNDS = (
    (Gt, "gt", "above"),
    (Ge, "ge", "of at least"),
    (Le, "le", "of at most"),
)


@dataclass(frozen=True)
class Key:
    """A key of the framework.

    Args:
        name: the full name, such as `optim.lr`.
        default: what a configuration without the key means, as plain values; `UNSET` if the user
            has to give a value.
        type: the type of the value with its metadata, see `base_types`.
    """

    name: str
    default: Any
    type: Any

    def accepts(self, value: Any) -> bool:
        """Whether the key allows a value, plain and resolved."""
        try:
            self._adapter.validate_python(value)
        except ValidationError:
            return False
        return bool(value != UNSET)

    @property
    def allows_null(self) -> bool:
        """Whether the value may be null."""
        return any(kind is NoneType for kind, _ in _alternatives(self.type))

    @property
    def is_flag(self) -> bool:
        """Whether the value is true or false, and nothing else."""
        return self._kind is bool and not self._has(Described)

    @property
    def is_off_at_zero(self) -> bool:
        """Whether 0 means the same as null."""
        return any(
            isinstance(item, AfterValidator) and item.func is off_at_zero
            for item in self._field_metadata
        )

    @property
    def holds_list(self) -> bool:
        """Whether the value is a list."""
        return get_origin(self._kind) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """All that is allowed, for a closed set; empty otherwise."""
        return get_args(self._kind) if get_origin(self._kind) is Literal else ()

    @property
    def usual_names(self) -> tuple[str, ...]:
        """The usual names, for an open set; empty otherwise."""
        return self._usual.names

    def nearest(self, value: Any) -> str | None:
        """Return the choice or the usual name that a text was probably meant to be."""
        if self.choices:
            return nearest(value, self.choices) if isinstance(value, str) else None
        return self._usual.nearest(value)

    def expected(self) -> str:
        """Say in words what is allowed, such as `an integer of at least 1, or null`."""
        described = next((i.words for i in self._field_metadata if isinstance(i, Described)), None)
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = described or _WORDS[self._kind] + self._range()
        return words + (", or null" if self.allows_null else "")

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type)

    @property
    def _kind(self) -> Any:
        return self._alternative[0]

    @property
    def _field_metadata(self) -> tuple[Any, ...]:
        return self._alternative[1]

    @cached_property
    def _alternative(self) -> tuple[Any, tuple[Any, ...]]:
        """The type of a value that is given and not null, without and with its metadata."""
        return next(
            (kind, metadata)
            for kind, metadata in _alternatives(self.type)
            if kind not in (NoneType, Unset)
        )

    @property
    def _usual(self) -> UsualNames:
        return next((i for i in self._field_metadata if isinstance(i, UsualNames)), UsualNames(()))

    def _has(self, kind: type) -> bool:
        return any(isinstance(item, kind) for item in self._field_metadata)

    def _range(self) -> str:
        bounds = [
            f"{words} {_short(getattr(item, attribute))}"
            for kind, attribute, words in _BOUNDS
            for item in self._field_metadata
            if isinstance(item, kind)
        ]
        return " " + " and ".join(bounds) if bounds else ""


@cache
def keys() -> Mapping[str, Key]:
    """Return all keys of the framework by their full names, in the order of the schema."""
    found = {
        key.name: key
        for section in sections()
        for key in members(section).values()
        if isinstance(key, Key)
    }
    return MappingProxyType(found)


@cache
def sections() -> Mapping[str, type[Section]]:
    """Return the model of each section by its full name; the name of the root is empty."""
    return MappingProxyType(dict(_sections("", Settings)))


@cache
def members(section: str) -> Mapping[str, Key | str]:
    """Return what a section holds by the names inside it: keys, and full names of sections."""
    prefix = f"{section}." if section else ""
    found: dict[str, Key | str] = {}
    for attribute, field in sections()[section].model_fields.items():
        name = field.alias or attribute
        full = f"{prefix}{name}"
        found[name] = full if _is_section(field) else Key(full, _default(field), _type(field))
    return MappingProxyType(found)


def _sections(name: str, model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield name, model
    for inner, field in model.model_fields.items():
        if _is_section(field):
            yield from _sections(f"{name}.{inner}" if name else inner, field.annotation)  # type: ignore[arg-type]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _type(field: FieldInfo) -> Any:
    if not field.metadata:
        return field.annotation
    return Annotated[field.annotation, *field.metadata]


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return UNSET
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _alternatives(hint: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Give the plain types that a type allows, each with the metadata that applies to it."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        for kind, more in _alternatives(inner):
            yield kind, (*more, *_flat(metadata))
    elif get_origin(hint) in _UNIONS:
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint, ()


_UNIONS = (get_origin(int | str), get_origin(Annotated[int, 0] | None))


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
