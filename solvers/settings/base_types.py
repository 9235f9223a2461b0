"""What the models of `schema` are made of: kinds of sections, and types of values.

Each type says what pydantic checks. `keys` reads the same types to say in words what is allowed.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, Strict
from pydantic_core import core_schema

from .errors import nearest

UNSET: Final = "???"
"""How a configuration file writes a value that the user has to give."""


class Section(BaseModel):
    """A section of the settings: frozen, and built from plain values."""

    # pydantic builds the check of a section once, as a part of the check of the whole.
    model_config = ConfigDict(frozen=True, defer_build=True)


class OpenSection(Section):
    """A section in which users may add keys of their own. These stay in the configuration only."""

    model_config = ConfigDict(extra="ignore")


class ClosedSection(Section):
    """A section in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Described:
    """Metadata of a type: what it allows, in words. Types without it have the usual words."""

    words: str


@dataclass(frozen=True)
class UsualNames:
    """Metadata of a type: the usual names of an open set. A near miss of one is a mistake."""

    names: tuple[str, ...]

    def nearest(self, value: Any) -> str | None:
        """Return the usual name that a text was probably meant to be; None for any other value."""
        is_unusual = isinstance(value, str) and value not in self.names
        return nearest(value, self.names, cutoff=0.85) if is_unusual else None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._refuse_near_miss, handler(source))

    def _refuse_near_miss(self, value: Any) -> Any:
        if guess := self.nearest(value):
            raise ValueError(f"did you mean {guess}?")
        return value


def off_at_zero(value: float) -> float | None:
    """Return None for 0, since 0 and null both switch such a setting off."""
    return value or None


def _refuse_nan(value: float) -> float:
    if value != value:
        raise ValueError("NaN is not a number")
    return value


# Strict: `true` is not 1, and the text "1" is not 1. An integer is a number, too.
Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AfterValidator(_refuse_nan)]
Text = Annotated[str, Strict()]

Count = Annotated[Integer, Field(ge=1)]
Every = Annotated[Integer, Field(ge=0), AfterValidator(off_at_zero)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Device = Annotated[Text, Field(pattern=r"^[a-z]+(:[0-9]+)?$")]
Names = Annotated[tuple[Text, ...], Described("a list of names")]
# YAML reads the texts nan, 007 and true as values of other types. All of them are labels.
Label = Annotated[Text | Integer | Annotated[float, Strict()] | Flag, Described("a text")]
_Share = Annotated[Number, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Share, _Share], Described("a list of two numbers in [0, 1)")]
# A section with the name of a switch belongs to the user.
Switch = Annotated[Flag | Text | dict[Any, Any], Described("true, false or a name")]

Unset = Literal["???"]
Mode = Literal["min", "max"]
Level = Literal[
    "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "debug", "info", "warning", "error", "critical"
]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
