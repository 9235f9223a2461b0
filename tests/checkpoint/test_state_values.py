"""Values of Python's library, and of classes of a program, in a checkpoint and back."""

import datetime
import enum
import json
import sys
from collections import deque, namedtuple
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    StateMismatch,
    UnsupportedState,
    load_checkpoint,
)
from checkpoint.format.codec import encode
from checkpoint.format.decode import decode


class Color(enum.Enum):
    RED = 1
    ALSO_RED = 1  # noqa: PIE796
    BLUE = "blue"


class Level(enum.IntEnum):
    HIGH = 3


class Mood(enum.StrEnum):
    GOOD = "good"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Outer:
    class Inner(enum.Enum):
        ONE = 1


Point = namedtuple("Point", "x y")


class Span(NamedTuple):
    start: int
    end: Any = None


@dataclass
class Progress:
    seen: int
    weights: Any = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seen < 0:
            raise ValueError("called while a checkpoint is loaded")


@dataclass(frozen=True, slots=True)
class Frozen:
    path: Path
    color: Color


def trip(value: Any) -> Any:
    tree, tensors, _ = encode("source", {"key": value})
    return decode("source", json.loads(json.dumps(tree, allow_nan=False)), tensors)["key"]


UTC = datetime.UTC
NAMED = datetime.timezone(datetime.timedelta(hours=-3, minutes=-30), "here")


VALUES: list[Any] = [
    deque([1, (2, None)]),
    deque([1, 2], maxlen=3),
    deque(maxlen=0),
    frozenset({Color.RED, "a"}),
    Path("/a b/c"),
    PurePosixPath("x/y"),
    PureWindowsPath("c:/x"),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2026, 1, 2, tzinfo=UTC),
    datetime.datetime(2026, 1, 2, fold=1, tzinfo=NAMED),
    datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3, 4, tzinfo=UTC),
    datetime.timedelta(-1, 2, 3),
    Color.RED,
    Color.BLUE,
    Level.HIGH,
    Mood.GOOD,
    Outer.Inner.ONE,
    Access.READ,
    Access.READ | Access.WRITE,
    Access(0),
    Point(1, [2]),
    Span(1, Point(2, 3)),
    Progress(3, {"a": deque([1.5])}, ["b"]),
    Frozen(Path("a"), Color.BLUE),
    {Color.RED: 1, Level.HIGH: 2, Point(1, 2): 3, datetime.date(2026, 1, 2): 4},
]


@pytest.mark.parametrize(
    "value",
    VALUES,
    # Not by `repr`: the order of a set is another one in each process.
    ids=[f"{number}_{type(value).__name__}" for number, value in enumerate(VALUES)],
)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    back = trip(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_members_of_enums_come_back_as_themselves() -> None:
    assert trip(Color.ALSO_RED) is Color.RED
    assert trip(Access.READ) is Access.READ


def test_tensors_inside_come_back_and_stay_tied() -> None:
    weight = torch.randn(3)
    back = trip([Progress(1, weight), Span(1, weight), deque([weight])])
    assert torch.equal(back[0].weights, weight)
    assert back[0].weights is back[1].end is back[2][0]


def test_no_code_of_a_dataclass_runs_when_it_comes_back() -> None:
    value = Progress(1)
    value.seen = -1
    assert trip(value).seen == -1


def _inside() -> type[enum.Enum]:
    class Local(enum.Enum):
        A = 1

    return Local


@dataclass
class Deletes:
    path: str

    def __del__(self) -> None:
        pass


@dataclass
class More(dict[str, int]):
    size: int = 0


def _beside() -> Progress:
    value = Progress(1)
    value.cache = 2  # type: ignore[attr-defined]
    return value


class Berlin(datetime.tzinfo):
    def utcoffset(self, _: Any) -> datetime.timedelta:
        return datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (_inside().A, "top level of a module"),  # type: ignore[attr-defined]
        (Deletes("x"), "__del__"),
        (_beside(), "cache"),
        (datetime.datetime(2026, 1, 2, tzinfo=Berlin()), "datetime.timezone"),
        (More(), "More"),
        (range(3), "range"),
        (object(), "object"),
        (Color, "EnumType"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_would_not_come_back_is_refused_with_source_and_key(
    value: Any, why: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedState) as found:
        Checkpointer(tmp_path).save({"thing": {"key": value}}, epoch=1)
    assert "'thing', key 'key'" in str(found.value)
    assert why in str(found.value)
    assert not list(tmp_path.glob("epoch*"))


def test_a_manifest_with_such_values_is_of_version_5_and_others_are_not(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"thing": [Color.RED]}, epoch=1)
    checkpointer.save({"thing": [1]}, epoch=2)
    first, second = (
        (tmp_path / "checkpoints" / name / "manifest.json").read_text()
        for name in ("epoch_0001", "epoch_0002")
    )
    assert '"version": 5' in first
    assert '"version": 1' in second


@pytest.fixture
def lent_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that a program had imported when it saved."""
    module = ModuleType("lent_module")
    exec(
        "import dataclasses, enum\n"
        "class Kind(enum.Enum):\n    A = 1\n"
        "@dataclasses.dataclass\nclass Options:\n    size: int\n",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, "lent_module", module)
    return module


def test_a_class_that_is_not_imported_is_an_error_that_names_it_and_no_damage(
    lent_module: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "epoch_0001"
    Checkpointer(tmp_path).save({"thing": {"key": [lent_module.Kind.A]}, "n": 1}, epoch=1)
    del sys.modules["lent_module"]
    with pytest.raises(StateMismatch) as found:
        Checkpointer(tmp_path).load_newest()
    assert "source 'thing', key 'key.0'" in str(found.value)
    assert "import lent_module" in str(found.value)
    assert str(folder) in str(found.value)
    assert "lent_module" not in sys.modules
    assert load_checkpoint(folder, ["n"]).state == {"n": 1}


def test_a_class_that_lost_what_a_value_has_is_an_error_that_names_it(
    lent_module: ModuleType,
) -> None:
    trees = [encode("s", one)[0] for one in (lent_module.Kind.A, lent_module.Options(3))]
    lent_module.Kind = enum.Enum("Kind", "B", module="lent_module")  # type: ignore[attr-defined]
    lent_module.Options = dataclass(type("Options", (), {"__annotations__": {"width": int}}))  # type: ignore[attr-defined]
    with pytest.raises(StateMismatch, match="A of enum Kind"):
        decode("s", trees[0], {})
    with pytest.raises(StateMismatch, match="field size, width"):
        decode("s", trees[1], {})


def test_a_field_that_is_new_in_a_dataclass_has_its_default() -> None:
    tree = encode("s", Progress(2, "w", []))[0]
    del tree["$dataclass"]["weights"]  # type: ignore[union-attr,call-overload,arg-type,index]
    back = decode("s", tree, {})
    assert back == Progress(2, None, [])


class Lazy(ModuleType):
    """A package that imports its parts when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


HOSTILE: dict[str, Any] = {
    "a function": {"$dataclass": {}, "class": "os:system"},
    "a class of another kind": {"$dataclass": {}, "class": "subprocess:Popen"},
    "an enum that is none": {"$enum": "x", "class": "pathlib:Path"},
    "a flag of an enum": {"$enum": ["RED"], "class": f"{__name__}:Color"},
    "a named tuple that is none": {"$namedtuple": [1], "class": "builtins:tuple"},
    "a dataclass with __del__": {"$dataclass": {"path": "x"}, "class": f"{__name__}:Deletes"},
    "a dataclass that is more": {"$dataclass": {"size": 1}, "class": f"{__name__}:More"},
    "a module that is not there": {"$enum": "x", "class": "antigravity:X"},
    "a part of a lazy package": {"$enum": "x", "class": "lazy_package:part"},
    "an attribute of a class": {"$enum": "x", "class": "builtins:int.__subclasses__"},
    "a name that is none": {"$enum": "x", "class": ["os"]},
    "no name": {"$enum": "x"},
    "a tensor that is none": {"$subclass": {}, "class": "builtins:dict"},
    "a tensor of no parts": {"$subclass": {}, "class": "torch:Tensor"},
    "fields that are none": {"$dataclass": [1], "class": f"{__name__}:Progress"},
    "a path of no kind": {"$path": "x", "kind": "os"},
    "a date that is none": {"$date": "tomorrow"},
    "a length below zero": {"$deque": [], "maxlen": -1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_refused_and_runs_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lazy_package", Lazy("lazy_package"))
    before = set(sys.modules)
    with pytest.raises((CorruptCheckpoint, StateMismatch)) as found:
        decode("thing", {"key": HOSTILE[name]}, {})
    assert "'thing'" in str(found.value)
    assert set(sys.modules) == before
