"""Any value of any key gives settings, or one line that names the key and what it may hold."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from solvers import ConfigError
from solvers.settings.keys import Key, keys, members, sections
from solvers.settings.validate import parse

NAN, HUGE, LONGEST = math.nan, 10**400, 10**5000
HOSTILE: list[Any] = [
    *(True, 0, 1, -1, HUGE, LONGEST, 0.5, NAN, math.inf, -math.inf),
    *("", "1", "null", "日本語", "a\nb", "\ud800", "{x}", "%s", "$", "x" * 10_000),
    *([], ["model"], [1], [["model"]], {}, {"a": 1}, {3: None}, None),
]
# What a key may hold, by the first words of what it expects -> values that it must refuse.
REFUSED: dict[str, list[Any]] = {
    "true or false": [0, 1, "true", "", [], {}, {"a": 1}, 1.0],
    "an integer": [True, 1.0, 1.5, NAN, "3", "three", [], [3], {}, {"a": 1}],
    "a number": [True, NAN, "0.5", "1e-3", "half", [], [0.5], {}, {"a": 1}],
    "a text": [[], ["a"], {}, {"a": 1}],
    "one of": [True, 0, NAN, "", "nothing like that", [], ["min"], {}, {"a": 1}],
    "a list of names": [True, 1, "model", [1], [None], [["model"]], {}, {"model": 1}],
    "a list of two numbers": [0.9, "0.9", [0.9], [0.9, 1.0], [0.9, NAN], [0.9, "0.9"], [0.9] * 3],
    "true, false or a name": [1, 0.5, [], ["eager"]],
}


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def configuration(*changes: dict[str, Any]) -> DictConfig:
    """Return sections, with the one value that has no default; any section may be replaced."""
    whole: dict[Any, Any] = {"optim": {"epochs": 3}}
    for change in changes:
        whole |= change
    if isinstance(whole["optim"], dict):
        whole["optim"] = {"epochs": 3, **whole["optim"]}
    return OmegaConf.create(whole)


def answer(*changes: dict[str, Any]) -> list[str]:
    """Return the lines of the error for these changes; none if they can work."""
    try:
        parse(configuration(*changes))
    except ConfigError as error:
        return str(error).split("\n")
    return []


def section(name: str) -> str:
    return name.rpartition(".")[0]


def printable(line: str) -> bool:
    """Whether a terminal shows the text as a single line that is not too long."""
    return line.isprintable() and len(line) < 1000


def shown(value: Any) -> str:
    """Return a value for a failed test; Python writes no integer of more than 4300 digits."""
    return "LONGEST" if value is LONGEST else repr(value)


def refused(key: Key) -> list[Any]:
    (kind,) = [words for words in REFUSED if key.expected().startswith(words)]
    values = list(REFUSED[kind])
    if "at least" in key.expected() or "above" in key.expected():
        values += [-1, -math.inf] if kind == "a number" else [-1, -HUGE]
    return values if key.allows_null else [*values, None]


def test_a_value_of_a_wrong_type_is_one_line_with_the_key_and_what_it_expects() -> None:
    failures = []
    for name, key in keys().items():
        for value in refused(key):
            lines = answer(nested(name, value))
            is_named = [line.startswith(f"{name}=") and key.expected() in line for line in lines]
            failures += [(name, value, lines)] if is_named != [True] else []
    assert not failures


def test_no_value_gives_more_than_one_line_or_another_error() -> None:
    failures = []
    for name in keys():
        for value in HOSTILE:
            lines = answer(nested(name, value))
            # A value that is allowed by itself may need another key of the section.
            is_fine = [(name in one or section(name) in one) and printable(one) for one in lines]
            failures += [(name, shown(value), lines)] if is_fine not in ([], [True]) else []
    assert not failures


def test_a_reference_that_leads_nowhere_is_one_line_with_the_key() -> None:
    failures = []
    for name in keys():
        for value in ("${nothing.there}", "${oc.env:THERE_IS_NO_SUCH_VARIABLE}", "${nothing:}"):
            lines = answer(nested(name, value))
            is_named = [line.startswith(f"{name} cannot be resolved: ") for line in lines]
            failures += [(name, value, lines)] if is_named != [True] else []
    assert not failures


def test_a_reference_to_a_value_that_does_not_fit_is_one_line_with_the_key() -> None:
    for name, key in keys().items():
        (line,) = answer(nested(name, "${mine.value}"), {"mine": {"value": refused(key)[0]}})
        assert line.startswith(f"{name}=")


def test_a_value_in_place_of_a_section_is_one_line_with_the_name_of_the_section() -> None:
    failures = []
    for name in filter(None, sections()):
        # Audiocraft takes a number for one of the sections.
        others = [] if name == "schedule.exponential" else [True, NAN, LONGEST]
        for value in ("text", "日本語", [], [1], "${nothing}", *others):
            lines = [one for one in answer(nested(name, value)) if "epochs is not set" not in one]
            starts = (f"{name}=", f"{name} cannot be resolved")
            is_named = [line.startswith(starts) and printable(line) for line in lines]
            failures += [(name, value, lines)] if is_named != [True] else []
    assert not failures


def test_a_section_that_is_null_or_empty_has_its_defaults() -> None:
    usual = parse(configuration())
    for name in filter(None, sections()):
        for value in (None, "???", {}):
            if name == "optim" and value != {}:
                (line,) = answer({name: value})
                assert line.startswith("optim.epochs is not set")
            else:
                assert parse(configuration(nested(name, value))) == usual


def test_a_slip_in_any_section_is_one_line_with_the_nearest_name() -> None:
    for parent in sections():
        for name, member in members(parent).items():
            if len(name) < 5:
                continue
            full = f"{parent}.{name}" if parent else name
            wrong = full + name[-1]
            value: Any = {} if isinstance(member, str) else ["x"] if member.holds_list else 1
            assert answer(nested(wrong, value)) == [f"unknown key {wrong}: did you mean {full}?"]


def test_names_of_any_kind_are_fine_in_open_sections_and_one_line_in_closed_ones() -> None:
    names: list[Any] = ["日本語", "a\nb", "", " ", 3, True, 0.5]
    failures = []
    for parent, model in sections().items():
        is_closed = model.model_config["extra"] == "forbid"
        for name in names:
            lines = answer(nested(parent, {name: 1}) if parent else {name: 1})
            is_named = [
                one.startswith(f"unknown key {parent}.") and printable(one) for one in lines
            ]
            failures += [(parent, name, lines)] if is_named != [True] * is_closed else []
    assert not failures


def test_every_mistake_is_reported_in_a_line_of_its_own() -> None:
    lines = answer(
        {"optim": {"epoch": 3, "lr": "fast", "ema": {"decay": 2}}},
        {"checkpoint": {"save_evry": 1, "keep_last": True}, "seed": "${nothing}"},
        {"early_stopping": 3, "logging.level": "INFO"},
    )
    assert [line.split(":")[0] for line in lines] == [
        "unknown key 'logging.level'",
        "unknown key optim.epoch",
        "unknown key checkpoint.save_evry",
        "optim.lr=fast",
        "optim.ema.decay=2",
        "checkpoint.keep_last=true",
        "seed cannot be resolved",
        "early_stopping=3",
    ]


def test_keys_of_ones_own_are_not_resolved() -> None:
    own = {"mine": "${nothing}", "optim": {"mine": "${nothing}"}, "dataset": {"train": "${no:}"}}
    assert answer(own) == []
    assert answer({"optim": {"ema": "${mine}"}, "mine": {"use": True, "decay": 0.5}}) == []
    assert answer({"generate": "${mine}", "mine": {"every": 1, "other": "${nothing}"}}) == []
