"""Files of others: honest ones come back bit by bit, hostile ones are refused and harm nothing."""

import collections
import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from flashy.state import AttributeWrapper, StateManager, WriteOnlyWrapper
from omegaconf import MISSING, OmegaConf
from safetensors.torch import load_file, save_file, save_model

from checkpoint.errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
    UnreadableCheckpoint,
    UnsupportedFormat,
)
from checkpoint.foreign import read_foreign


def assert_same(found: typing.Any, expected: typing.Any) -> None:
    """Compare whole states: structure, types, and tensors bit by bit with their strides."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.stride() == expected.stride()
        assert bits(found) == bits(expected)
    elif isinstance(expected, np.ndarray | np.generic):
        assert (type(found), found.dtype) == (type(expected), expected.dtype)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert (type(found), len(found)) == (type(expected), len(expected))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert (type(found), found) == (type(expected), expected)


def bits(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def round_trip(folder: Path, state: typing.Any, **kwargs: typing.Any) -> typing.Any:
    """Save with torch, read with both; both have to agree."""
    path = folder / "checkpoint.th"
    torch.save(state, path, **kwargs)
    found = read_foreign(path)
    assert_same(found, torch.load(path, "cpu", weights_only=False))
    return found


# --- files of torch.save

BASE = torch.arange(48.0).reshape(2, 3, 8)
TENSORS = {
    "no dimension": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "contiguous": BASE,
    "transposed": BASE.transpose(0, 2),
    "every other": BASE[:, :, ::2],
    "with an offset": BASE[1, 1:],
    "expanded": torch.ones(1, 4).expand(5, 4),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "overlapping": torch.arange(6).as_strided((3, 3), (1, 1)),
    "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "not a number": torch.tensor([float("nan"), -0.0, float("inf")]),
}
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_comes_back_bit_by_bit(tmp_path, tensor):
    round_trip(tmp_path, {"model": {"weight": tensor}})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    content = torch.randint(0, 2, (16 * 16,), dtype=torch.uint8)

    round_trip(tmp_path, {"weight": content.view(dtype)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path, protocol):
    state = {"model": torch.nn.LSTM(2, 3).state_dict(), "array": np.arange(5), "text": "é"}

    round_trip(tmp_path, state, pickle_protocol=protocol)


def test_parameters_and_buffers_come_back_as_plain_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    marked = torch.nn.Parameter(torch.randn(2))
    marked.sharded = True
    buffer = torch.nn.Buffer(torch.randn(4))

    found = round_trip(tmp_path, {"p": parameter, "m": marked, "b": buffer})

    assert {type(tensor) for tensor in found.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in found.values())


def test_tied_tensors_come_back_tied(tmp_path):
    weight = torch.randn(4, 4)
    found = round_trip(tmp_path, {"a": weight, "b": weight, "row": weight[1], "other": weight + 0})

    assert found["a"] is found["b"]
    found["a"].zero_()
    assert found["row"].tolist() == [0.0] * 4
    assert found["other"].abs().sum() > 0


def test_tensors_are_writable_and_can_be_trained(tmp_path):
    found = round_trip(tmp_path, {"w": torch.ones(3), "n": np.ones(3)})

    found["w"].mul_(2).requires_grad_(True).sum().backward()
    torch.from_numpy(found["n"]).mul_(2)


def trained() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 4, 3),
        torch.nn.BatchNorm1d(4),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(2),
    )
    return model, model(torch.randn(3, 2, 8)).sum()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_come_back_bit_by_bit(tmp_path, make):
    model, loss = trained()
    optimizer = make(model.parameters())
    loss.backward()
    optimizer.step()

    found = round_trip(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], typing.Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "multi step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_come_back(tmp_path, make):
    model, loss = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = make(optimizer)
    loss.backward()
    optimizer.step()
    schedule.step(*[1.0] * isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau))

    found = round_trip(tmp_path, {"schedule": schedule.state_dict()})

    make(optimizer).load_state_dict(found["schedule"])


def test_a_flat_state_dict_and_its_module_versions_come_back(tmp_path):
    found = round_trip(tmp_path, trained()[0].state_dict())

    assert type(found) is collections.OrderedDict
    assert found._metadata["1"]["version"] == 2


# --- configurations


@dataclasses.dataclass
class Inner:
    rate: float = 0.5
    names: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})


@dataclasses.dataclass
class Structured:
    path: Path = Path("data/x")
    flag: bool = True
    either: int | str = "text"
    missing: int = MISSING
    nothing: int | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    several: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    link: str = "${inner.rate}"
    raw: bytes = b"\x00\xff"


def configurations() -> list[typing.Any]:
    plain = OmegaConf.create(
        {
            "device": "cuda",
            "optim": {"epochs": 3, "betas": [0.9, 0.999], "ema": {"use": True, "decay": None}},
            "link": "${optim.epochs}",
            "home": "${oc.env:PATH}",
            "missing": "???",
            "list": [{"a": [1, "${device}"]}, []],
            "path": Path("a/b"),
            1: {True: 1.5},
        }
    )
    # Fills the caches of its nodes, which are pickled with them.
    assert (plain.link, len(plain.home)) != (None, 0)
    OmegaConf.set_readonly(plain, True)
    typed = OmegaConf.structured(Structured())
    return [plain, typed, OmegaConf.create([1, {"a": "${0}"}]), plain.optim]


@pytest.mark.parametrize("config", configurations(), ids=["plain", "typed", "list", "part"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_configuration_comes_back_as_plain_dicts_and_lists(tmp_path, config, protocol):
    torch.save({"xp.cfg": config}, tmp_path / "c.th", pickle_protocol=protocol)

    found = read_foreign(tmp_path / "c.th")["xp.cfg"]

    expected = OmegaConf.to_container(config, resolve=False)
    assert json.dumps(found, default=repr) == json.dumps(
        expected, default=lambda value: str(value) if isinstance(value, Path) else repr(value)
    )
    assert OmegaConf.create(found) == OmegaConf.create(json_paths(expected))


def json_paths(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: json_paths(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def test_a_configuration_wrapped_for_the_weights_only_loader_comes_back(tmp_path):
    class Wrapped:
        def __reduce__(self):
            return type(OmegaConf.create({})), ({"a": ["${b}"], "b": 1},)

    torch.save({"xp.cfg": Wrapped()}, tmp_path / "c.th")

    assert read_foreign(tmp_path / "c.th") == {"xp.cfg": {"a": ["${b}"], "b": 1}}


def audiocraft_state() -> dict[str, typing.Any]:
    """The state of a solver of Audiocraft: same sources, same containers, gathered by flashy."""
    model, loss = trained()
    owner = type("Solver", (), {})()
    owner.history = [
        {"train": {"loss": 1.5, "acc": np.float32(0.5)}, "valid": {"loss": loss.detach()}}
    ]
    owner.cfg = OmegaConf.create({"optim": {"lr": 0.1}, "device": "${oc.env:DEVICE,cpu}"})
    owner.sig = "0123abcd"
    owner.best_state = {"model": {name: t + 1 for name, t in model.state_dict().items()}}
    owner.fsdp_best_state = {}
    owner.model = model
    owner.optimizer = torch.optim.Adam(model.parameters())
    owner.lr_scheduler = torch.optim.lr_scheduler.StepLR(owner.optimizer, 2)
    loss.backward()
    owner.optimizer.step()
    owner.lr_scheduler.step()
    owner.scaler = torch.amp.GradScaler("cpu")
    averages = collections.defaultdict(
        dict, model={n: t * 2 for n, t in model.state_dict().items()}
    )
    owner.ema = {"state": averages, "count": collections.defaultdict(int, model=3)}
    manager = StateManager()
    for name in ("history", "best_state", "fsdp_best_state", "model", "optimizer", "lr_scheduler"):
        manager.register(name, AttributeWrapper(owner, name))
    for name in ("scaler", "ema"):
        manager.register(name, AttributeWrapper(owner, name))
    manager.register("xp.cfg", WriteOnlyWrapper(AttributeWrapper(owner, "cfg")))
    manager.register("xp.sig", WriteOnlyWrapper(AttributeWrapper(owner, "sig")))
    return manager.state_dict()


def test_a_checkpoint_of_an_audiocraft_solver_comes_back(tmp_path):
    state = audiocraft_state()
    torch.save(state, tmp_path / "checkpoint.th")

    found = read_foreign(tmp_path / "checkpoint.th")

    assert list(found) == list(state)
    assert found.pop("xp.cfg") == {"optim": {"lr": 0.1}, "device": "${oc.env:DEVICE,cpu}"}
    state.pop("xp.cfg")
    assert type(found["ema"]["state"]) is dict
    assert_same(found, state)


def test_a_file_with_nothing_but_a_best_state_comes_back(tmp_path):
    round_trip(tmp_path, {"best_state": {"model": trained()[0].state_dict()}})


def test_a_state_of_many_small_tensors_is_not_taken_for_a_bomb(tmp_path):
    round_trip(tmp_path, {f"layer.{i}.weight": torch.full((3,), float(i)) for i in range(5000)})


def test_a_long_history_is_not_taken_for_a_bomb(tmp_path):
    stage = {f"metric_{i}": 0.1 * i for i in range(20)}

    round_trip(
        tmp_path, {"history": [{"train": {**stage}, "valid": {**stage}} for _ in range(2000)]}
    )


def test_the_kind_of_a_file_is_seen_in_its_content(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "b.th")

    assert read_foreign(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    assert read_foreign(tmp_path / "b.th")["a"].tolist() == [1, 1]


# --- files of safetensors


def test_safetensors_come_back_bit_by_bit(tmp_path):
    tensors = {str(t): torch.randint(0, 2, (256,), dtype=torch.uint8).view(t) for t in DTYPES[:-2]}
    del tensors["torch.complex128"]
    tensors |= {"empty": torch.ones(0, 3), "no dimension": torch.tensor(1.5), "": torch.ones(1)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})

    found = read_foreign(tmp_path / "m.safetensors")

    assert found.keys() == tensors.keys()
    loaded = load_file(tmp_path / "m.safetensors")
    for name, tensor in found.items():
        assert_same(tensor, loaded[name])


def test_tied_weights_in_safetensors_come_back_tied(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "m.safetensors"), {"note": "not a tensor"})
    assert len(load_file(tmp_path / "m.safetensors")) == 3

    found = read_foreign(tmp_path / "m.safetensors")

    assert found["a.weight"] is found["b.weight"]
    assert found.keys() == model.state_dict().keys()
    model.load_state_dict(found)


def test_names_that_look_like_paths_are_only_names(tmp_path):
    save_file({"../../evil": torch.ones(1), "/etc/evil": torch.ones(1)}, tmp_path / "m.safetensors")

    assert set(read_foreign(tmp_path / "m.safetensors")) == {"../../evil", "/etc/evil"}
    assert os.listdir(tmp_path) == ["m.safetensors"]


# --- hostile files

# Reads each file in a process of its own, forked from one that has everything imported, so that the
# peak of memory is that of one file; and reports what else Python was asked to do meanwhile.
MEASURE = """
import json, os, sys, time
from pathlib import Path
from checkpoint.errors import CheckpointError
from checkpoint.foreign import read_foreign

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

def read(path):
    seen = []
    Path("/proc/self/clear_refs").write_text("5")
    before, start, active = memory("VmRSS"), time.monotonic(), True
    def watch(event, arguments):
        wanted = ("open", "exec", "compile", "import", "os.", "subprocess", "socket", "ctypes")
        # A number is a file that is open already.
        if active and event.startswith(wanted) and arguments[0] not in (str(path), *range(99)):
            seen.append(f"{event} {arguments!r}"[:200])
    sys.addaudithook(watch)
    try:
        read_foreign(path)
        error, message = None, ""
    except CheckpointError as caught:
        error, message = type(caught).__name__, str(caught)
    except Exception as caught:
        error, message = "unexpected " + type(caught).__name__, str(caught)
    active = False
    return {
        "error": error, "message": message, "events": seen, "seconds": time.monotonic() - start,
        "mib": memory("VmHWM") - before, "allowed": 2 * path.stat().st_size / 2**20 + 64,
    }

folder = Path(sys.argv[1])
for name in ("good.th", "good.safetensors"):
    read_foreign(folder.parent / name)
for running, path in enumerate(sorted(folder.iterdir())):
    if running >= 2:
        os.wait()
    if os.fork() == 0:
        (folder.parent / "outcomes" / path.name).write_text(json.dumps(read(path)))
        os._exit(0)
os.wait()
os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, typing.Any]]:
    """Write every hostile file, read all of them, and return what happened by name of the file."""
    root = tmp_path_factory.mktemp("hostile")
    folder, marker = root / "files", root / "marker"
    (root / "outcomes").mkdir()
    folder.mkdir()
    # The modules of arrays and configurations are imported when they are first needed.
    torch.save({"a": torch.ones(2), "b": np.ones(2), "c": OmegaConf.create([1])}, root / "good.th")
    save_file({"a": torch.ones(2)}, root / "good.safetensors")
    for suffix, cases in (("th", hostile.TORCH), ("safetensors", hostile.SAFETENSORS)):
        for number, case in enumerate(cases.values()):
            case(folder / f"{number}.{suffix}", marker)
    before = sorted(root.rglob("*"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", MEASURE, str(folder)], env=environment, check=True)
    written = set(root.rglob("*")) - set(before)
    results = {path.name: json.loads(path.read_text()) for path in (root / "outcomes").iterdir()}
    assert {path.parent.name for path in written} == {"outcomes"}
    for file in folder.iterdir():
        file.unlink()
    return results


def check(outcome: dict[str, typing.Any], file: str) -> None:
    assert outcome["error"] in ("CorruptCheckpoint", "UnsupportedFormat"), outcome
    assert file in outcome["message"]
    assert outcome["message"].count(" ") > 12
    assert outcome["events"] == []
    assert outcome["mib"] < outcome["allowed"]


@pytest.mark.parametrize("name", hostile.TORCH)
def test_a_hostile_torch_file_is_refused_and_harms_nothing(name, outcomes):
    file = f"{list(hostile.TORCH).index(name)}.th"
    check(outcomes[file], f"/{file}")


@pytest.mark.parametrize("name", hostile.SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused_and_harms_nothing(name, outcomes):
    file = f"{list(hostile.SAFETENSORS).index(name)}.safetensors"
    check(outcomes[file], f"/{file}")


def test_the_payloads_are_live(tmp_path):
    for kind in ("zip", "legacy"):
        name = f"pickle payload in the {kind} format"
        hostile.TORCH[name](tmp_path / "p.th", tmp_path / kind)
        torch.load(tmp_path / "p.th", weights_only=False)
        assert (tmp_path / kind).exists()
    hostile.TORCH["payload through builtins.eval"](tmp_path / "p.th", tmp_path / "eval")
    pickle.loads(zipfile.ZipFile(tmp_path / "p.th").read("archive/data.pkl"))
    assert (tmp_path / "eval").exists()


def test_a_refusal_names_what_the_file_asked_for(tmp_path):
    hostile.TORCH["payload through a name on the stack"](tmp_path / "p.th", tmp_path / "marker")

    with pytest.raises(UnsupportedFormat, match=r"p\.th cannot be read.*os\.system.*was not run"):
        read_foreign(tmp_path / "p.th")


def test_a_large_text_in_wide_letters_is_read_within_its_bounds(tmp_path):
    hostile.write_torch(tmp_path / "w.th", hostile.state(hostile.text("a" * 10**6 + "\U0001f600")))

    assert len(read_foreign(tmp_path / "w.th")["model"]) == 10**6 + 1


# --- damage


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.th"
    torch.save({"w": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)

    with pytest.raises(CorruptCheckpoint, match="checksum of 'data/0'"):
        read_foreign(path)


def test_a_file_without_checksums_is_read(unchecked, tmp_path):
    round_trip(tmp_path, {"w": torch.arange(1000.0)})


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Let torch write no checksums."""
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def damaged(data: bytes, source: random.Random) -> bytes:
    copy = bytearray(data)
    if source.random() < 0.2:
        return bytes(copy[: source.randrange(len(copy))])
    for _ in range(source.choice([1, 1, 2, 5])):
        copy[source.randrange(len(copy))] = source.randrange(256)
    return bytes(copy)


def never_fails_otherwise(path: Path) -> bool:
    try:
        return isinstance(read_foreign(path), dict)
    except CheckpointError as caught:
        error = caught
    assert str(path) in str(error)
    return False


def test_damage_gives_a_value_or_a_clear_error(unchecked, tmp_path):
    source, read = random.Random(2036), 0
    torch.save(audiocraft_state(), tmp_path / "a.th")
    torch.save({"n": np.ones(3), "t": (1, "b", b"c")}, tmp_path / "b.th", pickle_protocol=5)
    save_file({f"t{i}": torch.ones(i) for i in range(9)}, tmp_path / "c.safetensors")
    for name, count in (("a.th", 150), ("b.th", 150), ("c.safetensors", 200)):
        good = (tmp_path / name).read_bytes()
        for _ in range(count):
            (tmp_path / "damaged").write_bytes(damaged(good, source))
            read += never_fails_otherwise(tmp_path / "damaged")
    assert 0 < read < 500


def test_damage_in_the_pickle_gives_a_value_or_a_clear_error(tmp_path):
    source, read = random.Random(1), 0
    torch.save(audiocraft_state(), tmp_path / "a.th")
    with zipfile.ZipFile(tmp_path / "a.th") as archive:
        storages = {n.split("/")[-1]: archive.read(n) for n in archive.namelist() if "/data/" in n}
        good = archive.read("a/data.pkl")
    for _ in range(200):
        hostile.write_torch(tmp_path / "damaged", damaged(good, source), storages)
        read += never_fails_otherwise(tmp_path / "damaged")
    assert 0 < read < 200


def test_random_instructions_give_a_value_or_a_clear_error(tmp_path):
    source = random.Random(7)
    names = ["collections.OrderedDict", "builtins.set", "numpy.dtype", "torch.Size", "os.system"]
    pieces = [
        *(b"(", b"t", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"R", b"b", b"N", b"\x85", b"\x86"),
        *(b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"\x81", b"K\x01", b"Q"),
        *(b"h\x00", b"h\x01", b"q\x00", hostile.text("a"), hostile.number(-5), hostile.storage(4)),
        *map(hostile.global_, names),
        hostile.tensor(hostile.storage(4), (4,)),
        hostile.global_("omegaconf.dictconfig.DictConfig"),
    ]
    for _ in range(300):
        data = b"".join(source.choices(pieces, k=source.randrange(1, 12)))
        hostile.write_torch(tmp_path / "r.th", hostile.state(data), {"0": bytes(16)})
        never_fails_otherwise(tmp_path / "r.th")


# --- what is no file


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(MissingCheckpoint, match=r"no file .*nowhere\.th"):
        read_foreign(tmp_path / "nowhere.th")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MissingCheckpoint, match=r"no file .*file/x\.th"):
        read_foreign(tmp_path / "file" / "x.th")


def test_a_file_that_may_not_be_read_is_unreadable_and_not_missing(tmp_path):
    path = tmp_path / "secret.th"
    torch.save({"a": torch.ones(1)}, path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(UnreadableCheckpoint, match=r"secret\.th could not be read: Permission"):
            read_foreign(path)
    finally:
        os.seteuid(user)


def test_a_circle_of_links_is_unreadable(tmp_path):
    (tmp_path / "a.th").symlink_to(tmp_path / "a.th")

    with pytest.raises(UnreadableCheckpoint, match=r"a\.th"):
        read_foreign(tmp_path / "a.th")


def test_a_link_that_the_user_gives_is_followed(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "real.th")
    (tmp_path / "link.th").symlink_to(tmp_path / "real.th")

    assert read_foreign(tmp_path / "link.th")["a"].tolist() == [1]


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.th")
    for path in (tmp_path / "pipe.th", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnsupportedFormat, match=f"{path} cannot be read"):
            read_foreign(path)


def test_a_name_that_no_file_can_have_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError):
        read_foreign(tmp_path / "a\0b.th")
    with pytest.raises(UnreadableCheckpoint):
        read_foreign(tmp_path / ("x" * 5000))
