"""The pickle interpreter: data comes out as it went in, and nothing else happens."""

import collections
import pickle
import sys
import typing
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch

from checkpoint.errors import CorruptCheckpoint, UnsupportedFormat
from checkpoint.foreign.memory_budget import MemoryBudget
from checkpoint.foreign.pickle_machine import unpickle
from checkpoint.foreign.pickle_objects import Array, NameOnly

PROTOCOLS = (2, 3, 4, 5)

VALUES = {
    "constants": [None, True, False, (), [], {}],
    "integers": [0, 1, 255, 256, 65_535, 65_536, -1, 2**31, -(2**31) - 1, 2**63, -(2**200)],
    "floats": [0.0, -0.0, 1.5, 1e308, float("inf"), float("-inf")],
    "text": ["", "a", "é", "日本", "\U0001f600", "x" * 300, "y" * 70_000],
    "bytes": [b"", b"\x00\xff", b"z" * 300, b"w" * 70_000],
    "bytearrays": [bytearray(b""), bytearray(b"\x00\xff" * 200)],
    "complex": [1 + 2j, complex(0, -1)],
    "tuples": [(1,), (1, 2), (1, 2, 3), tuple(range(10)), ((("deep",),),)],
    "sets": [set(), {1, "a"}, frozenset([1, 2]), set(range(3000))],
    "keys": [{1: 2, "a": 3, 1.5: 4, None: 5, False: 6, b"k": 7, (0, "t"): 8}],
    "long": [list(range(5000)), {str(i): i for i in range(5000)}],
    "nested": {"a": [{"b": ({"c": [1, 2]},)}]},
    "ordered": collections.OrderedDict([("z", 1), ("a", collections.OrderedDict())]),
    "counter": collections.Counter("abracadabra"),
}


def build(data: bytes, storages: dict[str, bytes] | None = None) -> typing.Any:
    def open_storage(key: str, size: int) -> torch.UntypedStorage:
        found = torch.frombuffer(bytearray((storages or {})[key]), dtype=torch.uint8)
        assert found.numel() == size
        return found.untyped_storage()

    return unpickle(
        lambda offset, length: data[offset : offset + length],
        len(data),
        open_storage,
        MemoryBudget(len(data)),
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_data_comes_out_as_it_went_in(value, protocol):
    built = build(pickle.dumps(value, protocol))

    assert built == value
    assert type(built) is type(value)
    assert repr(built) == repr(value) or isinstance(value, list)


def test_not_a_number_stays_one():
    assert repr(build(pickle.dumps([float("nan")]))) == "[nan]"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_values_stay_shared(protocol):
    inner = ["a"]

    first, second = build(pickle.dumps([inner, (inner,)], protocol))

    assert second[0] is first


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_defaultdict_becomes_a_dict(protocol):
    value = collections.defaultdict(lambda_free_factory, {"a": {"b": 1}})

    built = build(pickle.dumps(value, protocol))

    assert type(built) is dict
    assert built == {"a": {"b": 1}}


def lambda_free_factory() -> int:
    """Stand for a function of someone's code: it is mentioned in the pickle, never looked up."""
    raise AssertionError("a factory was called")


def test_an_ordered_dict_keeps_its_metadata():
    value = torch.nn.BatchNorm1d(2).state_dict()

    built = build(pickle.dumps(collections.OrderedDict()))
    assert not hasattr(built, "_metadata")

    plain = collections.OrderedDict(a=1)
    plain._metadata = value._metadata
    assert build(pickle.dumps(plain, 2))._metadata == value._metadata


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", ["a/b", "/", ".", "a b/c.th"])
def test_a_path_becomes_text(path, protocol):
    assert build(pickle.dumps([Path(path)], protocol)) == [str(Path(path))]


ARRAYS = {
    **{
        code: np.arange(6).reshape(2, 3).astype(code)
        for code in (
            "b1",
            "i1",
            "u2",
            "i4",
            "i8",
            "f2",
            "f4",
            "f8",
            "c16",
            ">f4",
            ">i8",
            "U5",
            "S3",
        )
    },
    "column order": np.asfortranarray(np.ones((2, 3)) * [[1], [2]]),
    "empty": np.ones((0, 3), np.float32),
    "no dimension": np.array(7),
    "not contiguous": np.arange(20)[::3],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_out_as_they_went_in(array, protocol):
    built = build(pickle.dumps(array, protocol))
    built = built.value if isinstance(built, Array) else built

    np.testing.assert_array_equal(built, array)
    assert built.dtype == array.dtype
    assert built.shape == array.shape
    built.fill(built.dtype.type(0))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("abc")])
def test_numpy_scalars_come_out_as_they_went_in(value, protocol):
    built = build(pickle.dumps(value, protocol))

    assert built == value
    assert type(built) is type(value)


def test_numpy_generators_of_old_come_out_as_they_went_in():
    state = np.random.RandomState(3).get_state()

    name, keys, *rest = build(pickle.dumps(state, 2))

    assert (name, *rest) == (state[0], *state[2:])
    np.testing.assert_array_equal(keys.value, state[1])


@pytest.mark.parametrize("value", [torch.float32, torch.device("cuda", 1), torch.Size([2, 3])])
def test_small_things_of_torch_come_out_as_they_went_in(value):
    for protocol in PROTOCOLS:
        assert build(pickle.dumps(value, protocol)) == value


def test_names_that_are_not_on_the_list_are_not_looked_up():
    assert "this" not in sys.modules

    found = build(
        b"\x80\x02](" + hostile.global_("this.s") + hostile.global_("no.such.name") + b"e."
    )

    assert found == [NameOnly("this.s"), NameOnly("no.such.name")]
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.list",
        "torch.load",
        "collections.UserDict",
        "torch.nn",
    ],
)
def test_a_call_of_such_a_name_is_refused_by_name(name):
    with pytest.raises(UnsupportedFormat, match=rf"to run {name}, .* was not run"):
        build(b"\x80\x02" + hostile.call(name) + b".")


@pytest.mark.parametrize("name", ["os.environ", "collections.OrderedDict"])
def test_setting_attributes_of_such_a_name_is_refused(name):
    with pytest.raises(UnsupportedFormat, match="set attributes"):
        build(b"\x80\x02" + hostile.global_(name) + b"}b.")


def test_setting_attributes_of_a_plain_value_makes_no_sense():
    with pytest.raises(CorruptCheckpoint, match="attributes of a value of type dict"):
        build(b"\x80\x02}}b.")


def test_functions_are_not_classes():
    with pytest.raises(CorruptCheckpoint, match="not a class"):
        build(b"\x80\x02" + hostile.global_("builtins.bytearray") + b")\x81.")


def test_only_the_instructions_of_data_are_known():
    known = {code for code in range(256) if not _is_unknown(code)}

    # What picklers of protocols 2 to 5 write, without those that pop, run or refer elsewhere.
    assert bytes(sorted(known)) == bytes(
        sorted(
            b"().BCGJKMNQRX]abcehjqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91"
            b"\x93\x94\x95\x96"
        )
    )


def _is_unknown(code: int) -> bool:
    try:
        build(bytes([code]))
    except CorruptCheckpoint as error:
        return "not an instruction" in str(error)
    except (LookupError, ValueError, TypeError):
        return False
    return False


def test_a_mere_mention_of_a_type_is_harmless():
    data = hostile.call(
        "_operator.getitem", hostile.global_("typing.Union"), hostile.global_("builtins.int")
    )
    assert build(b"\x80\x02" + data + b".") == NameOnly("typing.Union[...]")


def test_pickles_larger_than_what_is_read_at_a_time_are_read_whole():
    value = {f"key{i}": ["x" * (i % 7), i, b"y" * 1000] for i in range(3000)}

    assert build(pickle.dumps(value, 4)) == value


def test_a_tensor_sees_its_part_of_a_storage():
    data = b"\x80\x02" + hostile.tensor(hostile.storage(6), (2, 2), (1, 2), 1) + b"."
    content = torch.arange(6.0).numpy().tobytes()

    assert build(data, {"0": content}).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_a_ledger_stops_at_twice_the_size_of_the_file_and_a_little():
    ledger = MemoryBudget(10 * 2**20)
    ledger.spend(20 * 2**20)
    with pytest.raises(CorruptCheckpoint, match="more than the 76 MiB"):
        ledger.spend(64 * 2**20)
