"""Commands in forks of a server end, print and hear signals as commands of their own do."""

import os
import signal
import sys
import time
from pathlib import Path

import commands
import pytest

CODE = """
import atexit, os, sys, threading, time
atexit.register(print, "exit handler")
threading.Timer(0.2, print, ["thread"]).start()
print(os.getcwd(), os.environ.get("MINE"), sys.argv[1:], flush=True)
print("to stderr", file=sys.stderr)
exec(sys.argv[1])
"""


def environment(folder: Path) -> dict[str, str]:
    (folder / "mine.py").write_text(CODE)
    return {"MINE": "1", "PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('in words')", 1, "in words"),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_a_command_ends_as_an_interpreter_does(
    tmp_path: Path, line: str, code: int, said: str
) -> None:
    done = commands.run("mine", line, cwd=tmp_path, environment=environment(tmp_path))
    assert done.returncode == code
    assert said in done.stderr
    assert "to stderr" in done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == f"{tmp_path} 1 [{line!r}]"
    assert rest == ([] if code == -signal.SIGKILL else ["thread", "exit handler"])


def test_a_command_hears_a_signal_and_leaves_no_process(tmp_path: Path) -> None:
    started = commands.Started(
        "mine", "time.sleep(60)", cwd=tmp_path, environment=environment(tmp_path)
    )
    while "to stderr" not in started.written()[1]:
        time.sleep(0.01)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == -signal.SIGINT
    assert "KeyboardInterrupt" in started.written()[1]
    started.close()
    assert not Path(f"/proc/{started.pid}").exists()


def test_a_command_does_not_see_the_paths_of_the_tests(tmp_path: Path) -> None:
    line = "print([p for p in sys.path if 'helpers' in p])"
    done = commands.run("mine", line, cwd=tmp_path, environment=environment(tmp_path))
    assert done.stdout.splitlines()[1] == "[]"
    assert any("helpers" in path for path in sys.path)
