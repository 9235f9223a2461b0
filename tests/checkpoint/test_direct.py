"""From memory to the disk without a copy: pages, pieces, one piece ahead, past the page cache."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import ExactSolver, build
from safetensors.torch import load_file

from checkpoint import Checkpointer, Position
from checkpoint.format.safetensors_writer import LARGE, TensorFile, file_order, tensor_digest
from checkpoint.io.byte_blocks import BLOCK_SIZE, iter_blocks, tensor_bytes
from checkpoint.io.page_memory import PAGE, page_memory
from checkpoint.io.parallel_copy import copy_bytes
from checkpoint.io.prefetch import prefetch
from checkpoint.saving.encode import encoded
from checkpoint.saving.shards import shards_of_one_process
from checkpoint.saving.staging import Staging
from checkpoint.storage.direct_io import write_parts
from checkpoint.testing import Fault, SystemCalls, failing, tearing

MIB = 2**20


def pattern(size: int) -> torch.Tensor:
    memory = page_memory(size)
    memory.copy_(torch.arange(size, dtype=torch.int64).mul_(2654435761).bitwise_right_shift_(7))
    return memory


def written(path: Path, parts: list[Any]) -> bytes:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_parts(handle, iter(parts))
    finally:
        os.close(handle)
    return path.read_bytes()


def is_cached(path: Path, offset: int) -> bool:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(PAGE)], offset, os.RWF_NOWAIT) > 0
    except OSError as error:
        if error.errno != errno.EAGAIN:
            pytest.skip(f"the file system does not say what is cached: {error}")
        return False
    finally:
        os.close(handle)


@pytest.mark.parametrize("size", [0, 1, PAGE, MIB, 3 * MIB + 1, 9 * MIB + PAGE + 7])
@pytest.mark.parametrize("header", [0, 8, PAGE, 3 * PAGE])
def test_what_goes_past_the_page_cache_is_what_was_given(
    tmp_path: Path, size: int, header: int
) -> None:
    first, data = os.urandom(header), tensor_bytes(pattern(size))
    parts = [
        first,
        *(data[begin : begin + BLOCK_SIZE] for begin in range(0, size, BLOCK_SIZE)),
        b"end",
    ]
    assert written(tmp_path / "file", parts) == first + bytes(data) + b"end"


def test_large_parts_leave_nothing_in_the_page_cache(tmp_path: Path) -> None:
    data = tensor_bytes(pattern(4 * MIB))
    path = tmp_path / "file"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    write_parts(handle, [bytes(PAGE), data])
    os.close(handle)
    if not hasattr(os, "O_DIRECT") or _refuses(tmp_path):
        pytest.skip("the file system writes through the cache only")
    assert not is_cached(path, 2 * MIB)
    assert path.read_bytes() == bytes(PAGE) + bytes(data)


def _refuses(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return True
    # What lies in memory alone has nothing but the cache.
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    held = [one for one in mounts if folder.is_relative_to(one[1])]
    return max(held, key=lambda one: len(one[1]))[2] == "tmpfs"


def test_pieces_of_what_lies_as_its_file_are_not_copied() -> None:
    tensors = [torch.randn(700_000), torch.randn(3, 5), torch.zeros(0), torch.arange(9)]
    state = {"model": dict(zip("abcd", tensors, strict=True))}
    (part,) = Staging().take(shards_of_one_process(encoded(state), {}))
    copies = [part.pieces[key].tensor for key in file_order(state["model"])]
    begin = min(one.data_ptr() for one in copies if one.numel())
    found = list(iter_blocks(copies, is_private=True))
    assert [torch.frombuffer(one, dtype=torch.uint8).data_ptr() for one in found] == [begin]
    assert begin % PAGE == 0
    whole = b"".join(bytes(tensor_bytes(one)) for one in copies)
    assert bytes(found[0]) == whole
    # Where others may write to them, they are.
    (piece,) = iter_blocks(copies, is_private=False)
    assert torch.frombuffer(piece, dtype=torch.uint8).data_ptr() != begin
    assert bytes(piece) == whole


def test_tensors_of_all_kinds_are_cut_into_pieces_in_their_order() -> None:
    large = torch.randn(3 * MIB)
    tensors = [large, torch.randn(64, 64).t(), torch.tensor(3.0), torch.zeros(0, 4), large.half()]
    whole = b"".join(bytes(tensor_bytes(one.contiguous())) for one in tensors)
    found = [bytes(one) for one in iter_blocks(tensors, is_private=False)]
    assert b"".join(found) == whole
    assert [len(one) for one in found] == [BLOCK_SIZE, BLOCK_SIZE, len(whole) - 2 * BLOCK_SIZE]


@pytest.mark.parametrize("count", [10, LARGE // 4 + 3, 3 * BLOCK_SIZE // 4 + 1])
def test_a_file_is_what_safetensors_reads_and_has_the_digests_of_its_tensors(
    tmp_path: Path, count: int
) -> None:
    tensors = {"b": torch.randn(count), "empty": torch.zeros(0), "a": torch.arange(7).bool()}
    file = TensorFile(tensors, {})
    path = tmp_path / "file"
    assert len(written(path, list(map(bytes, file.blocks())))) == file.size
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    assert file.tensor_digests == {name: tensor_digest(one) for name, one in tensors.items()}


def test_files_that_are_cut_anew_use_the_memory_that_is_there() -> None:
    state = {"model": {name: torch.randn(50_000) for name in "abc"}}
    staging = Staging()
    (before,) = staging.take(shards_of_one_process(encoded(state), {}))
    memory = before.pieces["a"].tensor.untyped_storage().data_ptr()
    (after,) = staging.take(
        shards_of_one_process(encoded(state), {}), {"model": [["b"], ["c", "a"]]}
    )
    assert after.pieces["a"].tensor.untyped_storage().data_ptr() == memory
    for key in "ab":
        assert after.pieces[key].tensor.data_ptr() % PAGE == 0
        assert torch.equal(after.pieces[key].tensor, state["model"][key])


def test_memory_that_was_prepared_is_what_the_first_save_takes() -> None:
    state = {"model": {"a": torch.randn(50_000)}}
    staging = Staging()
    staging.prepare(shards_of_one_process(encoded(state), {}))
    (part,) = staging.take(shards_of_one_process(encoded(state), {}))
    assert torch.equal(part.pieces["a"].tensor, state["model"]["a"])
    where = part.pieces["a"].tensor.data_ptr()
    # Nothing to do.
    staging.prepare(shards_of_one_process(encoded(state), {}))
    (again,) = staging.take(shards_of_one_process(encoded(state), {}))
    assert again.pieces["a"].tensor.data_ptr() == where


@pytest.mark.parametrize("background", [False, True])
def test_a_change_behind_the_first_bytes_of_a_tensor_is_saved(
    tmp_path: Path, background: bool
) -> None:
    checkpointer = Checkpointer(tmp_path, background=background, keep_rolling=9)
    weight = torch.zeros(100_000)
    for epoch in range(1, 8):
        # Stands still for a while, moves at its end, then moves at its beginning.
        if epoch in (4, 5):
            weight[-1] = epoch
        if epoch > 5:
            weight[0] = epoch
        checkpointer.save({"model": {"w": weight, "still": torch.ones(99_999)}}, epoch=epoch)
    checkpointer.close()
    for epoch in range(1, 8):
        found = Checkpointer(tmp_path).load(Position(epoch)).state["model"]["w"]
        assert found[-1] == (0 if epoch < 4 else min(epoch, 5))
        assert found[0] == (epoch if epoch > 5 else 0)


def test_what_comes_next_is_made_while_the_last_one_is_used() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    seen = []
    for number in prefetch(count()):
        seen.append(number)
        # One at most, so that two buffers do.
        assert len(made) <= number + 2
    assert seen == [0, 1, 2, 3, 4]


def test_what_is_raised_ahead_is_raised_where_it_is_used_and_no_thread_stays() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise OSError("mine")

    before = threading.active_count()
    items = prefetch(fail())
    assert next(items) == 1
    with pytest.raises(OSError, match="mine"):
        next(items)
    unfinished = prefetch(iter(range(100)))
    assert next(unfinished) == 0
    unfinished.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_first_save_takes_no_new_memory_when_it_was_prepared(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(16 * MIB)}}
    checkpointer = Checkpointer(tmp_path, background=True)
    before = resident()
    checkpointer.prepare(state)
    until = time.monotonic() + 20
    while resident() - before < 60 * MIB and time.monotonic() < until:
        time.sleep(0.01)
    prepared = resident()
    assert prepared - before >= 60 * MIB
    checkpointer.save(state, epoch=1)
    assert resident() - prepared < 16 * MIB
    checkpointer.close()


def test_a_solver_prepares_its_saves_once_its_optimizer_has_a_state(tmp_path: Path) -> None:
    xp, cfg = build(tmp_path, "prepared", optim={"epochs": 1})
    with xp.enter():
        solver = ExactSolver(cfg)
        solver.run_stage("train", solver.train)
        assert not solver.checkpointer.positions()
        assert {"model", "optimizer", "ema"} <= solver.checkpointer._saver._staging._held.keys()


def test_bytes_are_copied_by_two_threads_to_the_last_one() -> None:
    sizes = [0, 1, 7, 2**20, 8 * 2**20 - 1, 8 * 2**20, 30 * 2**20 + 3, 5]
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    # A byte before and behind each of them stays.
    areas = [torch.full((size + 2,), 9, dtype=torch.uint8) for size in sizes]
    for count in range(len(sizes) + 1):
        for area in areas:
            area.fill_(9)
        pairs = [(area[1:-1], source) for area, source in zip(areas, sources, strict=True)]
        copy_bytes(pairs[:count])
        for index, (area, source) in enumerate(zip(areas, sources, strict=True)):
            assert area[0] == area[-1] == 9
            assert torch.equal(area[1:-1], source) if index < count else (area == 9).all()


@pytest.mark.parametrize("act", [failing, partial(tearing, late=True)], ids=["half", "whole"])
@pytest.mark.parametrize("at", range(4))
def test_where_a_write_past_the_cache_fails_after_some_bytes_the_file_is_right_or_refused(
    tmp_path: Path, at: int, act: Callable[..., Fault]
) -> None:
    memory = pattern(5 * MIB)
    parts = [tensor_bytes(memory[begin : begin + MIB]) for begin in range(0, 5 * MIB, MIB)]
    with SystemCalls(act(at, errno.EIO), only={"write"}), suppress(OSError):
        found = written(tmp_path / "file", parts)
        assert found == bytes(memory.numpy())
