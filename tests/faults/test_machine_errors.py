"""Memory, threads, descriptors and reads that fail are no damage: nothing good is passed over."""

import errno
import gc
import io
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    StateMismatch,
    UnreadableCheckpoint,
    verify,
)
from checkpoint.cli.main import main
from checkpoint.format.decode import decode
from checkpoint.format.safetensors_reader import read_blocks
from checkpoint.io import worker
from checkpoint.io.prefetch import prefetch
from checkpoint.io.two_threads import run_in_two_threads
from checkpoint.testing import MemoryCalls, failing, in_child, interrupted

MEBI = 2**20
SIZE = 32 * MEBI


def weights(epoch: int) -> torch.Tensor:
    return torch.full((4096, SIZE // 4 // 4096), float(epoch))


STATES: dict[str, Callable[[int], Any]] = {
    "a tensor": weights,
    "a transposed tensor": lambda epoch: weights(epoch).t(),
    "an array": lambda epoch: weights(epoch).numpy(),
    "bytes": lambda epoch: bytes([epoch]) * SIZE,
}


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def saved(folder: Path, state: Callable[[int], Any]) -> None:
    checkpointer = Checkpointer(folder)
    for epoch in (1, 2):
        checkpointer.save({"model": {"weight": state(epoch)}, "n": {"epoch": epoch}}, epoch=epoch)
    checkpointer.close()


def limit_memory(room: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))


def load_with_little_memory(report: Callable[[Any], None], folder: str, room: int) -> None:
    limit_memory(room)
    try:
        loaded = Checkpointer(folder).load_newest(quarantine=True)
    except CheckpointError as error:
        report([type(error).__name__, str(error)])
    else:
        assert loaded is not None
        report(loaded.state["n"]["epoch"])


@pytest.mark.parametrize("kind", STATES)
def test_too_little_memory_is_not_taken_for_damage(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, STATES[kind])
    before = listing(tmp_path)
    # From room for nothing to room for the tensors, and not for the copies that a value needs.
    for room in (16 * MEBI, SIZE // 2, SIZE + 24 * MEBI):
        (answer,) = in_child(load_with_little_memory, tmp_path, room).reports
        if answer != 2:
            kind_of_error, message = answer
            assert kind_of_error == "UnreadableCheckpoint"
            assert f"{tmp_path}/checkpoints/epoch_0002" in message
            assert "not enough memory" in message
            assert "free some memory" in message
        assert listing(tmp_path) == before
    (answer,) = in_child(load_with_little_memory, tmp_path, 4 * SIZE + 64 * MEBI).reports
    assert answer == 2


# --- each allocation fails once


def mixed(epoch: int) -> dict[str, Any]:
    base = torch.full((100,), float(epoch))
    return {
        "model": {
            "transposed": torch.full((5, 3), float(epoch)).t(),
            "one": base[:60],
            "other": base[30:],
            "parameter": torch.nn.Parameter(torch.full((3,), float(epoch))),
        },
        "rest": {"array": np.arange(9) + epoch, "bytes": bytes([epoch]) * 70_000, "n": epoch},
    }


def digest_of(state: dict[str, Any]) -> list[float]:
    model, rest = state["model"], state["rest"]
    return [
        *(float(one.detach().sum()) for one in model.values()),
        *(float(rest["array"].sum()), float(len(rest["bytes"])), rest["n"]),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(folder)
    for epoch in (1, 2):
        checkpointer.save(mixed(epoch), epoch=epoch)
    checkpointer.close()
    return folder


def each_failing(act: Callable[[], Any]) -> Iterator[CheckpointError | Any]:
    """Do something again and again; another allocation fails each time."""
    with MemoryCalls() as counted:
        act()
    assert counted.calls
    for call in counted.calls:
        try:
            with MemoryCalls(failing(call.number, errno.ENOMEM)):
                answer = act()
        except CheckpointError as error:
            yield error
        else:
            yield answer


def test_no_allocation_that_fails_is_taken_for_damage(run: Path) -> None:
    before = listing(run)
    found = [
        one if isinstance(one, CheckpointError) else digest_of(one.state)
        for one in each_failing(lambda: Checkpointer(run).load_newest(quarantine=True))
    ]
    assert any(isinstance(one, UnreadableCheckpoint) for one in found)
    for one in found:
        if isinstance(one, CheckpointError):
            assert isinstance(one, UnreadableCheckpoint)
            assert f"{run}/checkpoints/epoch_0002" in str(one)
            assert "not enough memory" in str(one)
        else:
            assert one == digest_of(mixed(2))
    assert listing(run) == before


def test_no_allocation_that_fails_is_damage_that_verify_reports(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in each_failing(lambda: verify(run, deep=True)):
        kinds = {one.kind for each in answer for one in each.damages}
        assert kinds <= {"unreadable"}
    with MemoryCalls(failing(0, errno.ENOMEM, for_good=True)):
        assert main(["verify", str(run)]) == 1
    told = "".join(capsys.readouterr())
    assert "not enough memory" in told
    assert "DAMAGED" not in told


def test_a_check_that_lacks_memory_names_the_folder(run: Path) -> None:
    state = mixed(3)
    for error in each_failing(lambda: Checkpointer(run).check(state)):
        assert isinstance(error, CheckpointError)
        assert f"cannot save {run}/checkpoints: not enough memory" in str(error)


# --- limits of the system


def act_as_nobody(report: Callable[[Any], None], folder: str) -> None:
    """Save and load where the system starts no more threads."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        os.chown(path, 65534, 65534)
    os.setgid(65534)
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    checkpointer = Checkpointer(folder)
    # Large enough for a thread that helps, in both directions.
    state = {"model": {"weight": torch.ones(9 * MEBI)}, "n": {"epoch": 3}}
    checkpointer.save(state, epoch=3)
    loaded = checkpointer.load_newest(quarantine=True)
    assert loaded is not None
    report([loaded.state["n"]["epoch"], float(loaded.state["model"]["weight"].sum())])


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_system_that_starts_no_more_threads_saves_and_loads_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    outcome = in_child(act_as_nobody, tmp_path / "run")
    assert outcome.reports == [[3, float(9 * MEBI)]], outcome.error


def load_with_few_files(report: Callable[[Any], None], folder: str) -> None:
    before = listing(Path(folder))
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for more in range(-3, 3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, most))
        answer = loaded_or_error(lambda: Checkpointer(folder).load_newest())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        assert listing(Path(folder)) == before
        report(answer)


def loaded_or_error(load: Callable[[], Any]) -> Any:
    try:
        return load().state["rest"]["n"]
    except (UnreadableCheckpoint, RecursionError) as error:
        return str(error)


def test_too_few_descriptors_are_not_taken_for_damage(run: Path) -> None:
    outcome = in_child(load_with_few_files, run)
    assert outcome.status == 0, outcome.error
    errors = [one for one in outcome.reports if one != 2]
    assert 0 < len(errors) < len(outcome.reports)
    assert all("Too many open files" in one and "ulimit -n" in one for one in errors)


def test_a_stack_that_is_nearly_full_is_not_taken_for_damage(run: Path) -> None:
    before = listing(run)

    def deep(levels: int) -> Any:
        if levels:
            return deep(levels - 1)
        return Checkpointer(run).load_newest(quarantine=True)

    depth = 0
    frame: Any = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    answers = {
        loaded_or_error(lambda: deep(sys.getrecursionlimit() - depth - room))
        for room in range(10, 200, 7)
    }
    assert 2 in answers
    assert any("the stack of Python is full" in str(one) for one in answers)
    assert listing(run) == before


def test_a_read_that_gives_no_bytes_now_is_no_end_of_a_file(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def readinto(self, _: Any) -> None:
            return None

        def seek(self, offset: int) -> int:
            return offset

    with pytest.raises(BlockingIOError):
        list(read_blocks(Slow()))
    really = io.FileIO.readinto

    class Blocking(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
            return None if len(buffer) > 64 else really(self, buffer)

    monkeypatch.setattr(io, "FileIO", Blocking)
    with pytest.raises(UnreadableCheckpoint, match=r"manifest\.json"):
        Checkpointer(run).load_newest(quarantine=True)


def test_a_device_that_is_the_default_changes_nothing(run: Path) -> None:
    torch.set_default_device("meta")
    try:
        loaded = Checkpointer(run).load_newest(quarantine=True)
    finally:
        torch.set_default_device(None)
    assert loaded is not None
    assert digest_of(loaded.state) == digest_of(mixed(2))


# --- descriptions: what is forged is damage, what the code of a class says is not


FORGED: dict[str, Any] = {
    "a stride that is too large": {"$tensor": "t", "stride": [3, 2**70]},
    "a stride of a text": {"$tensor": "t", "stride": [1, "1"]},
    "a view of no dtype": {"dtype": "Tensor", "offset": 0, "shape": [1], "stride": [1]},
    "a view of bits": {"dtype": "quint4x2", "offset": 0, "shape": [1], "stride": [1]},
    "a view of many sides": {
        "dtype": "float32",
        "offset": 0,
        "shape": [1] * 99,
        "stride": [1] * 99,
    },
    "a view without end": {"dtype": "float32", "offset": 0, "shape": [2**62], "stride": [0]},
    "a view far away": {"dtype": "float32", "offset": 2**63, "shape": [1], "stride": [1]},
    "no device": {"$device": "moon:1"},
    "a device of a number": {"$device": -7},
    "a parameter of whole numbers": {"$parameter": {"$tensor": "i"}, "requires_grad": True},
    "a parameter of a list": {"$parameter": [1], "requires_grad": True},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_description_is_damage(what: str) -> None:
    tree = FORGED[what]
    tree = {"$tensor": "t", "window": tree} if "offset" in tree else tree
    tensors = {"t": torch.ones(3, 1), "i": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(CorruptCheckpoint, match="'model'"):
        decode("model", {"key": tree}, tensors)


class Fussy(torch.Tensor):
    """Is made of one tensor, if it is in the mood."""

    mood: Exception | None = None

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Fussy":
        made: Fussy = torch.Tensor._make_wrapper_subclass(cls, inner.shape)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    inner: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> "Fussy":
        if cls.mood is not None:
            raise cls.mood
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].inner)


@pytest.mark.parametrize(
    ("mood", "kind", "text"),
    [
        (MemoryError(), UnreadableCheckpoint, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), UnreadableCheckpoint, "not enough memory"),
        (RuntimeError("CUDA error: device-side"), UnreadableCheckpoint, "CUDA error"),
        (RuntimeError("no such layout"), StateMismatch, "class Fussy refuses to build it"),
        (TypeError("an argument is missing"), StateMismatch, "'weight'.*refuses to build it"),
    ],
)
def test_what_the_code_of_a_class_raises_is_no_damage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mood: Exception,
    kind: type[Exception],
    text: str,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": {"weight": Fussy(torch.ones(3))}}, epoch=1)
    monkeypatch.setattr(Fussy, "mood", mood)
    with pytest.raises(kind, match=text) as caught:
        checkpointer.load_newest(quarantine=True)
    assert f"{tmp_path}/checkpoints/epoch_0001" in str(caught.value)
    assert "epoch_0001" in listing(tmp_path)
    checkpointer.close()


# --- a fallback


def test_a_fallback_needs_no_more_memory_than_a_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of a damaged checkpoint is kept while the one before it is read."""
    size = 3 * SIZE // 4
    checkpointer = Checkpointer(tmp_path)
    for epoch in (1, 2):
        # One file that two threads read, and one that a single thread reads.
        state = {
            "first": {"weight": torch.full((size // 4,), float(epoch))},
            "second": {"weight": torch.full((size // 4,), float(epoch))},
        }
        checkpointer.save(state, epoch=epoch)
    checkpointer.close()
    with (tmp_path / "checkpoints/epoch_0002/second.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    outcome = in_child(load_counting_memory, tmp_path)
    assert outcome.reports == [1.0], outcome.error
    assert outcome.memory < 2 * size + 24 * MEBI


def load_counting_memory(report: Callable[[Any], None], folder: str) -> None:
    gc.disable()
    # A handler that keeps what was logged, as many do.
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    loaded = Checkpointer(folder).load_newest()
    assert loaded is not None
    report(float(loaded.state["second"]["weight"][0]))


# --- threads that help


def no_thread(*_: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_second_thread_the_first_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, str]] = []

    def work(items: Iterator[int]) -> None:
        done.extend((item, threading.current_thread().name) for item in items)

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    run_in_two_threads(work, range(5))
    assert done == [(item, "MainThread") for item in range(5)]
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]
    unfinished = prefetch(iter(range(5)))
    assert next(unfinished) == 0
    unfinished.close()  # type: ignore[attr-defined]


def test_a_thread_that_dies_before_it_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does that gets no memory for its first step; `Thread.start` would wait for ever."""
    monkeypatch.setattr(worker, "_LOOKS_FOR_BEGIN", 2)
    monkeypatch.setattr(threading.Thread, "_bootstrap", lambda self: None)
    done: list[int] = []
    run_in_two_threads(done.extend, range(5))
    assert done == [0, 1, 2, 3, 4]
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]


def test_what_a_helper_did_not_do_is_an_error_whatever_became_of_it() -> None:
    class Strange(BaseException):
        """Not even an Exception."""

    def work(items: Iterator[int]) -> None:
        is_helper = threading.current_thread() is not threading.main_thread()
        for _ in items:
            time.sleep(0.005)
            if is_helper:
                raise Strange

    with pytest.raises(Strange):
        run_in_two_threads(work, range(1000))


def points_of(act: Callable[[], None]) -> int:
    with interrupted(within=("checkpoint",)) as points:
        act()
    return len(points.places)


def share_work() -> list[int]:
    done: list[int] = []

    def work(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.001)
            done.append(item)

    run_in_two_threads(work, range(6))
    return done


def test_an_interrupt_anywhere_leaves_no_thread_that_works() -> None:
    before = threading.active_count()
    for point in range(points_of(lambda: share_work() and None)):
        began = time.monotonic()
        try:
            with interrupted(point, within=("checkpoint",)):
                assert sorted(share_work()) == list(range(6))
        except KeyboardInterrupt:
            pass
        assert time.monotonic() - began < 5
        deadline = time.monotonic() + 5
        # It may have been started a moment ago; it does not begin to work.
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert threading.active_count() == before
