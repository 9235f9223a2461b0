"""The messages that docs/questions.md explains are messages of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
QUOTED = re.findall(r'^### "(.+)"$', QUESTIONS, re.MULTILINE)


def texts() -> Iterator[str]:
    """Give every text in the code; of a formatted one, its parts with … between them."""
    for package in ("solvers", "checkpoint"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[a-z]", "…", node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                    yield "".join(map(str, parts))


@pytest.fixture(scope="module")
def spoken() -> str:
    return "\n".join(texts())


def test_there_are_questions() -> None:
    assert len(QUOTED) > 10


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_has_the_message(quoted: str, spoken: str) -> None:
    for fragment in quoted.split("…"):
        words = fragment.strip(" ,:?'")
        assert words in spoken, f"no message of the code has {words!r}"
