"""Functions in processes of their own, so that no measurement sees the memory of another one."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch


class Failed(Exception):
    """A process ended without its result; the message says why."""


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fork of this process, and return its result, which JSON can hold.

    Raises:
        Failed: it raised, or its process died.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(writing, function, arguments)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        raise Failed(f"its process ended with status {os.waitstatus_to_exitcode(status)}")
    result = json.loads(answer)
    if "error" in result:
        raise Failed(result["error"])
    return result["result"]


def _answer(writing: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # What frameworks print is not part of the report.
    os.dup2(2, 1)
    code = 1
    try:
        torch.set_num_threads(1)
        try:
            answer = {"result": function(*arguments)}
            code = 0
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        sys.stderr.flush()
    finally:
        # Frameworks leave processes and threads that would keep this one.
        os._exit(code)
