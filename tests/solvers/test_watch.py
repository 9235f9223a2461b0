"""The profiler of the first updates, and the detector of deadlocks, which really end processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from solvers.loop.profiler import DEADLOCK_EXIT_CODE, DeadlockDetect, Profiler

ROOT = Path(__file__).parents[2]

DEADLOCK = """
import logging, threading, time
from solvers.loop.profiler import DeadlockDetect
logging.basicConfig(format="%(message)s")
first, second = threading.Lock(), threading.Lock()

def take_first_then_second():
    with first:
        time.sleep(0.1)
        second.acquire()

def take_second_then_first():
    with second:
        time.sleep(0.1)
        first.acquire()

detect = DeadlockDetect(use=True, timeout=0.3)
detect.update("outside")
with detect:
    detect.update("loss")
    other = threading.Thread(target=take_first_then_second, name="other-side")
    other.start()
    take_second_then_first()
"""


def start(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )


def run(code: str) -> tuple[int, str]:
    with start(code) as process:
        _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_a_deadlock_ends_the_process_with_its_code_and_the_stacks_of_all_threads():
    code, stderr = run(DEADLOCK)
    assert code == DEADLOCK_EXIT_CODE == 75
    assert "in take_first_then_second" in stderr
    assert "in take_second_then_first" in stderr
    assert "other-side" in stderr
    assert "Deadlock: no update for 0.3 seconds, the last stage was loss" in stderr


def test_stages_named_outside_the_context_are_neither_kept_nor_reported():
    """E14: Audiocraft queues them for ever, and reports the oldest as the last stage."""
    hang = "detect.update('outside')\nwith detect: threading.Event().wait()"
    code, stderr = run(DEADLOCK.split("detect.update")[0] + hang)
    assert code == DEADLOCK_EXIT_CODE
    assert "the last stage was init" in stderr

    detect = DeadlockDetect(use=True, timeout=1000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(10_000):
        detect.update(f"stage {index}")
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 5_000


def test_a_loop_that_makes_progress_is_left_alone_and_so_is_a_hang_outside_the_context():
    code, stderr = run(
        "import time\n"
        "from solvers.loop.profiler import DeadlockDetect\n"
        "detect = DeadlockDetect(use=True, timeout=0.8)\n"
        "for batches in (20, 2):\n"
        "    with detect:\n"
        "        for _ in range(batches):\n"
        "            time.sleep(0.05)\n"
        "            detect.update('batch')\n"
        "time.sleep(1)\n"
    )
    assert (code, stderr) == (0, "")


def test_an_error_in_the_loop_ends_the_process_at_once():
    """E14: no thread is waited for that only ends at its timeout."""
    code, stderr = run(
        "from solvers.loop.profiler import DeadlockDetect\n"
        "with DeadlockDetect(use=True, timeout=1000):\n"
        "    raise SystemExit(3)\n"
    )
    assert (code, stderr) == (3, "")


def test_a_process_is_ended_even_when_its_stderr_blocks():
    fill = (
        "from solvers.loop import profiler as watch\n"
        "import os\n"
        "watch._REPORT_TIMEOUT = 0.3\n"
        "with watch.DeadlockDetect(use=True, timeout=0.2):\n"
        "    while True: os.write(2, b'x' * 4096)\n"
    )
    with start(fill) as process:
        assert process.wait(timeout=60) == DEADLOCK_EXIT_CODE


def test_time_in_which_the_process_was_suspended_does_not_count():
    loop = (
        "import time\n"
        "from solvers.loop.profiler import DeadlockDetect\n"
        "detect = DeadlockDetect(use=True, timeout=0.8)\n"
        "with detect:\n"
        "    print('ready', flush=True)\n"
        "    for _ in range(4):\n"
        "        time.sleep(0.2)\n"
        "        detect.update('batch')\n"
    )
    with start(loop) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(timeout=60) == 0


def test_a_detector_opens_many_times_and_inside_itself_without_leaving_threads():
    before = threading.active_count()
    detect = DeadlockDetect(use=True, timeout=1000)
    for _ in range(50):
        with detect:
            with detect:
                detect.update("inner")
            assert threading.active_count() == before + 1
        assert threading.active_count() == before


def test_a_detector_that_is_off_starts_no_thread():
    before = threading.active_count()
    with DeadlockDetect(use=False, timeout=0.01) as detect:
        detect.update("batch")
        assert threading.active_count() == before


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"deadlock\.timeout=0: expected seconds, more than 0"):
        DeadlockDetect(use=True, timeout=0)


def train(profiler: Profiler, model: nn.Module, updates: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profiler:
        for _ in range(updates):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            profiler.step()


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def recorded_updates(folder: Path) -> int:
    events = json.loads((folder / "profiler" / "trace_0.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    return len(steps)


def test_the_first_updates_are_profiled_once_and_the_log_says_where(tmp_path, caplog):
    """E13: with torch alone, where Audiocraft's profiler needs xformers."""
    caplog.set_level(logging.INFO)
    model = new_model()
    profiler = Profiler(model, True, tmp_path)
    train(profiler, model, 25)
    assert recorded_updates(tmp_path) == 15
    table = (tmp_path / "profiler" / "table_0.txt").read_text()
    assert "module 1.0" in table
    assert "aten::addmm" in table
    assert str(tmp_path / "profiler") in caplog.text
    assert hooks(model) == 0

    (tmp_path / "profiler" / "trace_0.json").unlink()
    train(profiler, model, 25)
    assert not (tmp_path / "profiler" / "trace_0.json").exists()


def test_a_loop_shorter_than_the_profile_gives_what_there_is(tmp_path):
    model = new_model()
    train(Profiler(model, True, tmp_path), model, 8)
    assert recorded_updates(tmp_path) == 4  # the last has just begun when the loop ends


def test_a_loop_too_short_to_be_profiled_says_so_and_the_next_one_is(tmp_path, caplog):
    model = new_model()
    profiler = Profiler(model, True, tmp_path)
    train(profiler, model, 3)
    assert "the loop ended after 3 updates" in caplog.text
    assert hooks(model) == 0
    train(profiler, model, 21)
    assert recorded_updates(tmp_path) == 15


def test_a_profile_changes_no_weight(tmp_path):
    plain, profiled = new_model(), new_model()
    train(Profiler(plain, False, tmp_path), plain, 25)
    train(Profiler(profiled, True, tmp_path), profiled, 25)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, profiled.state_dict()[name])


def test_a_profile_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "profiler").write_text("in the way")
    model = new_model()
    train(Profiler(model, True, tmp_path), model, 25)
    assert "the profile cannot be written" in caplog.text
    assert str(tmp_path / "profiler") in caplog.text


def test_an_error_in_a_profiled_loop_passes_and_leaves_nothing_behind(tmp_path):
    def fail_at_the_eighth(module: nn.Module, inputs: object) -> None:
        calls.append(module)
        if len(calls) == 8:
            raise ArithmeticError("the eighth")

    calls: list[nn.Module] = []
    model = new_model()
    handle = model[1].register_forward_pre_hook(fail_at_the_eighth)
    with pytest.raises(ArithmeticError, match="the eighth"):
        train(Profiler(model, True, tmp_path), model, 25)
    handle.remove()
    assert hooks(model) == 0


def test_scripted_modules_which_take_no_hooks_are_profiled_without_marks(tmp_path):
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                self.inner = torch.jit.trace(nn.Linear(3, 4), torch.ones(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Traced()
    train(Profiler(model, True, tmp_path), model, 25)
    assert recorded_updates(tmp_path) == 15


def test_a_profiler_that_is_off_imports_nothing_and_makes_no_folder(tmp_path):
    code, stderr = run(
        "import sys\n"
        "from pathlib import Path\n"
        "from solvers.loop.profiler import Profiler\n"
        f"with Profiler(None, False, Path({str(tmp_path)!r})) as profiler:\n"
        "    profiler.step()\n"
        "sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))\n"
    )
    assert (code, stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
