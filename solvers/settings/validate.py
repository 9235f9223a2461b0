"""Parse a configuration into `Settings`, or say in one line a problem what cannot work.

Parsing changes nothing, and does not count as a read of any key. A configuration in the style of
Audiocraft, in which whole sections are missing, is fine: the defaults apply.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from .base_types import UNSET
from .errors import ConfigError, nearest
from .keys import Key, keys, members, sections
from .schema import Settings
from .unread_keys import unrecorded

# Audiocraft's code takes a number for this section, though its file has a section.
_PLAIN_SECTION = "schedule.exponential"
# A key of a user's own is a slip if its name is at least that similar to one of ours.
_SLIP = 0.85
# Characters of a value that a message shows.
_LONGEST = 200


def parse(cfg: DictConfig) -> Settings:
    """Check every key of the framework in `cfg`, and return the values.

    Raises:
        ConfigError: unknown keys, wrong types or values, missing values; or, if there are none of
            these, combinations that cannot work. It names all that it found, one line each.
    """
    reader = _Reader(cfg)
    with unrecorded():
        values = reader.read()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        # A key that could not be read is named once.
        wrong = dict(_lines(error, values)) | reader.wrong
        raise ConfigError(*reader.unknown, *wrong.values()) from error
    if reader.unknown or reader.wrong:
        raise ConfigError(*reader.unknown, *reader.wrong.values())
    return settings


def changed_keys(settings: Settings, cfg: DictConfig) -> list[str]:
    """Name the keys that have another value in `cfg` than when it was parsed.

    Raises:
        ConfigError: a new value cannot work.
    """
    before, now = (one.model_dump(by_alias=True) for one in (settings, parse(cfg)))
    return [key for key in keys() if _at(before, key) != _at(now, key)]


class _Reader:
    """Collects the values of the framework's keys from a configuration, resolved and plain.

    Attributes:
        unknown: what is wrong with names, one line each.
        wrong: the keys that cannot be read -> what is wrong.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.unknown: list[str] = []
        self.wrong: dict[str, str] = {}
        self._cfg = cfg

    def read(self) -> dict[str, Any]:
        """Return the values as nested dicts, without the values that are not given."""
        return self._section("", OmegaConf.to_container(self._cfg))

    def _section(self, section: str, content: Any) -> dict[str, Any]:
        known = members(section)
        unknown = (
            _unknown_key(section, n, value) for n, value in content.items() if n not in known
        )
        self.unknown += filter(None, unknown)
        values: dict[str, Any] = {}
        for name, member in known.items():
            if isinstance(member, str):
                # Also if the section is not given: its keys have defaults.
                values[name] = self._section(member, self._content(member, content.get(name)))
            elif name in content and (value := self._value(member, content[name])) != UNSET:
                values[name] = value
        return values

    def _content(self, section: str, written: Any) -> Mapping[Any, Any]:
        """Return what a section holds, with the references in it as they are written."""
        content = self._resolved(section, deeply=False) if _is_reference(written) else written
        if content is None or content == UNSET:
            return {}
        if isinstance(content, Mapping):
            return content
        if section == _PLAIN_SECTION and isinstance(content, int | float):
            return {"lr_decay": content}
        problem = f"{section}={_shown(content)}: expected a section with keys of its own"
        self.wrong[section] = problem
        return {}

    def _value(self, key: Key, written: Any) -> Any:
        """Return the value of a key; `UNSET` if the default applies, or if there is no value."""
        value = self._resolved(key.name, deeply=True) if _is_reference(written) else written
        if value == UNSET == key.default:
            self.wrong.setdefault(key.name, _not_set(key))
        return value

    def _resolved(self, name: str, deeply: bool) -> Any:
        try:
            found = OmegaConf.select(self._cfg, name, default=UNSET)
            is_config = OmegaConf.is_config(found)
            return OmegaConf.to_container(found, resolve=deeply) if is_config else found
        except OmegaConfBaseException as error:
            reason = str(error).strip().split("\n", 1)[0]
            self.wrong[name] = f"{name} cannot be resolved: {reason}"
            return UNSET


def _is_reference(written: Any) -> bool:
    """Whether a value, or a value inside it, is of the form `${...}`."""
    if isinstance(written, Mapping):
        return any(map(_is_reference, written.values()))
    if isinstance(written, list):
        return any(map(_is_reference, written))
    return isinstance(written, str) and "${" in written


def _unknown_key(section: str, name: Any, value: Any) -> str | None:
    """Say what is wrong with a name that is not ours; None if it may be a key of the user's own."""
    prefix = f"{section}." if section else ""
    is_closed = sections()[section].model_config["extra"] == "forbid"
    names = [n for n, m in members(section).items() if is_closed or _is_alike(m, value)]
    guess = nearest(str(name), names, 0.6 if is_closed else _SLIP)
    if guess:
        return f"unknown key {prefix}{_shown(name)}: did you mean {prefix}{guess}?"
    if f"{prefix}{name}" in keys():
        return f"unknown key '{prefix}{name}': write a section for each part of the name"
    if is_closed:
        return f"unknown key {prefix}{_shown(name)}: {section} has {', '.join(names)}"
    return None


def _is_alike(member: Key | str, value: Any) -> bool:
    """Whether a value of an unknown name could be meant for a key: a list is not one number."""
    if isinstance(value, Mapping) or isinstance(member, str):
        return isinstance(value, Mapping) and isinstance(member, str)
    return isinstance(value, list) == member.holds_list


def _lines(error: ValidationError, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the keys of which pydantic reports an error, and the line that says it."""
    for one in error.errors(include_url=False):
        name, key = _located(one["loc"])
        if key is None:
            # A combination of keys: its text is complete.
            yield name, str(one["ctx"]["error"])
        else:
            value = _at(values, name)
            yield name, _not_set(key) if value == UNSET else _wrong_value(key, value)


def _located(loc: tuple[int | str, ...]) -> tuple[str, Key | None]:
    """Return the full name of what an error is about, and its key unless it is a section."""
    section = ""
    for part in loc:
        member = members(section)[str(part)]
        if isinstance(member, Key):
            # What follows is inside the value.
            return member.name, member
        section = member
    return section, None


def _at(values: Any, name: str) -> Any:
    """Return a value in nested dicts by its full name; `UNSET` if it is not given."""
    *parents, last = name.split(".")
    for part in parents:
        values = values[part]
    return values.get(last, UNSET)


def _not_set(key: Key) -> str:
    hint = ", null if this solver does not use it" if key.allows_null else ""
    return f"{key.name} is not set: give it a value ({key.name}=...{hint})"


def _wrong_value(key: Key, value: Any) -> str:
    guess = key.nearest(value)
    hint = f"did you mean {guess}?" if guess else ""
    if guess and not key.choices:
        # Any name is allowed, but this one looks like a slip.
        return f"{key.name}={_shown(value)}: {hint}"
    ending = f": {hint}" if guess else f", not {_described(value)}"
    return f"{key.name}={_shown(value)}: expected {key.expected()}{ending}"


def _shown(value: Any) -> str:
    """Return a value as the user could have written it, in one line."""
    text = value
    if not isinstance(value, str):
        try:
            text = json.dumps(value, default=str, ensure_ascii=False)
        except (TypeError, ValueError):
            # Names that JSON does not have, and integers of more digits than Python writes.
            text = f"({type(value).__name__})"
    if not text.isprintable():
        text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= _LONGEST else "this text"
    words = {bool: "a boolean", list: "this list", dict: "a section", type(None): "null"}
    return words.get(type(value)) or _shown(value)
